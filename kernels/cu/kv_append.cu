// Writes a row's keys and values, rounded to bf16, to its place in the cache. A block takes a row and a KV head.
//
// The cache is [pages, kv_heads, 2, PAGE, padded]: keys of 64 positions, then values of the same; heads are padded
// with zeros to whole fragments.
#include "num.cuh"

KERNEL(128) kv_append(bf16* cache, const float* k, const float* v, const u32* places, u32 kv_heads, u32 head_dim, u32 padded) {
    u32 row = blockIdx.x, head = blockIdx.y;
    u32 page = places[row] / PAGE, slot = places[row] % PAGE;
    bf16* keys = cache + (u64(page) * kv_heads + head) * 2 * PAGE * padded + u64(slot) * padded;
    bf16* values = keys + PAGE * padded;
    u64 from = (u64(row) * kv_heads + head) * head_dim;
    for (u32 d = threadIdx.x; d < padded; d += blockDim.x) {
        keys[d] = d < head_dim ? bf16_of(k[from + d]) : bf16(0);
        values[d] = d < head_dim ? bf16_of(v[from + d]) : bf16(0);
    }
}
