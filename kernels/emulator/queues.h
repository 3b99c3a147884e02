// What streams are to do, for libcuda and for the libraries beside it.
#pragma once

#include <functional>

namespace emulated {

enum class Outcome {
    Done,
    // It waits for what has not happened yet, and is to be tried again.
    Waits,
    // The stream is of no more use.
    Failed,
};

using Work = std::function<Outcome()>;

}  // namespace emulated

// Puts work at the end of a stream, or of the graph that it is captured in: nothing else may tell when it is done.
extern "C" __attribute__((visibility("default"))) int emulated_queue(void* stream, emulated::Work work);

// Something has happened that work may have waited for.
extern "C" __attribute__((visibility("default"))) void emulated_wake();

// Does some of what streams have to do, as a device does that nobody waits for.
extern "C" __attribute__((visibility("default"))) void emulated_go_on();

// The calling thread's device, by its number; -1 where it has none.
extern "C" __attribute__((visibility("default"))) int emulated_device();
