// Turning: dimension j of a head together with j + head_dim / 2. Nothing is fused, so that all who turn a pair have the same bits.
#pragma once

#include "num.cuh"

// What becomes of the first of a pair and of the second.
DEVICE float turned_first(float a, float b, float cos, float sin) {
    return add_rounded(multiply_rounded(a, cos), -multiply_rounded(b, sin));
}
DEVICE float turned_second(float a, float b, float cos, float sin) {
    return add_rounded(multiply_rounded(b, cos), multiply_rounded(a, sin));
}

// Turns a pair in place, whose second number lies `half` behind the first.
DEVICE void turn(float* at, u32 half, float cos, float sin) {
    float a = at[0], b = at[half];
    at[0] = turned_first(a, b, cos, sin);
    at[half] = turned_second(a, b, cos, sin);
}
