// Running a kernel's blocks, one after the other.
#pragma once

#include <functional>

#include "device.h"

namespace emulated {

// A kernel that takes its arguments as a launch passes them.
using Launchable = std::function<void(void** arguments)>;

struct Kernel {
    // The width of a head that it was compiled for, or 0.
    unsigned head_dim;
    // Most threads of a block.
    unsigned max_threads;
    Launchable call;
};

void add_kernel(const char* name, Kernel kernel);
const Kernel* find_kernel(const char* name, unsigned head_dim);

void run_grid(const Kernel& kernel, Dim3 grid, Dim3 block, unsigned shared_bytes, void** arguments);

template <typename... Arguments, size_t... Indices>
Launchable launchable(void (*function)(Arguments...), std::index_sequence<Indices...>) {
    return [function](void** arguments) {
        (void)arguments;
        function(*static_cast<std::decay_t<Arguments>*>(arguments[Indices])...);
    };
}

template <typename... Arguments>
Launchable launchable(void (*function)(Arguments...)) {
    return launchable(function, std::index_sequence_for<Arguments...>{});
}

}  // namespace emulated
