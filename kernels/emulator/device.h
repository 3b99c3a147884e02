// A GPU's thread block as plain C++, for the kernels of `../cu`: included before each of them.
//
// Threads of a block are fibers that take turns: each runs until it waits for others, in a barrier or in an operation of
// its warp. Asynchronous copies really arrive late, at the wait that waits for them, and a block's memory begins as
// what is no number, so that a kernel which forgets to wait or to write is found out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EMULATOR
#define DEVICE inline
#define KERNEL(threads) void
#define __device__
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::dynamic_shared()

struct Dim3 {
    unsigned x, y, z;
};
// Of the fiber that runs.
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

unsigned char* dynamic_shared();
// Waits for all threads of the block; whether any of them says so.
bool block_barrier(bool says);
// Gives each lane's words to all others of its warp: `all` is [32][count], and stands until the warp's next exchange. What
// the warp does together is done to it first, once.
using Together = void (*)(uint32_t* all);
const uint32_t* exchange(const uint32_t* words, unsigned count, Together together = nullptr);
// c += a · b of all lanes' fragments: words 0 to 3 of a lane are c, 4 to 7 a, 8 and 9 b.
void multiply_bf16(uint32_t* all);
void multiply_fp8(uint32_t* all);
// An asynchronous copy, and the ends of groups.
void begin_copy(void* to, const void* from, bool is_there);
void close_copies();
void await_copies(unsigned pending);

template <typename To, typename From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

}  // namespace emulated

static inline void __syncthreads() { emulated::block_barrier(false); }
static inline int __syncthreads_or(int says) { return emulated::block_barrier(says != 0); }

static inline float f32_of_bits(unsigned bits) { return emulated::bits_as<float>(bits); }
static inline unsigned bits_of_f32(float value) { return emulated::bits_as<unsigned>(value); }

static inline unsigned bf16_bits(float value) {
    unsigned bits = bits_of_f32(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline unsigned pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

static inline float f32_of_f16(unsigned bits) {
    unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return f32_of_bits(sign | 0x7f800000u | fraction << 13);
    float value = std::ldexp(float(exponent ? fraction | 0x400 : fraction), int(exponent ? exponent : 1) - 25);
    return sign ? -value : value;
}

static inline unsigned add_bf16x2(unsigned a, unsigned b) {
    return pack_bf16(f32_of_bits(a << 16) + f32_of_bits(b << 16), f32_of_bits(a & 0xffff0000u) + f32_of_bits(b & 0xffff0000u));
}

static inline unsigned multiply_bf16x2(unsigned a, unsigned b) {
    return pack_bf16(f32_of_bits(a << 16) * f32_of_bits(b << 16), f32_of_bits(a & 0xffff0000u) * f32_of_bits(b & 0xffff0000u));
}

static inline float multiply_rounded(float a, float b) { return a * b; }
static inline float add_rounded(float a, float b) { return a + b; }
static inline unsigned long long multiply_high(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
static inline unsigned long long add_to(unsigned long long* sum, unsigned long long more) {
    unsigned long long before = *sum;
    return *sum = before + more, before;
}

static inline unsigned shuffle_xor(unsigned value, unsigned mask) {
    unsigned lane = threadIdx.x % 32;
    return emulated::exchange(&value, 1)[lane ^ mask];
}
static inline float shuffle_xor(float value, unsigned mask) {
    return f32_of_bits(shuffle_xor(bits_of_f32(value), mask));
}

// The operations of mma.cuh, whose fragments are described there.
namespace emulated {

inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Together together) {
    const unsigned mine[10] = {bits_of_f32(c[0]), bits_of_f32(c[1]), bits_of_f32(c[2]), bits_of_f32(c[3]), a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(c, exchange(mine, 10, together) + threadIdx.x % 32 * 10, sizeof(c));
}

}  // namespace emulated

static inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulated::multiply(c, a, b0, b1, emulated::multiply_bf16);
}
static inline void mma_fp8(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emulated::multiply(c, a, b0, b1, emulated::multiply_fp8);
}

static inline void load_matrices(unsigned (&out)[4], const unsigned short* row) {
    unsigned lane = threadIdx.x % 32;
    unsigned words[4];
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::fprintf(stderr, "emulator: unaligned row\n"), std::abort();
    std::memcpy(words, row, 16);
    const uint32_t* all = emulated::exchange(words, 4);
    for (unsigned i = 0; i < 4; i++) out[i] = all[(8 * i + lane / 4) * 4 + lane % 4];
}

static inline void load_matrices_transposed(unsigned (&out)[4], const unsigned short* row) {
    unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned words[4];
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::fprintf(stderr, "emulator: unaligned row\n"), std::abort();
    std::memcpy(words, row, 16);
    const uint32_t* all = emulated::exchange(words, 4);
    for (unsigned i = 0; i < 4; i++) {
        unsigned low = all[(8 * i + 2 * t) * 4 + g / 2] >> (g % 2 * 16) & 0xffff;
        unsigned high = all[(8 * i + 2 * t + 1) * 4 + g / 2] >> (g % 2 * 16) & 0xffff;
        out[i] = low | high << 16;
    }
}

static inline void load_two_matrices(unsigned (&out)[2], const unsigned short* row) {
    unsigned four[4];
    load_matrices(four, row);
    out[0] = four[0], out[1] = four[1];
}

static inline void load_two_matrices_transposed(unsigned (&out)[2], const unsigned short* row) {
    unsigned four[4];
    load_matrices_transposed(four, row);
    out[0] = four[0], out[1] = four[1];
}

static inline void copy_chunk(unsigned short* to, const unsigned short* from, bool is_there) {
    emulated::begin_copy(to, from, is_there);
}
static inline void close_copies() { emulated::close_copies(); }
template <unsigned PENDING>
static inline void await_copies() {
    emulated::await_copies(PENDING);
}
