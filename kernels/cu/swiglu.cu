// out = silu(gate) ∘ up for `width` columns of a wider row, rounded to bf16; what pads a row is zero. A thread takes a
// number, blocks in y take rows.
#include "num.cuh"

KERNEL(256) swiglu(bf16* out, const float* gate, const float* up, u32 width, u32 padded_width, u32 stride) {
    u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= padded_width) return;
    u64 row = blockIdx.y;
    float value = 0.0f;
    if (column < width) {
        float g = gate[row * width + column];
        value = g / (1.0f + expf(-g)) * up[row * width + column];
    }
    out[row * stride + column] = bf16_of(value);
}
