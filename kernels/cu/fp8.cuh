// Numbers of 8 bits, E4M3, as they are made: rows with a scale each, that takes the number of the largest magnitude to 448, rounded
// to nearest even. Where the scale would be denormal all are zeros; where a number is not finite it is NaN.
#pragma once

#include "num.cuh"

// The code of a number of no more than 448, or a little more by rounding.
DEVICE u32 fp8_code_of(float value) {
    u32 bits = bits_of_f32(value), magnitude = bits & 0x7fffffffu;
    // Below 2^-6 steps are of 2^-9; from there on 3 bits of fraction are kept, and the exponent's bias is 7.
    u32 code = magnitude < 0x3c800000u ? u32(rintf(f32_of_bits(magnitude) * 512.0f))
                                       : ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3);
    return min_of(code, 0x7eu) | (bits >> 24 & 0x80u);
}

// The largest of all THREADS threads of a block, which every thread has. `scratch` has room for a number of each warp, and may be
// used again after the next barrier.
template <u32 THREADS>
DEVICE u32 block_largest(u32 largest, u32* scratch) {
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) {
        u32 other = shuffle_xor(largest, mask);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = largest;
    __syncthreads();
#pragma unroll
    for (u32 warp = 0; warp < THREADS / WARP; warp++) largest = scratch[warp] > largest ? scratch[warp] : largest;
    return largest;
}

// How a row becomes codes, whose largest magnitude has such bits.
struct RowScale {
    float scale, inverse;
    bool is_finite;

    DEVICE explicit RowScale(u32 largest) {
        constexpr float LARGEST = 448.0f, SMALLEST = 1.17549435e-38f;
        bool is_zero = largest < bits_of_f32(LARGEST * SMALLEST);
        is_finite = largest < 0x7f800000u;
        float most = f32_of_bits(largest);
        inverse = is_zero || !is_finite ? 0.0f : LARGEST / most;
        scale = is_zero ? 0.0f : is_finite ? most / LARGEST : f32_of_bits(0x7fc00000u);
    }

    DEVICE u32 code(float value) const { return is_finite ? fp8_code_of(value * inverse) : 0; }
};

// A row of bf16 that the threads of a block have made, four numbers in turn from the first: its codes, padded with zeros to 16
// bytes, and its scale. `largest` is the bits of the largest magnitude that this thread has made; what it made it reads again.
template <u32 THREADS>
DEVICE void code_row(u32* codes, float* scale, const bf16* row, u32 cols, u32 largest, u32* scratch) {
    RowScale kept(block_largest<THREADS>(largest, scratch));
    if (threadIdx.x == 0) *scale = kept.scale;
    for (u32 i = 4 * threadIdx.x; i < (cols + 15) / 16 * 16; i += 4 * THREADS) {
        u32 word = 0;
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            if (i + n < cols) word |= kept.code(f32_of(row[i + n])) << (8 * n);
        }
        codes[i / 4] = word;
    }
}

// The larger magnitude's bits, of those so far and of a pair of bf16.
DEVICE u32 largest_of(u32 largest, u32 pair) {
    u32 low = pair << 16 & 0x7fffffffu, high = pair & 0x7fff0000u;
    largest = low > largest ? low : largest;
    return high > largest ? high : largest;
}
