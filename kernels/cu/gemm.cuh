// What matrix products share: out = x · wᵀ, or out += x · wᵀ, or sums that go on from out, with sums in f32; x [rows, stride],
// out [rows, cols]. What w is says a type, `Weights`: how a step of it comes into a block's memory, how fragments are made of
// it, and what becomes of a step's sums.
//
// Every number is one sum over K in steps of 16, in order, whatever the tile is: a row has the same bits in any batch, and
// tiles of any shape give the same. Rows of x are padded with zeros to whole chunks.
// Blocks in x share the rows of w that one in y stands for, so that w comes from memory once.
#pragma once

#include "mma.cuh"

// K of a step through a block's memory.
constexpr u32 STEP = 64;
constexpr u32 THREADS = 256;
constexpr u32 STRIDE = tile_stride<STEP>();

// What becomes of what out held before, beside nothing: Onto of gemm.rs.
constexpr u32 ADD = 1, GO_ON = 2;

// Steps under way at once, where a block takes so many columns: steps of few are short beside the time that a copy takes.
template <u32 COLS>
DEVICE constexpr u32 steps_at_once() {
    return COLS < 128 ? 6 : 3;
}

// Fragments of columns that a warp has across, where a block takes so many columns, with so many warps one below the other.
template <u32 COLS, u32 WARPS_DOWN>
DEVICE constexpr u32 fragments_across() {
    return COLS / (THREADS / WARP / WARPS_DOWN) / 8;
}

// Begins to copy `num_rows` rows of a step; what lies outside is zero.
DEVICE void copy_rows(bf16* tile, const bf16* from, u32 num_rows, u32 first, u32 rows, u32 k, u32 depth, u32 stride) {
    for (u32 chunk = threadIdx.x; chunk < num_rows * (STEP / CHUNK); chunk += THREADS) {
        u32 row = chunk / (STEP / CHUNK), column = chunk % (STEP / CHUNK) * CHUNK;
        bool is_there = first + row < rows && k + column < depth;
        u64 at = is_there ? u64(first + row) * stride + k + column : 0;
        copy_chunk(tile + row * STRIDE + column, from + at, is_there);
    }
}

// A block's ROWS x COLS numbers, by WARPS_DOWN x WARPS_ACROSS warps.
//
// Weights has
//   COLS, columns of out that a block takes;
//   TILE, how many numbers of 16 bits a step takes of a block's memory, a multiple of 8;
//   UNROLLED, how many 16 of K a step's loop is unrolled by: 4 are all;
//   copy(tile, first_col, cols, step): begins to copy a step of the block's columns;
//   begin(tile, first_col, across, lane, step): before a step's products, of the warp's columns from `across` on;
//   fragments(b, tile, j, k): those of two neighbours of eight columns, the j-th and the next, at K = k of the step;
//   multiply(c, a, b0, b1): adds a product of fragments to c;
//   close(sums, part, step, steps): after a step, whose products stand in `part`; IS_PLAIN where they are sums at once;
//   finish(sum, row, col): what becomes of a sum before it is stored or added.
template <u32 ROWS, u32 WARPS_DOWN, typename Weights>
DEVICE void multiply(float* out, const bf16* x, Weights w, u32 rows, u32 cols, u32 x_stride, u32 depth, u32 out_stride, u32 mode) {
    constexpr u32 COLS = Weights::COLS, STAGES = steps_at_once<COLS>();
    constexpr u32 WARPS_ACROSS = THREADS / WARP / WARPS_DOWN;
    constexpr u32 DOWN = ROWS / WARPS_DOWN / 16, ACROSS = fragments_across<COLS, WARPS_DOWN>();
    static_assert(ACROSS % 2 == 0, "two columns of fragments are loaded at once");
    DYNAMIC_SHARED(memory);
    bf16* x_tiles = reinterpret_cast<bf16*>(memory);
    bf16* w_tiles = x_tiles + STAGES * ROWS * STRIDE;

    u32 first_row = blockIdx.x * ROWS, first_col = blockIdx.y * COLS;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 down = warp / WARPS_ACROSS * DOWN * 16, across = warp % WARPS_ACROSS * ACROSS * 8;
    u32 steps = (depth + STEP - 1) / STEP;

    auto copy_step = [&](u32 step) {
        if (step < steps) {
            u32 stage = step % STAGES;
            copy_rows(x_tiles + stage * ROWS * STRIDE, x, ROWS, first_row, rows, step * STEP, depth, x_stride);
            w.copy(w_tiles + stage * Weights::TILE, first_col, cols, step);
        }
        close_copies();
    };
    for (u32 step = 0; step < STAGES - 1; step++) copy_step(step);

    float sums[DOWN][ACROSS][4] = {};
    float part[DOWN][ACROSS][4] = {};
    // What out holds becomes sums, or sums become, or are added to, what out holds.
    enum Move { READ, STORE, ADD_TO };
    auto move = [&](Move what) {
#pragma unroll
        for (u32 i = 0; i < DOWN; i++) {
#pragma unroll
            for (u32 j = 0; j < ACROSS; j++) {
#pragma unroll
                for (u32 n = 0; n < 4; n++) {
                    u32 row = first_row + down + i * 16 + lane / 4 + n / 2 * 8;
                    u32 col = first_col + across + j * 8 + lane % 4 * 2 + n % 2;
                    if (row >= rows || col >= cols) continue;
                    float* at = out + u64(row) * out_stride + col;
                    if (what == READ) sums[i][j][n] = *at;
                    else if (what == STORE) *at = w.finish(sums[i][j][n], row, col);
                    else *at += w.finish(sums[i][j][n], row, col);
                }
            }
        }
    };
    if (mode == GO_ON) move(READ);
    for (u32 step = 0; step < steps; step++) {
        await_copies<STAGES - 2>();
        __syncthreads(); // This step is there for all, and the one before is done with by all.
        copy_step(step + STAGES - 1);
        const bf16* x_tile = x_tiles + step % STAGES * ROWS * STRIDE;
        const bf16* w_tile = w_tiles + step % STAGES * Weights::TILE;
        w.begin(w_tile, first_col, across, lane, step);
#pragma unroll Weights::UNROLLED
        for (u32 k = 0; k < STEP; k += 16) {
            u32 a[DOWN][4];
#pragma unroll
            for (u32 i = 0; i < DOWN; i++) {
                load_matrices(a[i], x_tile + (down + i * 16 + lane % 16) * STRIDE + k + lane / 16 * 8);
            }
#pragma unroll
            for (u32 j = 0; j < ACROSS; j += 2) {
                u32 b[4];
                w.fragments(b, w_tile, j, k);
#pragma unroll
                for (u32 i = 0; i < DOWN; i++) {
                    float(&low)[4] = Weights::IS_PLAIN ? sums[i][j] : part[i][j];
                    float(&high)[4] = Weights::IS_PLAIN ? sums[i][j + 1] : part[i][j + 1];
                    w.multiply(low, a[i], b[0], b[1]);
                    w.multiply(high, a[i], b[2], b[3]);
                }
            }
        }
        if (!Weights::IS_PLAIN) w.close(sums, part, step, steps);
    }
    await_copies<0>(); // Nothing is under way any more when the block ends.

    move(mode == ADD ? ADD_TO : STORE);
}
