// out[t] = table[tokens[t]]. A block takes a row.
//
// Of a token with its highest bit set the rest says which of `drawn` it is: what the step before has drawn, where it drew any.
#include "num.cuh"

constexpr u32 FED = 1u << 31;
constexpr u32 NO_TOKEN = 0xffffffffu;

KERNEL(256) embed(float* out, const bf16* table, const u32* tokens, const u32* drawn, u32 hidden, u32 stride) {
    u32 token = tokens[blockIdx.x];
    if (token & FED) {
        token = drawn[token & ~FED];
        // Nobody asks for what comes of it.
        if (token == NO_TOKEN) token = 0;
    }
    const bf16* row = table + u64(token) * stride;
    float* to = out + u64(blockIdx.x) * hidden;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = f32_of(row[i]);
}
