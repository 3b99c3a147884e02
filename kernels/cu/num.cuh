// Numbers, and what threads of a warp and a block do together. Included by every kernel.
//
// No header of CUDA is needed, so that NVRTC compiles these files wherever its library is. Everything that is not
// plain C++ stands in this file and in mma.cuh: `../emulator/device.h` puts plain C++ in their place, and so the
// kernels also run, slowly, on a machine without a GPU.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
// A bfloat16, the upper half of an f32.
typedef unsigned short bf16;

// Threads of a warp.
constexpr u32 WARP = 32;
// Positions in a page of the KV cache: PAGE_TOKENS of backend.rs.
constexpr u32 PAGE = 64;
// Numbers in 16 bytes of bf16: what one asynchronous copy moves. Rows of bf16 are padded to a multiple of it.
constexpr u32 CHUNK = 8;

#ifndef EMULATOR

#define DEVICE __device__ __forceinline__
// A kernel of blocks of so many threads, of which a multiprocessor runs at least one.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
// Memory of a thread block whose size the launch says.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE float f32_of_bits(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of_f32(float value) { return __float_as_uint(value); }

// Two numbers rounded to nearest even, the first in the lower half.
DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// A number of half precision, in the lower half of a word.
DEVICE float f32_of_f16(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
    return value;
}

// Sums of two pairs of bf16, each rounded to nearest even.
DEVICE u32 add_bf16x2(u32 a, u32 b) {
    u32 sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return sum;
}

// Products of two pairs of bf16, each rounded to nearest even; numbers without a leading one are numbers like others.
DEVICE u32 multiply_bf16x2(u32 a, u32 b) {
    u32 product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}

// Never fused with what comes after.
DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add_rounded(float a, float b) { return __fadd_rn(a, b); }
// The upper half of a product.
DEVICE u64 multiply_high(u64 a, u64 b) { return __umul64hi(a, b); }
// Adds to what other threads add to as well; what was there before.
DEVICE u64 add_to(u64* sum, u64 more) { return atomicAdd(sum, more); }

DEVICE float shuffle_xor(float value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE u32 shuffle_xor(u32 value, u32 mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

#endif

DEVICE float f32_of(bf16 value) { return f32_of_bits(u32(value) << 16); }
DEVICE bf16 bf16_of(float value) { return bf16(pack_bf16(value, 0.0f) & 0xffffu); }

DEVICE u32 min_of(u32 a, u32 b) { return a < b ? a : b; }

// A sum over all THREADS threads of a block, in an order that depends on their number alone; every thread has it.
// `scratch` has room for a number of each warp, and may be used again after the next barrier.
template <u32 THREADS>
DEVICE float block_sum(float value, float* scratch) {
#pragma unroll
    for (u32 mask = WARP / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (u32 warp = 0; warp < THREADS / WARP; warp++) sum += scratch[warp];
    return sum;
}
