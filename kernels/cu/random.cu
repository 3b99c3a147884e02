// Uniform numbers between -half_width and half_width in bf16, rows padded with zeros to `stride`: RandomTensor of
// random_tensor.rs, whose numbers these are to the bit. A block takes a row.
#include "num.cuh"

KERNEL(256) random_uniform(bf16* out, u64 seed, float half_width, u64 first, u64 whole_cols, u32 cols, u32 stride) {
    u64 place = seed + first + blockIdx.x * whole_cols;
    bf16* row = out + u64(blockIdx.x) * stride;
    for (u32 i = threadIdx.x; i < stride; i += blockDim.x) {
        u64 z = (place + i) * 0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        // 24 bits, so that nothing is rounded before the last product.
        float unit = float(u32(z >> 40)) * 5.9604644775390625e-8f;
        row[i] = i < cols ? bf16_of((2.0f * unit - 1.0f) * half_width) : bf16(0);
    }
}
