// out = silu(gate) ∘ up, rounded to bf16; what pads a row is zero.
#include "fp8.cuh"

DEVICE float gated(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// For `width` columns of a wider row. A thread takes a number, blocks in y take rows.
KERNEL(256) swiglu(bf16* out, const float* gate, const float* up, u32 width, u32 padded_width, u32 stride) {
    u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= padded_width) return;
    u64 row = blockIdx.y, at = row * width + column;
    out[row * stride + column] = bf16_of(column < width ? gated(gate[at], up[at]) : 0.0f);
}

constexpr u32 THREADS = 512;

// For all columns, and in E4M3 as well, as quantize_fp8.cu writes it of the same numbers. A block takes a row.
KERNEL(THREADS) swiglu_fp8(bf16* out, const float* gate, const float* up, u32 width, u32 stride, u32* codes, float* scales) {
    __shared__ u32 scratch[THREADS / WARP];
    u64 row = blockIdx.x;
    const float *gates = gate + row * width, *ups = up + row * width;
    bf16* to = out + row * stride;
    u32 largest = 0;
    for (u32 i = 4 * threadIdx.x; i < stride; i += 4 * THREADS) {
#pragma unroll
        for (u32 n = i; n < i + 4; n += 2) {
            float low = n < width ? gated(gates[n], ups[n]) : 0.0f;
            float high = n + 1 < width ? gated(gates[n + 1], ups[n + 1]) : 0.0f;
            u32 pair = pack_bf16(low, high);
            largest = largest_of(largest, pair);
            reinterpret_cast<u32*>(to)[n / 2] = pair;
        }
    }
    u64 row_words = (width + 15) / 16 * 4;
    code_row<THREADS>(codes + row * row_words, scales + row, to, width, largest, scratch);
}
