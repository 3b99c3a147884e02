// A libcuda of one GPU that is none: what the CUDA backend calls of the driver, done at once.
//
// Memory is the host's, filled with what is no number, and ends at a page that nobody may touch. A module is what
// nvrtc.cpp makes: the width of a head.
#include <chrono>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

#include "block.h"

#define API extern "C" __attribute__((visibility("default")))
using Result = int;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500;
using Pointer = unsigned long long;

namespace {

constexpr size_t TOTAL_BYTES = size_t(2) << 30;
// Most memory of a thread block, as of an H100.
constexpr unsigned MOST_SHARED_BYTES = 227 << 10;
constexpr unsigned SHARED_BYTES = 48 << 10;

struct Allocation {
    unsigned char* mapped;
    size_t mapped_bytes, bytes;
};

// Never destroyed: threads of a program that ends may still be at work.
std::recursive_mutex& lock = *new std::recursive_mutex();
std::map<Pointer, Allocation>& allocations = *new std::map<Pointer, Allocation>();
size_t used_bytes = 0;

struct Function {
    const emulated::Kernel* kernel;
    unsigned shared_bytes;
};

}  // namespace

#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock)

API Result cuInit(unsigned) { return SUCCESS; }
API Result cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
API Result cuDeviceGetCount(int* count) { return *count = 1, SUCCESS; }
API Result cuDeviceGet(int* device, int ordinal) { return ordinal == 0 ? (*device = 0, SUCCESS) : 101; }
API Result cuDeviceGetName(char* name, int length, int) { return std::snprintf(name, length, "emulator"), SUCCESS; }
API Result cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = TOTAL_BYTES, SUCCESS; }

API Result cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = 4; break;                  // Multiprocessors.
        case 75: *value = 9; break;                  // Compute capability, major.
        case 76: *value = 0; break;                  // And minor.
        case 97: *value = MOST_SHARED_BYTES; break;  // Memory of a thread block that may be asked for.
        default: *value = 0;
    }
    return SUCCESS;
}

API Result cuDevicePrimaryCtxRetain(void** context, int) { return *context = &lock, SUCCESS; }
API Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API Result cuCtxSetCurrent(void*) { return SUCCESS; }
API Result cuCtxSynchronize() { return SUCCESS; }
API Result cuStreamCreate(void** stream, unsigned) { return *stream = &allocations, SUCCESS; }
API Result cuStreamDestroy_v2(void*) { return SUCCESS; }
API Result cuStreamSynchronize(void*) { return SUCCESS; }

API Result cuEventCreate(void** event, unsigned) {
    return *event = new std::chrono::steady_clock::time_point(), SUCCESS;
}
API Result cuEventRecord(void* event, void*) {
    *static_cast<std::chrono::steady_clock::time_point*>(event) = std::chrono::steady_clock::now();
    return SUCCESS;
}
API Result cuEventSynchronize(void*) { return SUCCESS; }
API Result cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    auto at = [](void* event) { return *static_cast<std::chrono::steady_clock::time_point*>(event); };
    *milliseconds = std::chrono::duration<float, std::milli>(at(end) - at(start)).count();
    return SUCCESS;
}
API Result cuEventDestroy_v2(void* event) {
    delete static_cast<std::chrono::steady_clock::time_point*>(event);
    return SUCCESS;
}

API Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    LOCKED;
    *free_bytes = TOTAL_BYTES - used_bytes, *total = TOTAL_BYTES;
    return SUCCESS;
}

API Result cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
    LOCKED;
    if (bytes == 0) return INVALID_VALUE;
    if (bytes > TOTAL_BYTES - used_bytes) return OUT_OF_MEMORY;
    size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    auto* mapped = static_cast<unsigned char*>(memory);
    mprotect(mapped + whole, page, PROT_NONE);
    std::memset(mapped, 0xff, whole);
    // As near to the end as 256 bytes let it, which is what a GPU's memory is aligned to.
    Pointer start = (reinterpret_cast<Pointer>(mapped) + whole - bytes) / 256 * 256;
    allocations[start] = {mapped, whole + page, bytes};
    used_bytes += bytes;
    *pointer = start;
    return SUCCESS;
}

API Result cuMemFree_v2(Pointer pointer) {
    LOCKED;
    auto found = allocations.find(pointer);
    if (found == allocations.end()) return INVALID_VALUE;
    used_bytes -= found->second.bytes;
    munmap(found->second.mapped, found->second.mapped_bytes);
    allocations.erase(found);
    return SUCCESS;
}

API Result cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    *pointer = std::malloc(bytes);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}
API Result cuMemFreeHost(void* pointer) { return std::free(pointer), SUCCESS; }

API Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void*) {
    return std::memcpy(reinterpret_cast<void*>(to), from, bytes), SUCCESS;
}
API Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void*) {
    return std::memcpy(to, reinterpret_cast<void*>(from), bytes), SUCCESS;
}
API Result cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void*) {
    return std::memset(reinterpret_cast<void*>(to), value, bytes), SUCCESS;
}

API Result cuModuleLoadData(void** module, const void* image) {
    unsigned head_dim;
    if (std::sscanf(static_cast<const char*>(image), "emulated %u", &head_dim) != 1) return 200;
    *module = reinterpret_cast<void*>(uintptr_t(head_dim) + 1);
    return SUCCESS;
}
API Result cuModuleUnload(void*) { return SUCCESS; }

API Result cuModuleGetFunction(void** function, void* module, const char* name) {
    const emulated::Kernel* kernel = emulated::find_kernel(name, unsigned(reinterpret_cast<uintptr_t>(module) - 1));
    if (!kernel) return NOT_FOUND;
    *function = new Function{kernel, SHARED_BYTES};
    return SUCCESS;
}

API Result cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8) return INVALID_VALUE; // Most dynamic memory of a thread block.
    if (value < 0 || unsigned(value) > MOST_SHARED_BYTES) return INVALID_VALUE;
    static_cast<Function*>(function)->shared_bytes = value;
    return SUCCESS;
}

API Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                          unsigned block_z, unsigned shared_bytes, void*, void** arguments, void**) {
    LOCKED;
    auto& launched = *static_cast<Function*>(function);
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || shared_bytes > launched.shared_bytes) return INVALID_VALUE;
    emulated::run_grid(*launched.kernel, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, arguments);
    return SUCCESS;
}

API Result cuGetErrorName(Result error, const char** name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}
API Result cuGetErrorString(Result, const char** text) { return *text = "the emulator refuses", SUCCESS; }
