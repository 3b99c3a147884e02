// A libcublasLt for the emulator's memory: what the CUDA backend calls of it, by plain loops, queued as a kernel is.
//
// It has several algorithms, which sum in unlike orders, as those of the library do. One is offered and then refuses to start.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "queues.h"

#define API extern "C" __attribute__((visibility("default")))
using Status = int;
// A preference without a size of the workspace: the backend always says one, none at all among them.
constexpr uint64_t UNSET = ~uint64_t(0);
constexpr Status SUCCESS = 0, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15;

namespace {

// cudaDataType.
constexpr int F32 = 0, BF16 = 14, E4M3 = 28;
constexpr int COMPUTE_32F = 68;
constexpr int TRANSPOSED = 1;
constexpr uintptr_t ALIGNMENT = 256;
// cublasLtMatmulDescAttributes_t.
constexpr int TRANSA = 3, TRANSB = 4, A_SCALES = 17, B_SCALES = 18, A_SCALE_MODE = 31, B_SCALE_MODE = 32;
// cublasLtMatmulMatrixScale_t: one in f32 for each row of A, or column of B.
constexpr int OUTER_VECTOR = 3;

struct Descriptor {
    int compute_type, scale_type, is_a_transposed, is_b_transposed, a_scale_mode, b_scale_mode;
    const float *a_scales, *b_scales;
};

// Columns after columns.
struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t stride;
};

struct Preference {
    uint64_t workspace_bytes;
};

struct Algorithm {
    uint64_t words[8];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    Status state;
    float waves;
    int reserved[4];
};

// Algorithms count from 1. This one says it works, and does not start.
constexpr uint64_t NUM_ALGORITHMS = 3, BROKEN = 2;

float bf16_at(const void* numbers, uint64_t index) {
    uint32_t bits = uint32_t(static_cast<const uint16_t*>(numbers)[index]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float fp8_at(const void* numbers, uint64_t index) {
    unsigned code = static_cast<const uint8_t*>(numbers)[index], exponent = code >> 3 & 15, fraction = code & 7;
    if ((code & 0x7f) == 0x7f) return NAN;
    float value = exponent == 0 ? std::ldexp(float(fraction), -9) : std::ldexp(float(8 + fraction), int(exponent) - 10);
    return code & 0x80 ? -value : value;
}

// What the backend asks for, and nothing else is known here.
bool is_known(const Descriptor& product, const Layout& a, const Layout& b, const Layout& out) {
    bool is_f32 = product.compute_type == COMPUTE_32F && product.scale_type == F32 && out.type == F32;
    bool are_shapes = a.rows == b.rows && a.cols == out.rows && b.cols == out.cols;
    bool are_strides = a.stride >= int64_t(a.rows) && b.stride >= int64_t(b.rows) && out.stride >= int64_t(out.rows);
    bool are_aligned = a.stride % 8 == 0 && b.stride % 8 == 0;
    bool is_fp8 = a.type == E4M3 && b.type == E4M3 && a.stride % 16 == 0 && b.stride % 16 == 0 && a.rows % 16 == 0 &&
                  out.rows % 16 == 0 && product.a_scale_mode == OUTER_VECTOR && product.b_scale_mode == OUTER_VECTOR;
    return is_f32 && are_shapes && are_strides && are_aligned && product.is_a_transposed && !product.is_b_transposed &&
           (is_fp8 || (a.type == BF16 && b.type == BF16));
}

}  // namespace

API size_t cublasLtGetVersion() { return 130100; }
API Status cublasLtCreate(void** handle) { return *handle = new int(0), SUCCESS; }
API Status cublasLtDestroy(void* handle) { return delete static_cast<int*>(handle), SUCCESS; }

API Status cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t cols, int64_t stride) {
    return *layout = new Layout{type, rows, cols, stride}, SUCCESS;
}
API Status cublasLtMatrixLayoutDestroy(void* layout) { return delete static_cast<Layout*>(layout), SUCCESS; }

API Status cublasLtMatmulDescCreate(void** product, int compute_type, int scale_type) {
    return *product = new Descriptor{compute_type, scale_type, 0, 0, 0, 0, nullptr, nullptr}, SUCCESS;
}
API Status cublasLtMatmulDescSetAttribute(void* product, int attribute, const void* value, size_t bytes) {
    auto& descriptor = *static_cast<Descriptor*>(product);
    if (attribute == A_SCALES || attribute == B_SCALES) {
        if (bytes != sizeof(void*)) return INVALID_VALUE;
        return std::memcpy(attribute == A_SCALES ? &descriptor.a_scales : &descriptor.b_scales, value, bytes), SUCCESS;
    }
    int number;
    if (bytes != sizeof(number)) return INVALID_VALUE;
    std::memcpy(&number, value, sizeof(number));
    switch (attribute) {
        case TRANSA: descriptor.is_a_transposed = number == TRANSPOSED; return SUCCESS;
        case TRANSB: descriptor.is_b_transposed = number == TRANSPOSED; return SUCCESS;
        case A_SCALE_MODE: descriptor.a_scale_mode = number; return SUCCESS;
        case B_SCALE_MODE: descriptor.b_scale_mode = number; return SUCCESS;
        default: return INVALID_VALUE;
    }
}
API Status cublasLtMatmulDescDestroy(void* product) { return delete static_cast<Descriptor*>(product), SUCCESS; }

