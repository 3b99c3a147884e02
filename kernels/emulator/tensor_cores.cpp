// Products of a warp's fragments, as ../cu/mma.cuh describes them: every number is one sum in f32, in order of K.
#include <array>

#include "device.h"

// The processor's own instructions, whichever it has: nothing here depends on them but time, as nothing is contracted.
#ifdef __x86_64__
#define AS_WIDE_AS_CAN_BE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define AS_WIDE_AS_CAN_BE
#endif

namespace emulated {
namespace {

constexpr unsigned LANES = 32, WORDS = 10, ROWS = 16, COLS = 8;

// Codes of E4M3.
const std::array<float, 256>& fp8_values() {
    static const auto values = [] {
        std::array<float, 256> values;
        for (unsigned code = 0; code < 256; code++) {
            unsigned exponent = code >> 3 & 15, fraction = code & 7;
            float value = exponent == 0 ? std::ldexp(float(fraction), -9) : std::ldexp(float(8 + fraction), int(exponent) - 10);
            values[code] = (code & 0x7f) == 0x7f ? f32_of_bits(0x7fc00000u) : code & 0x80 ? -value : value;
        }
        return values;
    }();
    return values;
}

// What each lane holds of A and B, as numbers of as many bits that share a word.
template <unsigned BITS, typename Value>
inline void unpack(const uint32_t* all, float (&a)[ROWS][256 / BITS], float (&b)[256 / BITS][COLS], Value value) {
    constexpr unsigned PER_WORD = 32 / BITS, HALF = 4 * PER_WORD;
    for (unsigned lane = 0; lane < LANES; lane++) {
        const uint32_t* words = all + lane * WORDS;
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < PER_WORD; i++) {
            unsigned k = t * PER_WORD + i;
            a[g][k] = value(words[4], i), a[g + 8][k] = value(words[5], i);
            a[g][k + HALF] = value(words[6], i), a[g + 8][k + HALF] = value(words[7], i);
            b[k][g] = value(words[8], i), b[k + HALF][g] = value(words[9], i);
        }
    }
}

template <unsigned K>
inline void multiply(uint32_t* all, const float (&a)[ROWS][K], const float (&b)[K][COLS]) {
    for (unsigned row = 0; row < ROWS; row++) {
        // Lanes 4 * (row % 8) and on have it, two columns each.
        uint32_t* mine = all + row % 8 * 4 * WORDS + row / 8 * 2;
        float c[COLS];
        for (unsigned col = 0; col < COLS; col += 2) std::memcpy(c + col, mine + col / 2 * WORDS, 2 * sizeof(float));
        for (unsigned k = 0; k < K; k++) {
            for (unsigned col = 0; col < COLS; col++) c[col] += a[row][k] * b[k][col];
        }
        for (unsigned col = 0; col < COLS; col += 2) std::memcpy(mine + col / 2 * WORDS, c + col, 2 * sizeof(float));
    }
}

}  // namespace

AS_WIDE_AS_CAN_BE void multiply_bf16(uint32_t* all) {
    float a[ROWS][16], b[16][COLS];
    unpack<16>(all, a, b, [](uint32_t word, unsigned i) { return f32_of_bits(word >> (16 * i) << 16); });
    multiply(all, a, b);
}

AS_WIDE_AS_CAN_BE void multiply_fp8(uint32_t* all) {
    float a[ROWS][32], b[32][COLS];
    const auto& values = fp8_values();
    unpack<8>(all, a, b, [&](uint32_t word, unsigned i) { return values[word >> (8 * i) & 0xff]; });
    multiply(all, a, b);
}

}  // namespace emulated
