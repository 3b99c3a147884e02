// A libcuda of GPUs that are none: what the CUDA backend calls of the driver. What is queued runs as queues.cpp says.
//
// Memory is the host's, filled with what is no number, ends at a page that nobody may touch, and is nobody's any more when it was
// freed. A module is what nvrtc.cpp makes: the width of a head.
//
// The environment says what the machine is like, for tests of what happens on others:
//   EMULATED_GPUS=2                 how many there are, 1 if not set
//   EMULATED_CAPABILITIES=90,80     what each can do, 90 (Hopper) if not set
//   EMULATED_NAMES=H100,A100        what each is called, "emulator" if not set
//   EMULATED_BYTES=100000000,2000   memory of each, the last one's also of those that come after
//   EMULATED_DRIVER=11040           the CUDA that the driver is for
//   EMULATED_LEFT=1000000@50        after so many launches another program leaves so many bytes of each
//   EMULATED_SEED=7                 draws the order of what runs beside each other, 1 if not set
#include <cstring>
#include <map>
#include <memory>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "block.h"
#include "driver.h"

// Never destroyed: threads of a program that ends may still be at work.
std::recursive_mutex& lock = *new std::recursive_mutex();
thread_local Device* current = nullptr;

unsigned long long number(const char* name, unsigned long long otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

namespace {

// Most memory of a thread block, as of an H100.
constexpr unsigned MOST_SHARED_BYTES = 227 << 10;
constexpr unsigned SHARED_BYTES = 48 << 10;

struct Allocation {
    unsigned char* mapped;
    size_t mapped_bytes, bytes;
    // Nothing where it is the host's, pinned.
    Device* device;
};

struct Function {
    const emulated::Kernel* kernel;
    unsigned shared_bytes;
};

std::map<Pointer, Allocation>& allocations = *new std::map<Pointer, Allocation>();
size_t launches = 0;

std::vector<Device>& devices() {
    static auto& all = *[] {
        auto* all = new std::vector<Device>();
        const char* capabilities = std::getenv("EMULATED_CAPABILITIES");
        const char* sizes = std::getenv("EMULATED_BYTES");
        for (int i = 0; i < int(number("EMULATED_GPUS", 1)); i++) {
            unsigned capability = 90;
            if (capabilities) {
                char* rest;
                capability = std::strtoul(capabilities, &rest, 10);
                if (*rest == ',') capabilities = rest + 1;
            }
            size_t bytes = 2ull << 30;
            if (sizes) {
                char* rest;
                bytes = std::strtoull(sizes, &rest, 10);
                if (*rest == ',') sizes = rest + 1;
            }
            all->push_back({i, capability, bytes, 0});
        }
        return all;
    }();
    return all;
}

// Memory that ends at a page that nobody may touch, as near to it as 256 bytes let it, which is what a GPU's memory is aligned to;
// 0 where there is none.
Pointer allocate(size_t bytes, Device* device) {
    size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 0;
    auto* mapped = static_cast<unsigned char*>(memory);
    mprotect(mapped + whole, page, PROT_NONE);
    std::memset(mapped, 0xff, whole);
    Pointer start = (reinterpret_cast<Pointer>(mapped) + whole - bytes) / 256 * 256;
    allocations[start] = {mapped, whole + page, bytes, device};
    return start;
}

// Its addresses are never given again: what still runs and uses it is to fail.
Result release(Pointer pointer, bool is_of_host) {
    auto found = allocations.find(pointer);
    if (found == allocations.end() || (found->second.device == nullptr) != is_of_host) return INVALID_VALUE;
    auto [mapped, mapped_bytes, bytes, device] = found->second;
    if (device) device->used_bytes -= bytes;
    mmap(mapped, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    allocations.erase(found);
    return SUCCESS;
}

bool is_pinned(const void* at) {
    Pointer address = reinterpret_cast<Pointer>(at);
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return false;
    auto& [start, allocation] = *std::prev(after);
    return !allocation.device && address < start + allocation.bytes;
}

template <typename To, typename From>
Result queue_copy(To to, From from, size_t bytes, void* stream) {
    return queue_once(stream, [=] { std::memmove((void*)to, (const void*)from, bytes); });
}

}  // namespace

API Result cuInit(unsigned) { return devices().empty() ? 100 : SUCCESS; }
API Result cuDriverGetVersion(int* version) { return *version = int(number("EMULATED_DRIVER", 13000)), SUCCESS; }
API Result cuDeviceGetCount(int* count) { return *count = int(devices().size()), SUCCESS; }
API Result cuDeviceGet(int* device, int ordinal) {
    if (ordinal < 0 || size_t(ordinal) >= devices().size()) return INVALID_DEVICE;
    return *device = ordinal, SUCCESS;
}
API Result cuDeviceGetName(char* name, int length, int device) {
    const char* names = std::getenv("EMULATED_NAMES");
    if (!names) return std::snprintf(name, length, "emulator"), SUCCESS;
    for (; device > 0 && std::strchr(names, ','); device--) names = std::strchr(names, ',') + 1;
    return std::snprintf(name, length, "%.*s", int(std::strcspn(names, ",")), names), SUCCESS;
}
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

API Result cuDevicePrimaryCtxSetFlags_v2(int, unsigned) { return SUCCESS; }
API Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &devices()[device], SUCCESS; }
API Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API Result cuCtxSetCurrent(void* context) { return current = static_cast<Device*>(context), SUCCESS; }
API int emulated_device() { return current ? current->index : -1; }
API Result cuCtxSynchronize() {
    LOCKED;
    NOT_WHILE_CAPTURING;
    return current ? drain_all(guard, current) : INVALID_CONTEXT;
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
    if (!(*pointer = allocate(bytes, current))) return OUT_OF_MEMORY;
    return current->used_bytes += bytes, SUCCESS;
}

// As the driver's does, it waits for all that the memory's device is at, whoever has queued that.
API Result cuMemFree_v2(Pointer pointer) {
    LOCKED;
    NOT_WHILE_CAPTURING;
    auto found = allocations.find(pointer);
    if (found == allocations.end() || !found->second.device) return INVALID_VALUE;
    drain_all(guard, found->second.device);
    return release(pointer, false);
}

API Result cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    LOCKED;
    NOT_WHILE_CAPTURING;
    *pointer = reinterpret_cast<void*>(bytes ? allocate(bytes, nullptr) : 0);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}
