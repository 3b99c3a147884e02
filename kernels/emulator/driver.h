// What the parts of the driver share.
#pragma once

#include <condition_variable>
#include <cstdlib>
#include <mutex>

#include "queues.h"

#define API extern "C" __attribute__((visibility("default")))
using Result = int;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
                 INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900,
                 CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 907, CAPTURE_WRONG_THREAD = 908;
using Pointer = unsigned long long;

struct Device {
    int index;
    unsigned capability;
    size_t total_bytes, used_bytes;
};

// Of all that follows.
extern std::recursive_mutex& lock;
using Guard = std::unique_lock<std::recursive_mutex>;
#define LOCKED Guard guard(lock)

// The calling thread's device.
extern thread_local Device* current;

unsigned long long number(const char* name, unsigned long long otherwise);

// Puts work at the end of a stream; see emulated_queue.
Result queue(void* stream, emulated::Work work);

// The same of work that never waits.
template <typename Does>
Result queue_once(void* stream, Does does) {
    return queue(stream, [does] { return does(), emulated::Outcome::Done; });
}

bool is_captured(void* stream);

// Waits for all that a stream has to do.
Result drain(Guard& guard, void* stream);

// And all streams of a device.
Result drain_all(Guard& guard, Device* device);

// Whether the calling thread may do what waits, allocates or frees: not while it captures. If not, what it captures is void.
bool may_wait();
#define NOT_WHILE_CAPTURING \
    if (!may_wait()) return CAPTURE_UNSUPPORTED
