// out[t] = x[t] / sqrt(mean(x[t]²) + eps) ∘ weight, rounded to bf16. A block takes a row, and reads it twice: the
// second time from the cache. Where products are of E4M3 it writes that as well, as quantize_fp8.cu does of the same numbers.
#include "fp8.cuh"

constexpr u32 THREADS = 256;

// What a row is multiplied with.
DEVICE float row_scale(const float* row, float eps, u32 cols, float* scratch) {
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < cols; i += THREADS) squares += row[i] * row[i];
    squares = block_sum<THREADS>(squares, scratch);
    return 1.0f / sqrtf(squares / float(cols) + eps);
}

// Two numbers of a row from `i` on; what pads it is zero.
DEVICE u32 normed(const float* row, const float* weight, float scale, u32 i, u32 cols) {
    float low = i < cols ? row[i] * scale * weight[i] : 0.0f;
    float high = i + 1 < cols ? row[i + 1] * scale * weight[i + 1] : 0.0f;
    return pack_bf16(low, high);
}

KERNEL(THREADS) rms_norm(bf16* out, const float* x, const float* weight, float eps, u32 cols, u32 stride) {
    __shared__ float scratch[THREADS / WARP];
    const float* row = x + u64(blockIdx.x) * cols;
    float scale = row_scale(row, eps, cols, scratch);
    u32* to = reinterpret_cast<u32*>(out + u64(blockIdx.x) * stride);
    for (u32 i = 2 * threadIdx.x; i < stride; i += 2 * THREADS) to[i / 2] = normed(row, weight, scale, i, cols);
}

KERNEL(THREADS)
rms_norm_fp8(bf16* out, const float* x, const float* weight, float eps, u32 cols, u32 stride, u32* codes, float* scales) {
    __shared__ float scratch[THREADS / WARP];
    __shared__ u32 largest_scratch[THREADS / WARP];
    const float* row = x + u64(blockIdx.x) * cols;
    float scale = row_scale(row, eps, cols, scratch);
    bf16* to = out + u64(blockIdx.x) * stride;
    u32 largest = 0;
    for (u32 i = 4 * threadIdx.x; i < stride; i += 4 * THREADS) {
#pragma unroll
        for (u32 n = 0; n < 4; n += 2) {
            u32 pair = normed(row, weight, scale, i + n, cols);
            largest = largest_of(largest, pair);
            reinterpret_cast<u32*>(to)[(i + n) / 2] = pair;
        }
    }
    u64 row_words = (cols + 15) / 16 * 4;
    code_row<THREADS>(codes + blockIdx.x * row_words, scales + blockIdx.x, to, cols, largest, largest_scratch);
}
