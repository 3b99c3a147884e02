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

// A row of sums, as one vector.
using Columns = float __attribute__((vector_size(COLS * sizeof(float))));
// Half of the rows, whose sums are in the same words of their lanes: side by side, or each sum would wait for the one before.
constexpr unsigned TOGETHER = ROWS / 2;

template <unsigned K>
inline void multiply(uint32_t* all, const float (&a)[ROWS][K], const float (&b)[K][COLS]) {
    for (unsigned first = 0; first < ROWS; first += TOGETHER) {
        // Lanes 4 * row and on have a row, two columns each, and the one 8 rows on in the words behind.
        uint32_t* mine = all + first / TOGETHER * 2;
        Columns c[TOGETHER];
        auto each_pair = [&](auto copy) {
            for (unsigned row = 0; row < TOGETHER; row++) {
                for (unsigned col = 0; col < COLS; col += 2) copy(reinterpret_cast<float*>(&c[row]) + col, mine + (row * 4 + col / 2) * WORDS);
            }
        };
        each_pair([](float* sums, const uint32_t* words) { std::memcpy(sums, words, 2 * sizeof(float)); });
        for (unsigned k = 0; k < K; k++) {
            Columns of_k;
            std::memcpy(&of_k, b[k], sizeof of_k);
            for (unsigned row = 0; row < TOGETHER; row++) c[row] += a[first + row][k] * of_k;
        }
        each_pair([](const float* sums, uint32_t* words) { std::memcpy(words, sums, 2 * sizeof(float)); });
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
