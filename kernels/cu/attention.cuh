// What both attention kernels share: pages of the KV cache in a block's memory, scores, weights, and their sums.
//
// HEAD_DIM is the width of a head, padded to whole fragments; these files are compiled once for each. The cache is
// that of kv_append.cu.
//
// Softmax is taken over powers of 2: scores are scaled by log2(e) / sqrt(head_dim).
#pragma once

#include "mma.cuh"

constexpr u32 STRIDE = tile_stride<HEAD_DIM>();
// Steps over a head's width, and fragments that hold it as columns.
constexpr u32 DIM_STEPS = HEAD_DIM / 16;
constexpr u32 DIM_FRAGMENTS = HEAD_DIM / 8;

DEVICE float minus_infinity() { return f32_of_bits(0xff800000u); }

// Sixteen queries against some keys so far, in the fragments of one warp: rows g and g + 8 are this lane's.
struct Softmax {
    // Largest score of each row, the same in its four lanes.
    float max[2];
    // This lane's part of the sum of weights.
    float sum[2];
    // Weights times values.
    float out[DIM_FRAGMENTS][4];

    DEVICE void clear() {
        max[0] = max[1] = minus_infinity();
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (u32 n = 0; n < DIM_FRAGMENTS; n++) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
    }

    // Turns scores into weights relative to the largest score so far, and what came before with them.
    template <u32 KEY_FRAGMENTS>
    DEVICE void weigh(float (&scores)[KEY_FRAGMENTS][4]) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float largest = max[half];
#pragma unroll
            for (u32 n = 0; n < KEY_FRAGMENTS; n++) {
                largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            }
            largest = fmaxf(largest, shuffle_xor(largest, 1));
            largest = fmaxf(largest, shuffle_xor(largest, 2));
            // Where no key has been seen, weights are powers of minus infinity, and not of what is no number.
            float base = largest == minus_infinity() ? 0.0f : largest;
            float before = exp2f(max[half] - base);
            max[half] = largest;
            float weights = 0.0f;
#pragma unroll
            for (u32 n = 0; n < KEY_FRAGMENTS; n++) {
#pragma unroll
                for (u32 i = 2 * half; i < 2 * half + 2; i++) {
                    scores[n][i] = exp2f(scores[n][i] - base);
                    weights += scores[n][i];
                }
            }
            sum[half] = sum[half] * before + weights;
#pragma unroll
            for (u32 n = 0; n < DIM_FRAGMENTS; n++) {
                out[n][2 * half] *= before;
                out[n][2 * half + 1] *= before;
            }
        }
    }

    // The sum of all weights of a row.
    DEVICE float whole_sum(u32 half) const {
        float whole = sum[half];
        whole += shuffle_xor(whole, 1);
        whole += shuffle_xor(whole, 2);
        return whole;
    }
};

// Begins to copy a head's entries of a page, keys or values; those from `num_entries` on are zero.
DEVICE void copy_page(bf16* tile, const bf16* page, u32 num_entries, u32 num_threads) {
    for (u32 chunk = threadIdx.x; chunk < PAGE * (HEAD_DIM / CHUNK); chunk += num_threads) {
        u32 entry = chunk / (HEAD_DIM / CHUNK), d = chunk % (HEAD_DIM / CHUNK) * CHUNK;
        bool is_there = entry < num_entries;
        copy_chunk(tile + entry * STRIDE + d, page + (is_there ? entry * HEAD_DIM + d : 0), is_there);
    }
}

// Numbers from code to code of a position, in a block's memory: an odd number of 16 bytes, so that the eight positions that a
// load of a matrix touches lie in different banks.
constexpr u32 CODE_STRIDE = (HEAD_DIM / 16 | 1) * 16;
// A head's entries of a page in E4M3, as the cache has them and in a block's memory: codes of keys, of values, powers of both.
constexpr u32 CODED_ENTRIES = 2 * PAGE * (HEAD_DIM + 1);
constexpr u32 CODED_PAGE = 2 * PAGE * (CODE_STRIDE + 1);
constexpr u32 POWERS = 2 * PAGE * CODE_STRIDE;

// Begins to copy a head's entries of a page in E4M3; codes from `num_entries` on are zero, and powers are what they were.
DEVICE void copy_coded_page(unsigned char* tile, const unsigned char* page, u32 num_entries, u32 num_threads) {
    auto copy = [](unsigned char* to, const unsigned char* from, bool is_there) {
        copy_chunk(reinterpret_cast<bf16*>(to), reinterpret_cast<const bf16*>(from), is_there);
    };
    for (u32 chunk = threadIdx.x; chunk < 2 * PAGE * (HEAD_DIM / 16); chunk += num_threads) {
        u32 entry = chunk / (HEAD_DIM / 16), d = chunk % (HEAD_DIM / 16) * 16;
        bool is_there = entry % PAGE < num_entries;
        copy(tile + entry * CODE_STRIDE + d, page + (is_there ? entry * HEAD_DIM + d : 0), is_there);
    }
    for (u32 chunk = threadIdx.x; chunk < 2 * PAGE / 16; chunk += num_threads) {
        copy(tile + POWERS + chunk * 16, page + 2 * PAGE * HEAD_DIM + chunk * 16, true);
    }
}

