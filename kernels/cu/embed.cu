// out[t] = table[tokens[t]]. A block takes a row.
#include "num.cuh"

KERNEL(256) embed(float* out, const bf16* table, const u32* tokens, u32 hidden, u32 stride) {
    const bf16* row = table + u64(tokens[blockIdx.x]) * stride;
    float* to = out + u64(blockIdx.x) * hidden;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = f32_of(row[i]);
}
