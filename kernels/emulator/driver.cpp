// A libcuda of GPUs that are none: what the CUDA backend calls of the driver, done at once.
//
// Memory is the host's, filled with what is no number, and ends at a page that nobody may touch. A module is what
// nvrtc.cpp makes: the width of a head. A stream that is captured keeps what is queued, and a graph does it at each launch.
//
// The environment says what the machine is like, for tests of what happens on others:
//   EMULATED_GPUS=2                 how many there are, 1 if not set
//   EMULATED_CAPABILITIES=90,80     what each can do, 90 (Hopper) if not set
//   EMULATED_BYTES=100000000        memory of each
//   EMULATED_DRIVER=11040           the CUDA that the driver is for
//   EMULATED_LEFT=1000000@50        after so many launches another program leaves so many bytes of each
#include <chrono>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "block.h"

#define API extern "C" __attribute__((visibility("default")))
using Result = int;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
                 NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900;
using Pointer = unsigned long long;

namespace {

// Most memory of a thread block, as of an H100.
constexpr unsigned MOST_SHARED_BYTES = 227 << 10;
constexpr unsigned SHARED_BYTES = 48 << 10;

struct Device {
    int index;
    unsigned capability;
    size_t total_bytes, used_bytes;
};

struct Allocation {
    unsigned char* mapped;
    size_t mapped_bytes, bytes;
    Device* device;
};

using Work = std::function<void()>;

struct Graph {
    std::vector<Work> nodes;
};

struct Stream {
    Device* device;
    Graph* captured;
};

struct Function {
    const emulated::Kernel* kernel;
    unsigned shared_bytes;
};

// Never destroyed: threads of a program that ends may still be at work.
std::recursive_mutex& lock = *new std::recursive_mutex();
std::map<Pointer, Allocation>& allocations = *new std::map<Pointer, Allocation>();
size_t launches = 0, num_captures = 0;
thread_local Device* current = nullptr;

unsigned long long number(const char* name, unsigned long long otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

std::vector<Device>& devices() {
    static auto& all = *[] {
        auto* all = new std::vector<Device>();
        const char* capabilities = std::getenv("EMULATED_CAPABILITIES");
        for (int i = 0; i < int(number("EMULATED_GPUS", 1)); i++) {
            unsigned capability = 90;
            if (capabilities) {
                char* rest;
                capability = std::strtoul(capabilities, &rest, 10);
                if (*rest == ',') capabilities = rest + 1;
            }
            all->push_back({i, capability, size_t(number("EMULATED_BYTES", 2ull << 30)), 0});
        }
        return all;
    }();
    return all;
}

// What a stream is to do: at once, or when the graph is launched that it is captured in.
Result queue(void* stream, Work work) {
    auto& queued = *static_cast<Stream*>(stream);
    if (!current || queued.device != current) return INVALID_CONTEXT;
    if (queued.captured) queued.captured->nodes.push_back(std::move(work));
    else work();
    return SUCCESS;
}

}  // namespace

#define LOCKED std::lock_guard<std::recursive_mutex> guard(lock)
// What waits or allocates would wait for work that has not begun.
#define NOT_WHILE_CAPTURING \
    if (num_captures > 0) return CAPTURE_UNSUPPORTED

API Result cuInit(unsigned) { return devices().empty() ? 100 : SUCCESS; }
API Result cuDriverGetVersion(int* version) { return *version = int(number("EMULATED_DRIVER", 13000)), SUCCESS; }
API Result cuDeviceGetCount(int* count) { return *count = int(devices().size()), SUCCESS; }
API Result cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || size_t(ordinal) >= devices().size()) return INVALID_DEVICE;
    return *device = ordinal, SUCCESS;
}
API Result cuDeviceGetName(char* name, int length, int) { return std::snprintf(name, length, "emulator"), SUCCESS; }
API Result cuDeviceTotalMem_v2(size_t* bytes, int device) { return *bytes = devices()[device].total_bytes, SUCCESS; }

API Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    unsigned capability = devices()[device].capability;
    switch (attribute) {
        case 16: *value = 4; break;                  // Multiprocessors.
        case 75: *value = capability / 10; break;    // Compute capability, major.
        case 76: *value = capability % 10; break;    // And minor.
        case 97: *value = MOST_SHARED_BYTES; break;  // Memory of a thread block that may be asked for.
        default: *value = 0;
    }
    return SUCCESS;
}
API Result cuDeviceCanAccessPeer(int* can, int, int) { return *can = 1, SUCCESS; }
API Result cuCtxEnablePeerAccess(void*, unsigned) { return SUCCESS; }

API Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &devices()[device], SUCCESS; }
API Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API Result cuCtxSetCurrent(void* context) { return current = static_cast<Device*>(context), SUCCESS; }
API Result cuCtxSynchronize() {
    LOCKED;
    NOT_WHILE_CAPTURING;
    return SUCCESS;
}

