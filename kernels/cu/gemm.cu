// Products with weights in bf16, w [cols, stride], rows padded with zeros to whole chunks.
#include "gemm.cuh"

template <u32 BLOCK_COLS>
struct Bf16Weights {
    static constexpr u32 COLS = BLOCK_COLS;
    static constexpr bool IS_PLAIN = true;
    static constexpr u32 UNROLLED = 4;
    static constexpr u32 TILE = COLS * STRIDE;
    const bf16* numbers;
    u32 stride, depth;
    // Where a lane's rows of the step begin.
    u32 row, column;

    DEVICE void copy(bf16* tile, u32 first_col, u32 cols, u32 step) const {
        copy_rows(tile, numbers, COLS, first_col, cols, step * STEP, depth, stride);
    }

    DEVICE void begin(const bf16*, u32, u32 across, u32 lane, u32) {
        row = across + lane % 8 + lane / 16 * 8;
        column = lane / 8 % 2 * 8;
    }

    DEVICE void fragments(u32 (&b)[4], const bf16* tile, u32 j, u32 k) const {
        load_matrices(b, tile + (row + j * 8) * STRIDE + k + column);
    }

    DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) const { mma(c, a, b0, b1); }

    DEVICE float finish(float sum, u32, u32) const { return sum; }

    template <typename Sums>
    DEVICE void close(Sums&, Sums&, u32, u32) const {}
};

#define GEMM(name, ROWS, COLS, WARPS_DOWN)                                                                              \
    KERNEL(THREADS)                                                                                                     \
    name(float* out, const bf16* x, const bf16* w, u32 rows, u32 cols, u32 x_stride, u32 w_stride, u32 depth,           \
         u32 out_stride, u32 mode) {                                                                                    \
        Bf16Weights<COLS> weights = {w, w_stride, depth, 0, 0};                                                         \
        multiply<ROWS, WARPS_DOWN>(out, x, weights, rows, cols, x_stride, depth, out_stride, mode);                     \
    }

GEMM(gemm_16x128, 16, 128, 1)
GEMM(gemm_64x32, 64, 32, 4)
GEMM(gemm_64x128, 64, 128, 2)
GEMM(gemm_128x128, 128, 128, 2)
