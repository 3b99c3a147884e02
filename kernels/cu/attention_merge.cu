// Makes one result of the parts that attention_decode leaves of a row. A block takes a row and a query head.
#include "num.cuh"

constexpr u32 GROUP = 16;

// A row, and how much it sees: DecodeRow of attention.rs.
struct Row {
    u32 row;
    u32 num_keys;
    u32 pages;
};

KERNEL(128)
attention_merge(bf16* out, const float* partial, const float* maxima, const float* sums, const Row* rows, u32 heads,
                u32 kv_heads, u32 head_dim, u32 padded, u32 num_parts, u32 out_stride) {
    u32 head = blockIdx.y, group = heads / kv_heads;
    u64 base = (u64(blockIdx.x) * kv_heads + head / group) * num_parts * GROUP + head % group;
    float max = f32_of_bits(0xff800000u);
    for (u32 part = 0; part < num_parts; part++) max = fmaxf(max, maxima[base + part * GROUP]);
    // All scores may be minus infinity, or no number.
    float base_max = max == f32_of_bits(0xff800000u) ? 0.0f : max;
    bf16* to = out + u64(rows[blockIdx.x].row) * out_stride + head * head_dim;
    for (u32 d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float sum = 0.0f, value = 0.0f;
        for (u32 part = 0; part < num_parts; part++) {
            u64 at = base + part * GROUP;
            float share = exp2f(maxima[at] - base_max);
            sum += sums[at] * share;
            value += partial[at * padded + d] * share;
        }
        to[d] = bf16_of(value / sum);
    }
}
