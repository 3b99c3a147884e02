// One file of kernels: SOURCE is its path, KERNELS names them as K(name), each of at most MAX_THREADS threads.
#include "block.h"

// The same file may be compiled for several widths of a head.
namespace {
#include SOURCE

#ifndef HEAD_DIM
#define HEAD_DIM 0
#endif

#define K(name) emulated::add_kernel(#name, {HEAD_DIM, MAX_THREADS, emulated::bindable(name)});
struct Registration {
    Registration() { KERNELS }
} registration;
}  // namespace
