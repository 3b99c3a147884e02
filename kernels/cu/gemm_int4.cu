// Products with weights of 4 bits, which become bf16 in registers; they hold the integers exactly. A group's products are
// summed, and its scale is applied to the sum: nothing is rounded but once at load.
#include "gemm.cuh"
#include "int4.cuh"

static_assert(STEP == TILE_K && GROUP == 2 * STEP, "a step is a tile deep, a group two steps");

template <u32 BLOCK_COLS, u32 ACROSS>
struct Int4Weights {
    static constexpr u32 COLS = BLOCK_COLS;
    static constexpr bool IS_PLAIN = false;
    static constexpr u32 UNROLLED = 4;
    static constexpr u32 TILE = COLS / TILE_COLS * TILE_WORDS * 2;
    const u32* words;
    const bf16* scales;
    // What stands for zero, as 128 more in bf16, [groups, stride]; or nothing, where that is 8.
    const bf16* zeros;
    u32 k_tiles, stride, cols;
    bool has_f16_scales;
    // A step's words.
    u32 step_words[ACROSS / 2][4];
    // A group's -128 - zero, twice in a word, and its scales of this lane's columns of sums.
    u32 minus_zero[ACROSS];
    float scale[ACROSS][2];

    DEVICE void copy(bf16* tile, u32 first_col, u32 cols, u32 step) const {
        u32 mine = threadIdx.x / WARP, chunk = threadIdx.x % WARP * 4;
        static_assert(TILE_WORDS == WARP * 4 && COLS / TILE_COLS <= THREADS / WARP, "a warp copies a tile");
        if (mine >= COLS / TILE_COLS) return;
        bool is_there = first_col + mine * TILE_COLS < cols;
        u64 at = is_there ? (u64(first_col / TILE_COLS + mine) * k_tiles + step) * TILE_WORDS + chunk : 0;
        copy_chunk(tile + 2 * (mine * TILE_WORDS + chunk), reinterpret_cast<const bf16*>(words + at), is_there);
    }

    DEVICE float scale_of(u32 bits) const { return has_f16_scales ? f32_of_f16(bits) : f32_of_bits(bits << 16); }

    DEVICE void begin(const bf16* tile, u32 first_col, u32 across, u32 lane, u32 step) {
        struct alignas(16) Words {
            u32 word[4];
        };
        const Words* of_lane = reinterpret_cast<const Words*>(tile) + lane;
#pragma unroll
        for (u32 i = 0; i < ACROSS / 2; i++) {
            Words all = of_lane[(across / TILE_COLS + i) * WARP];
#pragma unroll
            for (u32 j = 0; j < 4; j++) step_words[i][j] = all.word[j];
        }
        if (step % 2 != 0) return;
        u64 group = u64(step / 2) * stride;
#pragma unroll
        for (u32 j = 0; j < ACROSS; j++) {
            u32 column = first_col + across + j * 8, of_sums = column + lane % 4 * 2, of_weights = column + lane / 4;
            // Columns are padded to pairs.
            u32 pair = of_sums < cols ? *reinterpret_cast<const u32*>(scales + group + of_sums) : 0;
            scale[j][0] = scale_of(pair & 0xffffu);
            scale[j][1] = scale_of(pair >> 16);
            u32 zero = zeros != nullptr && of_weights < cols ? zeros[group + of_weights] : 0x4308; // 136.
            minus_zero[j] = (zero | 0x8000u) * 0x10001u;
        }
    }

    // 128 + q is the bf16 whose last bits are q.
    DEVICE void fragments(u32 (&b)[4], const bf16*, u32 j, u32 k) const {
        u32 word = step_words[j / 2][k / 16];
#pragma unroll
        for (u32 pair = 0; pair < 4; pair++) {
            b[pair] = add_bf16x2((word >> (4 * pair) & 0x000f000fu) | 0x43004300u, minus_zero[j + pair / 2]);
        }
    }

    DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) const { mma(c, a, b0, b1); }

    DEVICE float finish(float sum, u32, u32) const { return sum; }

    template <typename Sums>
    DEVICE void close(Sums& sums, Sums& part, u32 step, u32 steps) const {
        if (step % 2 == 0 && step + 1 != steps) return;
#pragma unroll
        for (u32 i = 0; i < sizeof(part) / sizeof(part[0]); i++) {
#pragma unroll
            for (u32 j = 0; j < ACROSS; j++) {
#pragma unroll
                for (u32 n = 0; n < 4; n++) {
                    sums[i][j][n] += part[i][j][n] * scale[j][n % 2];
                    part[i][j][n] = 0.0f;
                }
            }
        }
    }
};

#define GEMM(name, ROWS, COLS, WARPS_DOWN)                                                                              \
    KERNEL(THREADS)                                                                                                     \
    name(float* out, const bf16* x, const u32* words, const bf16* scales, const bf16* zeros, u32 has_f16_scales,        \
         u32 rows, u32 cols, u32 x_stride, u32 k_tiles, u32 stride, u32 depth, u32 out_stride, u32 mode) {              \
        Int4Weights<COLS, fragments_across<COLS, WARPS_DOWN>()> weights;                                                \
        weights.words = words, weights.scales = scales, weights.zeros = zeros;                                          \
        weights.k_tiles = k_tiles, weights.stride = stride, weights.cols = cols;                                        \
        weights.has_f16_scales = has_f16_scales != 0;                                                                   \
        multiply<ROWS, WARPS_DOWN>(out, x, weights, rows, cols, x_stride, depth, out_stride, mode);                     \
    }

GEMM(gemm_int4_16x128, 16, 128, 1)
GEMM(gemm_int4_64x32, 64, 32, 4)
GEMM(gemm_int4_64x128, 64, 128, 2)
GEMM(gemm_int4_128x128, 128, 128, 2)
