// Weights become integers of 4 bits, by rounding to nearest even, in tiles as int4.cuh has them.
//
// In every group the number of the largest magnitude, the first of several, comes to -8; others that are as large to 7. The
// scale is rounded to bf16 before numbers are divided by it. Where it would be denormal, all are zeros; where a number is not
// finite it is NaN.
//
// A block takes 16 rows of the matrix and a group; sixteen threads have a row of it.
#include "int4.cuh"

constexpr u32 THREADS = 256;
// Numbers of a thread.
constexpr u32 EACH = GROUP / (THREADS / TILE_COLS);

DEVICE float number(const bf16* from, u64 at) { return f32_of(from[at]); }
DEVICE float number(const float* from, u64 at) { return from[at]; }
DEVICE u32 magnitude(float value) { return bits_of_f32(value) & 0x7fffffffu; }

template <typename Number>
DEVICE void quantize(u32* words, bf16* scales, const Number* from, u32 rows, u32 cols, u32 from_stride, u32 k_tiles, u32 stride,
                     unsigned char (&integers)[TILE_COLS][GROUP]) {
    u32 group = blockIdx.x, first_row = blockIdx.y * TILE_COLS;
    u32 row = threadIdx.x / 16, first = threadIdx.x % 16 * EACH;
    float values[EACH];
    float largest = 0.0f;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        u32 k = group * GROUP + first + i;
        values[i] = first_row + row < rows && k < cols ? number(from, u64(first_row + row) * from_stride + k) : 0.0f;
        if (magnitude(values[i]) > magnitude(largest)) largest = values[i];
    }
    // Of two threads the one before wins a tie, so that the first of several is found.
#pragma unroll
    for (u32 mask = 1; mask < 16; mask *= 2) {
        float other = shuffle_xor(largest, mask);
        bool is_before = (threadIdx.x & mask) != 0;
        bool wins = magnitude(other) > magnitude(largest) || (is_before && magnitude(other) == magnitude(largest));
        if (wins) largest = other;
    }
    constexpr float SMALLEST = 1.17549435e-38f;
    bool is_finite = magnitude(largest) < 0x7f800000u;
    bool is_zero = magnitude(largest) < bits_of_f32(8.0f * SMALLEST);
    bf16 scale = is_zero ? bf16(0) : is_finite ? bf16_of(-largest / 8.0f) : bf16(0x7fff);
    float inverse = is_zero || !is_finite ? 0.0f : 1.0f / f32_of(scale);
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
        float steps = is_finite ? values[i] * inverse : 0.0f;
        integers[row][first + i] = static_cast<unsigned char>(int(rintf(fminf(steps, 7.0f))) + 8);
    }
    if (first == 0) scales[u64(group) * stride + first_row + row] = scale;
    __syncthreads();
    u32 tile = threadIdx.x / TILE_WORDS, word = threadIdx.x % TILE_WORDS;
    if (group * 2 + tile >= k_tiles) return;
    u64 at = (u64(blockIdx.y) * k_tiles + group * 2 + tile) * TILE_WORDS + word;
    words[at] = tile_word(word, [&](u32 column, u32 k) { return u32(integers[column][tile * TILE_K + k]); });
}

KERNEL(THREADS)
quantize_int4_bf16(u32* words, bf16* scales, const bf16* from, u32 rows, u32 cols, u32 from_stride, u32 k_tiles, u32 stride) {
    __shared__ unsigned char integers[TILE_COLS][GROUP];
    quantize(words, scales, from, rows, cols, from_stride, k_tiles, stride, integers);
}

KERNEL(THREADS)
quantize_int4_f32(u32* words, bf16* scales, const float* from, u32 rows, u32 cols, u32 from_stride, u32 k_tiles, u32 stride) {
    __shared__ unsigned char integers[TILE_COLS][GROUP];
    quantize(words, scales, from, rows, cols, from_stride, k_tiles, stride, integers);
}
