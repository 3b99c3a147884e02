// Rows become E4M3 with a scale each, that takes the number of the largest magnitude to 448, rounded to nearest even. Where the
// scale would be denormal all are zeros; where a number is not finite it is NaN. A block takes a row, and reads it twice: the
// second time from the cache.
//
// Codes lie in chunks of columns, one after the other, each [all_rows, chunk], of which rows are padded with zeros to 16 bytes.
#include "fp8.cuh"

constexpr u32 THREADS = 256;
constexpr float LARGEST = 448.0f;

DEVICE float number(const bf16* from, u64 at) { return f32_of(from[at]); }
DEVICE float number(const float* from, u64 at) { return from[at]; }

template <typename Number>
DEVICE void quantize(u32* codes, float* scales, const Number* from, u32 first_row, u64 all_rows, u32 cols, u32 from_stride, u32 chunk,
                     u32 (&scratch)[THREADS / WARP]) {
    const Number* row = from + u64(blockIdx.x) * from_stride;
    u32 largest = 0;
    for (u32 i = threadIdx.x; i < cols; i += THREADS) {
        u32 magnitude = bits_of_f32(number(row, i)) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        u32 other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = largest;
    __syncthreads();
#pragma unroll
    for (u32 warp = 0; warp < THREADS / WARP; warp++) largest = scratch[warp] > largest ? scratch[warp] : largest;
    constexpr float SMALLEST = 1.17549435e-38f;
    bool is_zero = largest < bits_of_f32(LARGEST * SMALLEST), is_finite = largest < 0x7f800000u;
    float most = f32_of_bits(largest);
    float inverse = is_zero || !is_finite ? 0.0f : LARGEST / most;
    u64 row_idx = first_row + blockIdx.x;
    if (threadIdx.x == 0) scales[row_idx] = is_zero ? 0.0f : is_finite ? most / LARGEST : f32_of_bits(0x7fc00000u);
    u32 padded = (cols + 15) / 16 * 16;
    for (u32 i = 4 * threadIdx.x; i < padded; i += 4 * THREADS) {
        u32 word = 0;
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            if (i + n < cols && is_finite) word |= fp8_code_of(number(row, i + n) * inverse) << (8 * n);
        }
        u32 first = i / chunk * chunk;
        u64 at = all_rows * first + row_idx * min_of(chunk, padded - first) + (i - first);
        codes[at / 4] = word;
    }
}

KERNEL(THREADS)
quantize_fp8_bf16(u32* codes, float* scales, const bf16* from, u32 first_row, u64 all_rows, u32 cols, u32 from_stride, u32 chunk) {
    __shared__ u32 scratch[THREADS / WARP];
    quantize(codes, scales, from, first_row, all_rows, cols, from_stride, chunk, scratch);
}

KERNEL(THREADS)
quantize_fp8_f32(u32* codes, float* scales, const float* from, u32 first_row, u64 all_rows, u32 cols, u32 from_stride, u32 chunk) {
    __shared__ u32 scratch[THREADS / WARP];
    quantize(codes, scales, from, first_row, all_rows, cols, from_stride, chunk, scratch);
}
