// Running a kernel's blocks, one after the other.
#pragma once

#include <functional>
#include <tuple>

#include "device.h"

namespace emulated {

// A kernel, made a call of by the arguments of a launch, which are copied.
using Bind = std::function<std::function<void()>(void** arguments)>;

struct Kernel {
    // The width of a head that it was compiled for, or 0.
    unsigned head_dim;
    // Most threads of a block.
    unsigned max_threads;
    Bind bind;
};

void add_kernel(const char* name, Kernel kernel);
const Kernel* find_kernel(const char* name, unsigned head_dim);

// `call` is what each thread does.
void run_grid(const Kernel& kernel, Dim3 grid, Dim3 block, unsigned shared_bytes, const std::function<void()>& call);

template <typename... Arguments, size_t... Indices>
Bind bindable(void (*function)(Arguments...), std::index_sequence<Indices...>) {
    return [function](void** arguments) -> std::function<void()> {
        (void)arguments;
        std::tuple<std::decay_t<Arguments>...> kept(*static_cast<std::decay_t<Arguments>*>(arguments[Indices])...);
        return [function, kept] { std::apply(function, kept); };
    };
}

template <typename... Arguments>
Bind bindable(void (*function)(Arguments...)) {
    return bindable(function, std::index_sequence_for<Arguments...>{});
}

}  // namespace emulated