// Four codes as bf16, each times 2^-8: the first and the third, and the second and the fourth. Exponent and fraction in place,
// and 2^112 for the other bias.
DEVICE void bf16_of_codes(u32 (&pairs)[2], u32 codes) {
#pragma unroll
    for (u32 odd = 0; odd < 2; odd++) {
        u32 upper = odd ? codes : codes << 8;
        pairs[odd] = multiply_bf16x2((upper & 0x80008000u) | (upper >> 4 & 0x07f007f0u), 0x77807780u);
    }
}

// What a number of bf16_of_codes is still to be multiplied with; infinite where it is none, as all of its codes are then zero.
DEVICE float power_of(u32 power) { return f32_of_bits(power << 23); }

// Scores of sixteen queries against 8 * KEY_FRAGMENTS keys of a tile, not yet scaled. `query(step, a)` gives a step's
// fragment of the queries.
template <u32 KEY_FRAGMENTS, typename Query>
DEVICE void score(float (&scores)[KEY_FRAGMENTS][4], Query query, const bf16* keys, u32 lane) {
    static_assert(KEY_FRAGMENTS % 2 == 0, "sixteen keys are loaded at once");
#pragma unroll
    for (u32 n = 0; n < KEY_FRAGMENTS; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
    for (u32 step = 0; step < DIM_STEPS; step++) {
        u32 a[4];
        query(step, a);
#pragma unroll
        for (u32 n = 0; n < KEY_FRAGMENTS; n += 2) {
            u32 b[4];
            load_matrices(b, keys + (n * 8 + lane % 8 + lane / 16 * 8) * STRIDE + step * 16 + lane / 8 % 2 * 8);
            mma(scores[n], a, b[0], b[1]);
            mma(scores[n + 1], a, b[2], b[3]);
        }
    }
}

// Sixteen rows of weights as fragments for a product with values, rounded to bf16.
template <u32 KEY_STEPS>
DEVICE void pack_weights(u32 (&packed)[KEY_STEPS][4], const float (&weights)[2 * KEY_STEPS][4]) {
#pragma unroll
    for (u32 step = 0; step < KEY_STEPS; step++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const float(&pair)[4] = weights[2 * step + i / 2];
            packed[step][i] = pack_bf16(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
    }
}

// Adds sixteen rows of weights times 16 * KEY_STEPS values of a tile. Only rows of which `is_meant(half)` says so are
// changed.
template <u32 KEY_STEPS, typename IsMeant>
DEVICE void add_values(float (&out)[DIM_FRAGMENTS][4], const u32 (&weights)[KEY_STEPS][4], const bf16* values, u32 lane,
                       IsMeant is_meant) {
#pragma unroll
    for (u32 n = 0; n < DIM_FRAGMENTS; n += 2) {
        float low[4], high[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) low[i] = out[n][i], high[i] = out[n + 1][i];
#pragma unroll
        for (u32 step = 0; step < KEY_STEPS; step++) {
            u32 b[4];
            load_matrices_transposed(b, values + (step * 16 + lane % 16) * STRIDE + n * 8 + lane / 16 * 8);
            mma(low, weights[step], b[0], b[1]);
            mma(high, weights[step], b[2], b[3]);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (is_meant(i / 2)) out[n][i] = low[i], out[n + 1][i] = high[i];
        }
    }
}

// The same scores of sixteen queries against sixteen keys in E4M3, each still to be multiplied with its power. Of a step's
// sixteen dimensions a lane has 4t to 4t+3 of its keys: the even ones of them stand where others have 2t and 2t+1, and the odd
// ones where others have 2t+8 and 2t+9; so must the queries.
template <typename Query>
DEVICE void score_coded(float (&scores)[2][4], Query query, const unsigned char* keys, u32 lane) {
#pragma unroll
    for (u32 n = 0; n < 2; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
    for (u32 step = 0; step < DIM_STEPS; step++) {
        u32 a[4], codes[2], b[2];
        query(step, a);
        load_two_matrices(codes, reinterpret_cast<const bf16*>(keys + lane % 16 * CODE_STRIDE + step * 16));
#pragma unroll
        for (u32 n = 0; n < 2; n++) {
            bf16_of_codes(b, codes[n]);
            mma(scores[n], a, b[0], b[1]);
        }
    }
}

// Adds sixteen rows of weights times sixteen values in E4M3, weights having been multiplied with the values' powers. Of sixteen
// dimensions the even ones go to one fragment, and the odd ones to the next.
DEVICE void add_coded_values(float (&out)[DIM_FRAGMENTS][4], const u32 (&weights)[4], const unsigned char* values, u32 lane) {
#pragma unroll
    for (u32 n = 0; n < DIM_FRAGMENTS; n += 2) {
        u32 codes[2], first[2], second[2];
        load_two_matrices_transposed(codes, reinterpret_cast<const bf16*>(values + lane % 16 * CODE_STRIDE + n * 8));
        bf16_of_codes(first, codes[0]);
        bf16_of_codes(second, codes[1]);
        mma(out[n], weights, first[0], second[0]);
        mma(out[n + 1], weights, first[1], second[1]);
    }
}