API Result cuStreamCreate(void** stream, unsigned) {
    if (!current) return INVALID_CONTEXT;
    return *stream = new Stream{current, nullptr}, SUCCESS;
}
API Result cuStreamDestroy_v2(void* stream) { return delete static_cast<Stream*>(stream), SUCCESS; }
API Result cuStreamSynchronize(void* stream) {
    return static_cast<Stream*>(stream)->captured ? CAPTURE_UNSUPPORTED : SUCCESS;
}
API Result cuStreamWaitEvent(void*, void*, unsigned) { return SUCCESS; }

API Result cuStreamBeginCapture_v2(void* stream, int) {
    LOCKED;
    auto& captured = static_cast<Stream*>(stream)->captured;
    if (captured) return INVALID_VALUE;
    captured = new Graph(), num_captures++;
    return SUCCESS;
}
API Result cuStreamEndCapture(void* stream, void** graph) {
    LOCKED;
    auto& captured = static_cast<Stream*>(stream)->captured;
    if (!captured) return INVALID_VALUE;
    *graph = captured, captured = nullptr, num_captures--;
    return SUCCESS;
}
API Result cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    return *executable = new Graph(*static_cast<Graph*>(graph)), SUCCESS;
}
API Result cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), SUCCESS; }
API Result cuGraphExecDestroy(void* executable) { return delete static_cast<Graph*>(executable), SUCCESS; }
API Result cuGraphLaunch(void* executable, void* stream) {
    LOCKED;
    Graph* graph = static_cast<Graph*>(executable);
    return queue(stream, [graph] { for (const Work& node : graph->nodes) node(); });
}

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
    if (!current) return INVALID_CONTEXT;
    *free_bytes = current->total_bytes - std::min(current->used_bytes, current->total_bytes);
    *total = current->total_bytes;
    return SUCCESS;
}

API Result cuMemAlloc_v2(Pointer* pointer, size_t bytes) {
    LOCKED;
    if (!current) return INVALID_CONTEXT;
    NOT_WHILE_CAPTURING;
    if (bytes == 0) return INVALID_VALUE;
    if (current->used_bytes + bytes > current->total_bytes) return OUT_OF_MEMORY;
    size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return OUT_OF_MEMORY;
    auto* mapped = static_cast<unsigned char*>(memory);
    mprotect(mapped + whole, page, PROT_NONE);
    std::memset(mapped, 0xff, whole);
    // As near to the end as 256 bytes let it, which is what a GPU's memory is aligned to.
    Pointer start = (reinterpret_cast<Pointer>(mapped) + whole - bytes) / 256 * 256;
    allocations[start] = {mapped, whole + page, bytes, current};
    current->used_bytes += bytes;
    *pointer = start;
    return SUCCESS;
}

API Result cuMemFree_v2(Pointer pointer) {
    LOCKED;
    NOT_WHILE_CAPTURING;
    auto found = allocations.find(pointer);
    if (found == allocations.end()) return INVALID_VALUE;
    found->second.device->used_bytes -= found->second.bytes;
    munmap(found->second.mapped, found->second.mapped_bytes);
    allocations.erase(found);
    return SUCCESS;
}

API Result cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    *pointer = std::malloc(bytes);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}
API Result cuMemFreeHost(void* pointer) { return std::free(pointer), SUCCESS; }

API Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
    LOCKED;
    return queue(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
}
API Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
    LOCKED;
    return queue(stream, [=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); });
}
API Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) {
    LOCKED;
    return queue(stream, [=] { std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}
API Result cuMemcpyPeerAsync(Pointer to, void*, Pointer from, void*, size_t bytes, void* stream) {
    return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}
API Result cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void* stream) {
    LOCKED;
    return queue(stream, [=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
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

// What another program leaves of the memory, in the middle of everything.
static void be_robbed() {
    static const char* left = std::getenv("EMULATED_LEFT");
    static const char* when = left ? std::strchr(left, '@') : nullptr;
    if (!when || ++launches != std::strtoull(when + 1, nullptr, 10)) return;
    size_t bytes = std::strtoull(left, nullptr, 10);
    for (Device& device : devices()) device.used_bytes = std::max(device.used_bytes, device.total_bytes - bytes);
}

API Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                          unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void**) {
    LOCKED;
    auto& launched = *static_cast<Function*>(function);
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || shared_bytes > launched.shared_bytes) return INVALID_VALUE;
    be_robbed();
    Dim3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    const emulated::Kernel& kernel = *launched.kernel;
    auto call = kernel.bind(arguments);
    return queue(stream, [=, &kernel] { emulated::run_grid(kernel, grid, block, shared_bytes, call); });
}

API Result cuGetErrorName(Result error, const char** name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}
API Result cuGetErrorString(Result, const char** text) { return *text = "the emulator refuses", SUCCESS; }
