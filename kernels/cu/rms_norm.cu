// out[t] = x[t] / sqrt(mean(x[t]²) + eps) ∘ weight, rounded to bf16. A block takes a row, and reads it twice: the
// second time from the cache.
#include "num.cuh"

constexpr u32 THREADS = 256;

KERNEL(THREADS) rms_norm(bf16* out, const float* x, const float* weight, float eps, u32 cols, u32 stride) {
    __shared__ float scratch[THREADS / WARP];
    const float* row = x + u64(blockIdx.x) * cols;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < cols; i += THREADS) squares += row[i] * row[i];
    squares = block_sum<THREADS>(squares, scratch);
    float scale = 1.0f / sqrtf(squares / float(cols) + eps);
    u32* to = reinterpret_cast<u32*>(out + u64(blockIdx.x) * stride);
    // A pair at a time; what pads a row is zero.
    for (u32 i = 2 * threadIdx.x; i < stride; i += 2 * THREADS) {
        float low = i < cols ? row[i] * scale * weight[i] : 0.0f;
        float high = i + 1 < cols ? row[i + 1] * scale * weight[i + 1] : 0.0f;
        to[i / 2] = pack_bf16(low, high);
    }
}
