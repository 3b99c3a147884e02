// The largest logit of a row, its index, and ln Σ exp(logit - largest). A block takes a row.
//
// The index also goes to `tokens`, where there are any.
//
// Of equal ones the lowest index counts. A NaN is taken for the largest, so that it cannot pass unseen.
#include "num.cuh"

constexpr u32 THREADS = 512;

// As LogitStats of backend.rs.
struct Stats {
    u32 argmax;
    float max;
    float log_sum_exp;
};

DEVICE bool is_nan(float value) { return value != value; }

// Whether logit a at i comes before logit b at j.
DEVICE bool is_first(float a, u32 i, float b, u32 j) {
    if (is_nan(a) || is_nan(b)) return is_nan(a) && (!is_nan(b) || i < j);
    return a > b || (a == b && i < j);
}

KERNEL(THREADS) logit_stats(Stats* out, const float* logits, u32 cols, u32* tokens) {
    __shared__ float scratch[THREADS / WARP];
    __shared__ u32 indices[THREADS / WARP];
    __shared__ float sums[THREADS / WARP];
    const float* row = logits + u64(blockIdx.x) * cols;
    // Threads without a number of their own look at the first.
    u32 argmax = threadIdx.x < cols ? threadIdx.x : 0;
    float max = row[argmax];
    for (u32 i = threadIdx.x + THREADS; i < cols; i += THREADS) {
        if (is_first(row[i], i, max, argmax)) max = row[i], argmax = i;
    }
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        float other = shuffle_xor(max, mask);
        u32 index = shuffle_xor(argmax, mask);
        if (is_first(other, index, max, argmax)) max = other, argmax = index;
    }
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = max, indices[threadIdx.x / WARP] = argmax;
    __syncthreads();
    for (u32 warp = 0; warp < THREADS / WARP; warp++) {
        if (is_first(scratch[warp], indices[warp], max, argmax)) max = scratch[warp], argmax = indices[warp];
    }
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < cols; i += THREADS) sum += expf(row[i] - max);
    sum = block_sum<THREADS>(sum, sums);
    if (threadIdx.x == 0) {
        out[blockIdx.x] = Stats{argmax, max, logf(sum)};
        if (tokens) tokens[blockIdx.x] = argmax;
    }
}
