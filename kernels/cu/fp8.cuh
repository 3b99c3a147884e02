// Numbers of 8 bits, E4M3, as they are made.
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