API Result cuMemFreeHost(void* pointer) {
    LOCKED;
    NOT_WHILE_CAPTURING;
    return release(reinterpret_cast<Pointer>(pointer), true);
}

// Pinned memory is read when the copy runs, and so is any in a graph; other memory is read before this returns.
API Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t bytes, void* stream) {
    LOCKED;
    if (is_pinned(from) || is_captured(stream)) return queue_copy(to, from, bytes, stream);
    auto* start = static_cast<const unsigned char*>(from);
    auto staged = std::make_shared<std::vector<unsigned char>>(start, start + bytes);
    return queue_once(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), staged->data(), bytes); });
}
// What is not pinned has arrived when this returns.
API Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t bytes, void* stream) {
    LOCKED;
    Result queued = queue_copy(to, from, bytes, stream);
    if (queued != SUCCESS || is_pinned(to) || is_captured(stream)) return queued;
    return drain(guard, stream);
}
API Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t bytes, void* stream) {
    LOCKED;
    return queue_copy(to, from, bytes, stream);
}
API Result cuMemcpyPeerAsync(Pointer to, void*, Pointer from, void*, size_t bytes, void* stream) {
    return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}
API Result cuMemsetD8Async(Pointer to, unsigned char value, size_t bytes, void* stream) {
    LOCKED;
    return queue_once(stream, [=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
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
    return queue_once(stream, [=, &kernel] { emulated::run_grid(kernel, grid, block, shared_bytes, call); });
}

API Result cuGetErrorName(Result error, const char** name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_UNKNOWN";
    return SUCCESS;
}
API Result cuGetErrorString(Result, const char** text) { return *text = "the emulator refuses", SUCCESS; }
