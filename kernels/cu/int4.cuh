// How weights of 4 bits lie on a device.
//
// They are kept above themselves by 8, as 0 to 15, in tiles of 16 columns of out and 64 of K, which are as a warp multiplies
// with them: 16 bytes for each lane. With g = lane / 4 and t = lane % 4, word j of a lane has what belongs to K = 16 j of the
// tile, in four pairs, the even K of a pair at bit 4 · pair and the odd one 16 bits above it:
//   pair 0: (K 2t and 2t+1, column g), pair 1: (2t+8 and 2t+9, g), pairs 2 and 3: the same of column g + 8.
// Tiles of the same columns follow each other in K. Every column has a scale for each GROUP of K, [groups, stride] in 16 bits.
#pragma once

#include "num.cuh"

// K that shares a scale.
constexpr u32 GROUP = 128;
// A tile.
constexpr u32 TILE_COLS = 16, TILE_K = 64, TILE_WORDS = 128;

// Word `word` of a tile, of weights that `at(column, k)` gives.
template <typename At>
DEVICE u32 tile_word(u32 word, At at) {
    u32 lane = word / 4, j = word % 4;
    u32 packed = 0;
#pragma unroll
    for (u32 pair = 0; pair < 4; pair++) {
#pragma unroll
        for (u32 odd = 0; odd < 2; odd++) {
            u32 column = pair / 2 * 8 + lane / 4, k = j * 16 + pair % 2 * 8 + lane % 4 * 2 + odd;
            packed |= at(column, k) << (4 * pair + 16 * odd);
        }
    }
    return packed;
}
