// Rows become E4M3 with a scale each. A block takes a row, and reads it twice: the second time from the cache.
//
// Codes lie in chunks of columns, one after the other, each [all_rows, chunk], of which rows are padded with zeros to 16 bytes.
#include "fp8.cuh"

constexpr u32 THREADS = 256;

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
    RowScale kept(block_largest<THREADS>(largest, scratch));
    u64 row_idx = first_row + blockIdx.x;
    if (threadIdx.x == 0) scales[row_idx] = kept.scale;
    u32 padded = (cols + 15) / 16 * 16;
    for (u32 i = 4 * threadIdx.x; i < padded; i += 4 * THREADS) {
        u32 word = 0;
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            if (i + n < cols) word |= kept.code(number(row, i + n)) << (8 * n);
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
