// What ranks do with each other's numbers. A thread takes a number.
#include "num.cuh"

// x = rank 0's numbers + rank 1's + ..., in this order: the sum has the same bits at every call and on every rank.
// This rank's own numbers are in x, those of rank r in parts[r * stride ..].
KERNEL(256) sum_ranks(float* x, const float* parts, u64 stride, u32 num_ranks, u32 own, u64 count) {
    u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = own == 0 ? x[i] : parts[i];
    for (u32 rank = 1; rank < num_ranks; rank++) sum += rank == own ? x[i] : parts[rank * stride + i];
    x[i] = sum;
}

// Puts a part [rows, cols] to column `before` of out, whose rows are `out_cols` long. Blocks in y are rows.
KERNEL(256) place_columns(float* out, const float* part, u32 cols, u32 before, u32 out_cols) {
    u32 col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col < cols) out[u64(blockIdx.y) * out_cols + before + col] = part[u64(blockIdx.y) * cols + col];
}
