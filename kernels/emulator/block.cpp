#include "block.h"
#include "fiber.h"

#include <map>
#include <numeric>
#include <string>
#include <sys/mman.h>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

// Not a power of two, or the top of every stack would fall into the same few lines of the caches.
constexpr size_t STACK_BYTES = (256 << 10) + (4 << 10) + 17 * 64;
constexpr unsigned WARP = 32, MOST_THREADS = 1024;
// Most words that a lane gives to its warp at once: three fragments of a product.
constexpr unsigned EXCHANGED = 10;
// Why a thread does not run.
constexpr unsigned char FOR_BLOCK = 1, FOR_WARP = 2, DONE = 4;

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    bool is_there;
};

// Begun once and never left: threads of one block after the other.
struct Fiber {
    State state;
    bool has_begun;
    Dim3 idx;
    // What has not arrived, in the order in which it was asked for, and how many of them each closed group has.
    std::vector<Copy> copies;
    std::vector<size_t> groups;
    size_t num_grouped;
};

struct Warp {
    // What is given, and what was given before that: it is read until all give again.
    uint32_t words[2][WARP * EXCHANGED];
    unsigned given, num_waiting, count;
    Together together;
};

// Never destroyed: threads of a program that ends may still be at work.
std::vector<Fiber>& fibers = *new std::vector<Fiber>();
std::vector<unsigned char>& waits = *new std::vector<unsigned char>();
std::vector<Warp>& warps = *new std::vector<Warp>();
std::vector<unsigned char>& shared = *new std::vector<unsigned char>();
unsigned char* shared_start;
unsigned running, num_threads, num_waiting_for_block, num_done;
bool is_backwards, block_says, block_said;
const std::function<void()>* the_call;
// Whoever runs the block, until all threads are done.
State caller;
unsigned char* stacks;

[[noreturn]] void fail(const char* why) {
    std::fprintf(stderr, "emulator: %s (block %u %u %u, thread %u)\n", why, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x);
    std::abort();
}

void begin();

// The thread that runs from now on.
const State& next_state() {
    Fiber& fiber = fibers[running];
    threadIdx = fiber.idx;
    if (!fiber.has_begun) {
        fiber.has_begun = true;
        make_state(&fiber.state, stacks + running * STACK_BYTES, STACK_BYTES, begin);
    }
    return fiber.state;
}

// Lets the next thread go on that waits for nothing, or whoever runs the block if all are done, and comes back when it is this
// one's turn.
void yield() {
    State* here = &fibers[running].state;
    if (num_done == num_threads) return go_from_to(here, caller);
    for (unsigned turn = 0; turn < num_threads; turn++) {
        // From the last thread to the first in every second launch: no order of threads may matter.
        if (is_backwards) running = running == 0 ? num_threads - 1 : running - 1;
        else running = running == num_threads - 1 ? 0 : running + 1;
        if (!waits[running]) return go_from_to(here, next_state());
    }
    fail("threads wait for others that have ended, or that wait elsewhere");
}

void begin() {
    while (true) {
        (*the_call)();
        if (!fibers[running].copies.empty()) fail("a thread ended with copies under way");
        fibers[running].groups.clear();
        waits[running] = DONE;
        num_done++;
        yield();
    }
}

void run_block() {
    std::fill(waits.begin(), waits.end(), 0);
    for (Warp& warp : warps) warp.num_waiting = 0;
    num_waiting_for_block = num_done = 0;
    block_says = false;
    running = is_backwards ? num_threads - 1 : 0;
    go_from_to(&caller, next_state());
}

}  // namespace

unsigned char* dynamic_shared() { return shared_start; }

bool block_barrier(bool says) {
    block_says |= says;
    waits[running] = FOR_BLOCK;
    if (++num_waiting_for_block == num_threads) {
        num_waiting_for_block = 0;
        block_said = block_says;
        block_says = false;
        std::fill(waits.begin(), waits.end(), 0);
    }
    while (waits[running]) yield();
    return block_said;
}

const uint32_t* exchange(const uint32_t* words, unsigned count, Together together) {
    Warp& warp = warps[running / WARP];
    unsigned first = running / WARP * WARP;
    if (count > EXCHANGED) fail("too much is exchanged");
    if (warp.num_waiting == 0) warp.count = count, warp.together = together;
    if (warp.count != count || warp.together != together) fail("lanes of a warp do unlike things");
    std::memcpy(warp.words[warp.given] + (running - first) * count, words, count * sizeof(uint32_t));
    waits[running] = FOR_WARP;
    if (++warp.num_waiting == WARP) {
        warp.num_waiting = 0;
        if (together) together(warp.words[warp.given]);
        warp.given = 1 - warp.given;
        std::fill_n(waits.begin() + first, WARP, 0);
    }
    while (waits[running]) yield();
    return warp.words[1 - warp.given];
}

void begin_copy(void* to, const void* from, bool is_there) {
    auto address = reinterpret_cast<uintptr_t>(to) | (is_there ? reinterpret_cast<uintptr_t>(from) : 0);
    if (address % 16 != 0) fail("a copy of 16 bytes is not aligned");
    auto* target = static_cast<unsigned char*>(to);
    if (target < shared_start || target + 16 > shared.data() + shared.size()) fail("a copy goes beyond the block's memory");
    fibers[running].copies.push_back({target, static_cast<const unsigned char*>(from), is_there});
}

void close_copies() {
    Fiber& fiber = fibers[running];
    fiber.groups.push_back(fiber.copies.size() - fiber.num_grouped);
    fiber.num_grouped = fiber.copies.size();
}

void await_copies(unsigned pending) {
    Fiber& fiber = fibers[running];
    size_t num_groups = fiber.groups.size() > pending ? fiber.groups.size() - pending : 0;
    size_t num_copies = std::accumulate(fiber.groups.begin(), fiber.groups.begin() + num_groups, size_t(0));
    for (size_t i = 0; i < num_copies; i++) {
        const Copy& copy = fiber.copies[i];
        if (copy.is_there) std::memcpy(copy.to, copy.from, 16);
        else std::memset(copy.to, 0, 16);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + num_copies);
    fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + num_groups);
    fiber.num_grouped -= num_copies;
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
    if (num_threads == 0 || num_threads > std::min(kernel.max_threads, MOST_THREADS)) fail("a block of more threads than the kernel is for");
    if (num_threads % WARP != 0) fail("a block of no whole warps");
    if (grid.y > 65535 || grid.z > 65535) fail("a grid is too large");
    if (!stacks) {
        void* memory = mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for stacks");
        stacks = static_cast<unsigned char*>(memory);
    }
    // As many as there are stacks, whose addresses they keep.
    fibers.resize(MOST_THREADS);
    waits.resize(num_threads);
    warps.resize(num_threads / WARP);
    for (unsigned i = 0; i < num_threads; i++) {
        fibers[i].idx = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    }
    the_call = &call, gridDim = grid, blockDim = block;
    is_backwards = ++launches % 2 == 1;
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                shared.assign(shared_bytes + 128, 0xff);
                uintptr_t start = reinterpret_cast<uintptr_t>(shared.data());
                shared_start = shared.data() + (128 - start % 128) % 128;
                run_block();
            }
        }
    }
}

}  // namespace emulated
