#include "block.h"

#include <csetjmp>
#include <map>
#include <sys/mman.h>
#include <string>
#include <ucontext.h>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr size_t STACK_BYTES = 256 << 10;
constexpr unsigned WARP = 32;
// Most words that a lane gives to its warp at once.
constexpr unsigned EXCHANGED = 6;

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    bool is_there;
};

struct Fiber {
    ucontext_t context;
    jmp_buf state;
    bool has_begun, is_done, waits_for_block, waits_for_warp;
    Dim3 idx;
    // Groups of copies that have not arrived, the last one still open.
    std::vector<std::vector<Copy>> copies;
};

struct Warp {
    uint32_t words[WARP * EXCHANGED];
    unsigned num_waiting, count;
};

// Never destroyed: threads of a program that ends may still be at work.
std::vector<Fiber>& fibers = *new std::vector<Fiber>();
std::vector<Warp>& warps = *new std::vector<Warp>();
std::vector<unsigned char>& shared = *new std::vector<unsigned char>();
unsigned char* shared_start;
unsigned running, num_threads, num_waiting_for_block, num_done;
bool block_says, block_said;
const std::function<void()>* the_call;
jmp_buf scheduler;
ucontext_t scheduler_context;
unsigned char* stacks;

[[noreturn]] void fail(const char* why) {
    std::fprintf(stderr, "emulator: %s (block %u %u %u, thread %u)\n", why, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    std::abort();
}

// Back to the scheduler, and here again when it is this fiber's turn.
void yield() {
    if (_setjmp(fibers[running].state) == 0) _longjmp(scheduler, 1);
}

void begin() {
    (*the_call)();
    Fiber& fiber = fibers[running];
    for (const auto& group : fiber.copies) {
        if (!group.empty()) fail("a thread ended with copies under way");
    }
    fiber.is_done = true;
    num_done++;
    _longjmp(scheduler, 1);
}

void run(unsigned index) {
    running = index;
    Fiber& fiber = fibers[index];
    threadIdx = fiber.idx;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.has_begun) _longjmp(fiber.state, 1);
    fiber.has_begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + index * STACK_BYTES;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin, 0);
    swapcontext(&scheduler_context, &fiber.context);
}

void run_block(unsigned launch) {
    for (unsigned i = 0; i < num_threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.has_begun = fiber.is_done = fiber.waits_for_block = fiber.waits_for_warp = false;
        fiber.idx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        fiber.copies.assign(1, {});
    }
    for (Warp& warp : warps) warp.num_waiting = 0;
    num_waiting_for_block = num_done = 0;
    block_says = false;
    while (num_done < num_threads) {
        bool has_run = false;
        for (unsigned turn = 0; turn < num_threads; turn++) {
            // From the last thread to the first in every second launch: no order of threads may matter.
            unsigned i = launch % 2 ? num_threads - 1 - turn : turn;
            while (!fibers[i].is_done && !fibers[i].waits_for_block && !fibers[i].waits_for_warp) run(i), has_run = true;
        }
        if (!has_run) fail("threads wait for others that have ended, or that wait elsewhere");
    }
}

}  // namespace

unsigned char* dynamic_shared() { return shared_start; }

bool block_barrier(bool says) {
    block_says |= says;
    fibers[running].waits_for_block = true;
    if (++num_waiting_for_block == num_threads) {
        num_waiting_for_block = 0;
        block_said = block_says;
        block_says = false;
        for (unsigned i = 0; i < num_threads; i++) fibers[i].waits_for_block = false;
    }
    while (fibers[running].waits_for_block) yield();
    return block_said;
}

const uint32_t* exchange(const uint32_t* words, unsigned count) {
    Warp& warp = warps[running / WARP];
    unsigned first = running / WARP * WARP;
    // What was exchanged before has been read by all, who have come here since. So two exchanges take turns in memory.
    static auto& seen = *new std::vector<std::vector<uint32_t>>();
    seen.resize(std::max(seen.size(), warps.size()));
    if (count > EXCHANGED) fail("too much is exchanged");
    if (warp.num_waiting == 0) warp.count = count;
    if (warp.count != count) fail("lanes of a warp do unlike things");
    std::memcpy(warp.words + (running - first) * count, words, count * sizeof(uint32_t));
    fibers[running].waits_for_warp = true;
    if (++warp.num_waiting == WARP) {
        warp.num_waiting = 0;
        seen[running / WARP].assign(warp.words, warp.words + WARP * count);
        for (unsigned i = first; i < first + WARP; i++) fibers[i].waits_for_warp = false;
    }
    while (fibers[running].waits_for_warp) yield();
    return seen[running / WARP].data();
}

void begin_copy(void* to, const void* from, bool is_there) {
    auto address = reinterpret_cast<uintptr_t>(to) | (is_there ? reinterpret_cast<uintptr_t>(from) : 0);
    if (address % 16 != 0) fail("a copy of 16 bytes is not aligned");
    auto* target = static_cast<unsigned char*>(to);
    if (target < shared_start || target + 16 > shared.data() + shared.size()) fail("a copy goes beyond the block's memory");
    fibers[running].copies.back().push_back({target, static_cast<const unsigned char*>(from), is_there});
}

void close_copies() { fibers[running].copies.emplace_back(); }

void await_copies(unsigned pending) {
    auto& copies = fibers[running].copies;
    while (copies.size() > pending + 1) {
        for (const Copy& copy : copies.front()) {
            if (copy.is_there) std::memcpy(copy.to, copy.from, 16);
            else std::memset(copy.to, 0, 16);
        }
        copies.erase(copies.begin());
    }
}

std::multimap<std::string, Kernel>& kernels() {
    static auto& all = *new std::multimap<std::string, Kernel>();
    return all;
}

void add_kernel(const char* name, Kernel kernel) { kernels().emplace(name, kernel); }

const Kernel* find_kernel(const char* name, unsigned head_dim) {
    auto range = kernels().equal_range(name);
    for (auto at = range.first; at != range.second; ++at) {
        if (at->second.head_dim == 0 || at->second.head_dim == head_dim) return &at->second;
    }
    return nullptr;
}

void run_grid(const Kernel& kernel, Dim3 grid, Dim3 block, unsigned shared_bytes, const std::function<void()>& call) {
    static unsigned launches = 0;
    num_threads = block.x * block.y * block.z;
    if (num_threads == 0 || num_threads > kernel.max_threads) fail("a block of more threads than the kernel is for");
    if (num_threads % WARP != 0) fail("a block of no whole warps");
    if (grid.y > 65535 || grid.z > 65535) fail("a grid is too large");
    if (!stacks) {
        void* memory = mmap(nullptr, 1024 * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for stacks");
        stacks = static_cast<unsigned char*>(memory);
    }
    fibers.resize(num_threads);
    warps.resize(num_threads / WARP);
    the_call = &call, gridDim = grid, blockDim = block;
    launches++;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                shared.assign(shared_bytes + 128, 0xff);
                uintptr_t start = reinterpret_cast<uintptr_t>(shared.data());
                shared_start = shared.data() + (128 - start % 128) % 128;
                run_block(launches);
            }
        }
    }
}

}  // namespace emulated
