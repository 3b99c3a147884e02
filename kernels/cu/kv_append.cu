// Writes a row's keys and values to its place in the cache. A block takes a row and a KV head.
//
// In bf16 the cache is [pages, kv_heads, 2, PAGE, padded]: keys of 64 positions, then values of the same; heads are padded
// with zeros to whole fragments. In E4M3 it is [pages, kv_heads] of codes [2, PAGE, padded], and of powers of two [2, PAGE]:
// a number is its code times 2^(power - 135); of a power of 255 it is none. KvDtype::Fp8 of backend.rs says which power.
#include "fp8.cuh"

constexpr u32 THREADS = 128;
// The place of a row that nobody asked for.
constexpr u32 NOWHERE = 0xffffffffu;

KERNEL(THREADS) kv_append(bf16* cache, const float* k, const float* v, const u32* places, u32 kv_heads, u32 head_dim, u32 padded) {
    u32 row = blockIdx.x, head = blockIdx.y;
    if (places[row] == NOWHERE) return;
    u32 page = places[row] / PAGE, slot = places[row] % PAGE;
    bf16* keys = cache + (u64(page) * kv_heads + head) * 2 * PAGE * padded + u64(slot) * padded;
    bf16* values = keys + PAGE * padded;
    u64 from = (u64(row) * kv_heads + head) * head_dim;
    for (u32 d = threadIdx.x; d < padded; d += blockDim.x) {
        keys[d] = d < head_dim ? bf16_of(k[from + d]) : bf16(0);
        values[d] = d < head_dim ? bf16_of(v[from + d]) : bf16(0);
    }
}

// Exponent of fp8.rs has them, and the reason.
constexpr u32 LEAST_POWER = 24, NOT_FINITE = 255;

// Writes a head's keys or values: `half` is 0 or 1.
DEVICE void append(unsigned char* head, const float* from, u32 half, u32 slot, u32 head_dim, u32 padded, u32 (&scratch)[THREADS / WARP]) {
    u32 largest = 0;
    for (u32 d = threadIdx.x; d < head_dim; d += THREADS) {
        u32 magnitude = bits_of_f32(from[d]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    largest = block_largest<THREADS>(largest, scratch);
    // One more where the fraction is above that of 448.
    u32 power = (largest + 0x1fffffu) >> 23;
    power = power < LEAST_POWER ? LEAST_POWER : min_of(power, NOT_FINITE);
    float inverse = f32_of_bits((262 - power) << 23);
    unsigned char* codes = head + (u64(half) * PAGE + slot) * padded;
    for (u32 d = threadIdx.x; d < padded; d += THREADS) {
        codes[d] = d < head_dim && power != NOT_FINITE ? (unsigned char)fp8_code_of(from[d] * inverse) : 0;
    }
    if (threadIdx.x == 0) head[2 * PAGE * padded + half * PAGE + slot] = (unsigned char)power;
}

KERNEL(THREADS)
kv_append_fp8(unsigned char* cache, const float* k, const float* v, const u32* places, u32 kv_heads, u32 head_dim, u32 padded) {
    __shared__ u32 scratch[2][THREADS / WARP];
    u32 row = blockIdx.x, head = blockIdx.y;
    if (places[row] == NOWHERE) return;
    u32 page = places[row] / PAGE, slot = places[row] % PAGE;
    unsigned char* to = cache + (u64(page) * kv_heads + head) * 2 * PAGE * (padded + 1);
    u64 from = (u64(row) * kv_heads + head) * head_dim;
    append(to, k + from, 0, slot, head_dim, padded, scratch[0]);
    append(to, v + from, 1, slot, head_dim, padded, scratch[1]);
}
