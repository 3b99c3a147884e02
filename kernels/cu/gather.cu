// out[i] = x[rows[i]]. A block takes a row.
#include "num.cuh"

KERNEL(256) gather(float* out, const float* x, const u32* rows, u32 cols) {
    const float* row = x + u64(rows[blockIdx.x]) * cols;
    float* to = out + u64(blockIdx.x) * cols;
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) to[i] = row[i];
}
