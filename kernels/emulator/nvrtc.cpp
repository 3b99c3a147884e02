// A libnvrtc that compiles nothing: the kernels are in the emulator's libcuda already, and a cubin says which of them is
// meant by the width of a head.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#define API extern "C" __attribute__((visibility("default")))

// EMULATED_COMPILER=13000 is the CUDA that it is of, 0.0 if not set.
API int nvrtcVersion(int* major, int* minor) {
    const char* text = std::getenv("EMULATED_COMPILER");
    int version = text ? std::atoi(text) : 0;
    return *major = version / 1000, *minor = version % 1000 / 10, 0;
}
API int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
    return *program = new std::string("emulated 0"), 0;
}
API int nvrtcCompileProgram(void* program, int count, const char* const* options) {
    for (int i = 0; i < count; i++) {
        if (!std::strncmp(options[i], "-DHEAD_DIM=", 11)) *static_cast<std::string*>(program) = std::string("emulated ") + (options[i] + 11);
    }
    return 0;
}
API int nvrtcGetCUBINSize(void* program, size_t* size) { return *size = static_cast<std::string*>(program)->size() + 1, 0; }
API int nvrtcGetCUBIN(void* program, char* cubin) {
    std::string* text = static_cast<std::string*>(program);
    return std::memcpy(cubin, text->c_str(), text->size() + 1), 0;
}
API int nvrtcGetProgramLogSize(void*, size_t* size) { return *size = 1, 0; }
API int nvrtcGetProgramLog(void*, char* log) { return *log = 0, 0; }
API int nvrtcDestroyProgram(void** program) { return delete static_cast<std::string*>(*program), *program = nullptr, 0; }
API const char* nvrtcGetErrorString(int) { return "no error"; }