API Status cublasLtMatmulPreferenceCreate(void** preference) { return *preference = new Preference{UNSET}, SUCCESS; }
API Status cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
    if (attribute != 1 || bytes != sizeof(uint64_t)) return INVALID_VALUE; // Most bytes of the workspace.
    return std::memcpy(&static_cast<Preference*>(preference)->workspace_bytes, value, bytes), SUCCESS;
}
API Status cublasLtMatmulPreferenceDestroy(void* preference) { return delete static_cast<Preference*>(preference), SUCCESS; }

API Status cublasLtMatmulAlgoGetHeuristic(void*, void* product, void* a, void* b, void* c, void* d, void* preference, int most,
                                          Heuristic* results, int* count) {
    *count = 0;
    if (c != d || static_cast<Preference*>(preference)->workspace_bytes == UNSET) return INVALID_VALUE;
    if (!is_known(*static_cast<Descriptor*>(product), *static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(d))) {
        return NOT_SUPPORTED;
    }
    for (uint64_t id = 1; id <= NUM_ALGORITHMS && *count < most; id++) {
        results[(*count)++] = Heuristic{{{id}}, 0, SUCCESS, 1.0f, {}};
    }
    return SUCCESS;
}

API Status cublasLtMatmulAlgoCheck(void*, void* product, void* a, void* b, void*, void* d, const Algorithm* algorithm, Heuristic* result) {
    uint64_t id = algorithm->words[0];
    bool is_good = id >= 1 && id <= NUM_ALGORITHMS &&
                   is_known(*static_cast<Descriptor*>(product), *static_cast<Layout*>(a), *static_cast<Layout*>(b), *static_cast<Layout*>(d));
    *result = Heuristic{*algorithm, 0, is_good ? SUCCESS : NOT_SUPPORTED, 1.0f, {}};
    return result->state;
}

// outᵀ = alpha · A · Bᵀ + beta · c, as the algorithm sums it.
static void multiply(const Descriptor& descriptor, const Layout& left, const void* a, const Layout& right, const void* b, const Layout& out,
                     float* d, float alpha, float beta, const float* c, uint64_t id) {
    bool is_fp8 = left.type == E4M3;
    auto number = is_fp8 ? fp8_at : bf16_at;
    // The last algorithm has four sums that take turns.
    uint64_t num_sums = id == NUM_ALGORITHMS ? 4 : 1, rows = out.rows, depth = left.rows;
    // Sums of all rows side by side, from numbers that lie so.
    std::vector<float> numbers(depth * rows), sums(4 * rows);
    for (uint64_t row = 0; row < rows; row++) {
        for (uint64_t k = 0; k < depth; k++) numbers[k * rows + row] = number(a, row * left.stride + k);
    }
    for (uint64_t column = 0; column < out.cols; column++) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (uint64_t k = 0; k < depth; k++) {
            float* sum = sums.data() + k % num_sums * rows;
            const float* of_rows = numbers.data() + k * rows;
            float by = number(b, column * right.stride + k);
            for (uint64_t row = 0; row < rows; row++) sum[row] += of_rows[row] * by;
        }
        for (uint64_t row = 0; row < rows; row++) {
            float sum = alpha * ((sums[row] + sums[rows + row]) + (sums[2 * rows + row] + sums[3 * rows + row]));
            if (is_fp8) sum *= descriptor.a_scales[row] * descriptor.b_scales[column];
            uint64_t at = column * out.stride + row;
            // What is multiplied with nothing is not read.
            d[at] = beta == 0.0f ? sum : sum + beta * c[at];
        }
    }
}

API Status cublasLtMatmul(void*, void* product, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                          const float* beta, const float* c, void*, float* d, void* d_layout, const Algorithm* algorithm, void*, size_t,
                          void* stream) {
    Layout left = *static_cast<Layout*>(a_layout), right = *static_cast<Layout*>(b_layout), out = *static_cast<Layout*>(d_layout);
    Descriptor descriptor = *static_cast<Descriptor*>(product);
    if (!is_known(descriptor, left, right, out)) return NOT_SUPPORTED;
    if (left.type == E4M3 && (!descriptor.a_scales || !descriptor.b_scales)) return INVALID_VALUE;
    uint64_t id = algorithm->words[0];
    if (id == 0 || id > NUM_ALGORITHMS || id == BROKEN) return NOT_SUPPORTED;
    // As a preference promises that says nothing else.
    for (const void* matrix : {a, b, static_cast<const void*>(c), static_cast<const void*>(d)}) {
        if (reinterpret_cast<uintptr_t>(matrix) % ALIGNMENT != 0) return INVALID_VALUE;
    }
    // Numbers of the host are read now, as the descriptors are.
    float by = *alpha, of_old = *beta;
    int queued = emulated_queue(stream, [=] {
        multiply(descriptor, left, a, right, b, out, d, by, of_old, c, id);
        return emulated::Outcome::Done;
    });
    return queued == 0 ? SUCCESS : EXECUTION_FAILED;
}
