// Products of E4M3 with a scale for each row of x and each row of w; strides and depth count pairs of numbers.
//
// What tensor cores add up within an instruction may be short of an f32's bits, so that every step's sums are added to f32
// ones. Scales are applied once, at the end: what out held before is added then.
#include "gemm.cuh"

template <u32 BLOCK_COLS, u32 DOWN, u32 ACROSS>
struct Fp8Weights {
    static constexpr u32 COLS = BLOCK_COLS;
    static constexpr bool IS_PLAIN = false;
    static constexpr u32 UNROLLED = 1;
    static constexpr u32 TILE = COLS * STRIDE;
    const bf16* pairs;
    u32 stride, depth;
    const float* x_scales;
    const float* w_scales;
    u32 row, column;

    DEVICE void copy(bf16* tile, u32 first_col, u32 cols, u32 step) const {
        copy_rows(tile, pairs, COLS, first_col, cols, step * STEP, depth, stride);
    }

    DEVICE void begin(const bf16*, u32, u32 across, u32 lane, u32) {
        row = across + lane % 8 + lane / 16 * 8;
        column = lane / 8 % 2 * 8;
    }

    DEVICE void fragments(u32 (&b)[4], const bf16* tile, u32 j, u32 k) const {
        load_matrices(b, tile + (row + j * 8) * STRIDE + k + column);
    }

    DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) const { mma_fp8(c, a, b0, b1); }

    DEVICE void close(float (&sums)[DOWN][ACROSS][4], float (&part)[DOWN][ACROSS][4], u32, u32) const {
#pragma unroll
        for (u32 i = 0; i < DOWN; i++) {
#pragma unroll
            for (u32 j = 0; j < ACROSS; j++) {
#pragma unroll
                for (u32 n = 0; n < 4; n++) sums[i][j][n] += part[i][j][n], part[i][j][n] = 0.0f;
            }
        }
    }

    DEVICE float finish(float sum, u32 row, u32 col) const { return sum * (x_scales[row] * w_scales[col]); }
};

#define GEMM(name, ROWS, COLS, WARPS_DOWN)                                                                              \
    KERNEL(THREADS)                                                                                                     \
    name(float* out, const bf16* x, const bf16* w, u32 rows, u32 cols, u32 x_stride, u32 w_stride, u32 depth,           \
         u32 out_stride, u32 mode, const float* x_scales, const float* w_scales) {                                      \
        Fp8Weights<COLS, ROWS / WARPS_DOWN / 16, fragments_across<COLS, WARPS_DOWN>()> weights;                         \
        weights.pairs = w, weights.stride = w_stride, weights.depth = depth;                                            \
        weights.x_scales = x_scales, weights.w_scales = w_scales;                                                       \
        multiply<ROWS, WARPS_DOWN>(out, x, weights, rows, cols, x_stride, depth, out_stride, mode == GO_ON ? ADD : mode); \
    }

GEMM(gemm_fp8_16x128, 16, 128, 1)
GEMM(gemm_fp8_64x32, 64, 32, 4)
GEMM(gemm_fp8_64x128, 64, 128, 2)
GEMM(gemm_fp8_128x128, 128, 128, 2)
