// Integers of 4 bits as checkpoints have them, eight of a row in a word, lowest first, [rows, from_stride] words, are put into
// tiles as int4.cuh has them. A block takes a tile, a thread a word.
#include "int4.cuh"

KERNEL(TILE_WORDS) shuffle_int4(u32* words, const u32* from, u32 rows, u32 cols, u32 from_stride, u32 k_tiles) {
    u32 first_row = blockIdx.y * TILE_COLS, first_k = blockIdx.x * TILE_K;
    auto at = [&](u32 column, u32 k) {
        u32 row = first_row + column;
        k += first_k;
        return row < rows && k < cols ? from[u64(row) * from_stride + k / 8] >> (k % 8 * 4) & 15u : 8u;
    };
    words[(u64(blockIdx.y) * k_tiles + blockIdx.x) * TILE_WORDS + threadIdx.x] = tile_word(threadIdx.x, at);
}
