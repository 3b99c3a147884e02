// Stacks of their own for the threads of a block, all of which one thread of the processor runs.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __x86_64__

namespace emulated {

// Where a stack was left: the registers that a call keeps lie there.
using State = void*;

}  // namespace emulated

// Leaves one stack, and goes on with another where that was left. For each product of a warp its 32 threads take turns: with
// `longjmp`, which hides addresses, a test of many jobs took 23.5 s for 17.1 in all, and `swapcontext` makes a call of the system.
extern "C" __attribute__((visibility("hidden"))) void go_from_to(emulated::State* from, emulated::State to);
asm(R"(
    .text
    .globl go_from_to
    .hidden go_from_to
    .type go_from_to, @function
go_from_to:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size go_from_to, . - go_from_to
)");

namespace emulated {

// A stack that begins with `first`, which never ends.
inline void make_state(State* state, unsigned char* stack, size_t bytes, void (*first)()) {
    constexpr size_t KEPT_REGISTERS = 6;
    uintptr_t end = (reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16;
    // It finds its stack as if it had been called, 8 bytes off a multiple of 16.
    uintptr_t* words = reinterpret_cast<uintptr_t*>(end) - 2;
    *words = reinterpret_cast<uintptr_t>(first);
    *state = words - KEPT_REGISTERS;
}

}  // namespace emulated

#else

#include <ucontext.h>

namespace emulated {

using State = ucontext_t;

inline void go_from_to(State* from, const State& to) { swapcontext(from, &to); }

// In its place: a context may hold pointers into itself.
inline void make_state(State* state, unsigned char* stack, size_t bytes, void (*first)()) {
    getcontext(state);
    state->uc_stack.ss_sp = stack;
    state->uc_stack.ss_size = bytes;
    state->uc_link = nullptr;
    makecontext(state, first, 0);
}

}  // namespace emulated

#endif
