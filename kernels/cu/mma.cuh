// Tensor cores on bf16, and copies from device memory into a block's own memory.
//
// Fragments are those of PTX's `mma.m16n8k16`. With g = lane / 4 and t = lane % 4, a lane holds
//   of A [16, 16]: a[0] (g, 2t and 2t+1), a[1] (g+8, same), a[2] (g, 2t+8 and 2t+9), a[3] (g+8, same);
//   of B [16, 8]:  b[0] (2t and 2t+1, g), b[1] (2t+8 and 2t+9, g);
//   of C [16, 8]:  c[0], c[1] (g, 2t and 2t+1), c[2], c[3] (g+8, same).
// What an entry of C becomes depends on its row of A and its column of B alone.
#pragma once

#include "num.cuh"

// Numbers from row to row of a tile in a block's memory: with 16 bytes more than its width, the eight rows that a
// load of a matrix touches lie in different banks, if the width is a multiple of 16.
template <u32 WIDTH>
DEVICE constexpr u32 tile_stride() {
    static_assert(WIDTH % 16 == 0, "a tile is whole fragments wide");
    return WIDTH + CHUNK;
}

#ifndef EMULATOR

// c += a · b, the products and their sums in f32.
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if __CUDA_ARCH__ < 890
// Two of E4M3, in the lower half of a word, as bf16: exponent and fraction in place, and 2^120 for the other bias.
DEVICE u32 bf16_of_fp8(u32 codes) {
    u32 pair = (codes & 0xffu) | (codes & 0xff00u) << 8;
    u32 small = (pair & 0x800080u) << 8 | (pair & 0x7f007fu) << 4, bf16s;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(bf16s) : "r"(small), "r"(0x7b807b80u), "r"(0x80008000u));
    return bf16s;
}
#endif

// The same of numbers of 8 bits, E4M3, four in a word; fragments are those of `mma.m16n8k32`:
//   a[0] (g, 4t to 4t+3), a[1] (g+8, same), a[2] (g, 4t+16 and on), a[3] (g+8, same); b likewise with columns g.
// Before there were tensor cores for them they become bf16, which holds them exactly: K in another order, the same for both.
DEVICE void mma_fp8(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 890
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
    for (u32 half = 0; half < 32; half += 16) {
        u32 wide[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) wide[i] = bf16_of_fp8(a[i] >> half);
        mma(c, wide, bf16_of_fp8(b0 >> half), bf16_of_fp8(b1 >> half));
    }
#endif
}

DEVICE u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// Four 8x8 matrices of bf16: lanes 8i to 8i+7 point to the rows of matrix i, and out[i] of a lane is its (g, 2t) and
// (g, 2t+1).
DEVICE void load_matrices(u32 (&out)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed: out[i] of a lane is (2t, g) and (2t+1, g).
DEVICE void load_matrices_transposed(u32 (&out)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The first two of them: lanes 0 to 15 point to rows, and those of the others are not read.
DEVICE void load_two_matrices(u32 (&out)[2], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
}

DEVICE void load_two_matrices_transposed(u32 (&out)[2], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// Begins to copy 16 bytes, or, where not `is_there`, to write zeros; nothing is then read.
DEVICE void copy_chunk(bf16* to, const bf16* from, bool is_there) {
    u32 bytes = is_there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// Closes a group of copies.
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until all groups of this thread but the last PENDING have arrived.
template <u32 PENDING>
DEVICE void await_copies() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

#endif
