// Turns heads in place. A thread takes a pair.
#include "rope.cuh"

KERNEL(256) rope(float* x, const float* cos, const float* sin, const u32* positions, u32 num_heads, u32 half, u64 num_pairs) {
    u64 pair = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (pair >= num_pairs) return;
    u32 j = u32(pair % half);
    u64 head = pair / half;
    u64 angle = u64(positions[head / num_heads]) * half + j;
    turn(x + head * 2 * half + j, half, cos[angle], sin[angle]);
}
