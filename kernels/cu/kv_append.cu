// Writes a row's keys and values to its place in the cache: as they are, or keys turned on their way, and queries with them in the
// same launch. A block takes a row and a KV head, or a row and QUERY_PAIRS pairs of its queries.
//
// In bf16 the cache is [pages, kv_heads, 2, PAGE, padded]: keys of 64 positions, then values of the same; heads are padded
// with zeros to whole fragments. In E4M3 it is [pages, kv_heads] of codes [2, PAGE, padded], and of powers of two [2, PAGE]:
// a number is its code times 2^(power - 135); of a power of 255 it is none. KvDtype::Fp8 of backend.rs says which power.
#include "fp8.cuh"
#include "rope.cuh"

constexpr u32 THREADS = 128;
// As rope.rs has it.
constexpr u32 QUERY_PAIRS = 4 * THREADS;
// The place of a row that nobody asked for.
constexpr u32 NOWHERE = 0xffffffffu;

// A head's numbers as they are.
struct Plain {
    const float* from;

    DEVICE float at(u32 d) const { return from[d]; }
};

// A head's numbers, turned; it has as many angles as pairs.
struct Turned {
    const float *from, *cos, *sin;
    u32 half;

    DEVICE float at(u32 d) const {
        u32 j = d < half ? d : d - half;
        float a = from[j], b = from[j + half];
        return d < half ? turned_first(a, b, cos[j], sin[j]) : turned_second(a, b, cos[j], sin[j]);
    }
};

// Writes a head's keys or values, `half` is 0 or 1: in bf16.
template <class Head>
DEVICE void append(bf16* cache, Head head, u32 half, u32 slot, u32 head_dim, u32 padded, u32*) {
    bf16* to = cache + (half * PAGE + slot) * padded;
    for (u32 d = threadIdx.x; d < padded; d += THREADS) to[d] = d < head_dim ? bf16_of(head.at(d)) : bf16(0);
}

// Exponent of fp8.rs has them, and the reason.
constexpr u32 LEAST_POWER = 24, NOT_FINITE = 255;

// In E4M3.
template <class Head>
DEVICE void append(unsigned char* cache, Head head, u32 half, u32 slot, u32 head_dim, u32 padded, u32* scratch) {
    u32 largest = 0;
    for (u32 d = threadIdx.x; d < head_dim; d += THREADS) {
        u32 magnitude = bits_of_f32(head.at(d)) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    largest = block_largest<THREADS>(largest, scratch);
    // One more where the fraction is above that of 448.
    u32 power = (largest + 0x1fffffu) >> 23;
    power = power < LEAST_POWER ? LEAST_POWER : min_of(power, NOT_FINITE);
    float inverse = f32_of_bits((262 - power) << 23);
    unsigned char* codes = cache + (half * PAGE + slot) * padded;
    for (u32 d = threadIdx.x; d < padded; d += THREADS) {
        codes[d] = d < head_dim && power != NOT_FINITE ? (unsigned char)fp8_code_of(head.at(d) * inverse) : 0;
    }
    if (threadIdx.x == 0) cache[2 * PAGE * padded + half * PAGE + slot] = (unsigned char)power;
}

// Numbers that a page has for a head, of so many bytes each.
DEVICE u64 page_numbers(const bf16*, u32 padded) { return 2 * PAGE * u64(padded); }
DEVICE u64 page_numbers(const unsigned char*, u32 padded) { return 2 * PAGE * u64(padded + 1); }

// Writes a head's keys and values to a place.
template <class Number, class Keys>
DEVICE void append_both(Number* cache, Keys keys, Plain values, u32 place, u32 head, u32 kv_heads, u32 head_dim, u32 padded) {
    __shared__ u32 scratch[2][THREADS / WARP];
    if (place == NOWHERE) return;
    u32 page = place / PAGE, slot = place % PAGE;
    Number* to = cache + (u64(page) * kv_heads + head) * page_numbers(cache, padded);
    append(to, keys, 0, slot, head_dim, padded, scratch[0]);
    append(to, values, 1, slot, head_dim, padded, scratch[1]);
}

template <class Number>
DEVICE void append_plain(Number* cache, const float* k, const float* v, const u32* places, u32 kv_heads, u32 head_dim, u32 padded) {
    u32 row = blockIdx.x, head = blockIdx.y;
    u64 from = (u64(row) * kv_heads + head) * head_dim;
    append_both(cache, Plain{k + from}, Plain{v + from}, places[row], head, kv_heads, head_dim, padded);
}

template <class Number>
DEVICE void turn_and_append(Number* cache, float* q, const float* k, const float* v, const u32* places, const float* cos,
                            const float* sin, const u32* positions, u32 query_pairs, u32 kv_heads, u32 head_dim, u32 padded) {
    u32 row = blockIdx.x, half = head_dim / 2;
    u64 angles = u64(positions[row]) * half;
    if (blockIdx.y < kv_heads) {
        u32 head = blockIdx.y;
        u64 from = (u64(row) * kv_heads + head) * head_dim;
        Turned keys{k + from, cos + angles, sin + angles, half};
        append_both(cache, keys, Plain{v + from}, places[row], head, kv_heads, head_dim, padded);
        return;
    }
    float* queries = q + u64(row) * 2 * query_pairs;
    u32 first = (blockIdx.y - kv_heads) * QUERY_PAIRS + threadIdx.x;
#pragma unroll
    for (u32 n = 0; n < QUERY_PAIRS / THREADS; n++) {
        u32 pair = first + n * THREADS;
        if (pair >= query_pairs) return;
        u32 j = pair % half;
        turn(queries + (pair - j) * 2 + j, half, cos[angles + j], sin[angles + j]);
    }
}

#define APPEND(name, Number)                                                                                             \
    KERNEL(THREADS)                                                                                                      \
    name(Number* cache, const float* k, const float* v, const u32* places, u32 kv_heads, u32 head_dim, u32 padded) {     \
        append_plain(cache, k, v, places, kv_heads, head_dim, padded);                                                   \
    }
#define TURN_AND_APPEND(name, Number)                                                                                    \
    KERNEL(THREADS)                                                                                                      \
    name(Number* cache, float* q, const float* k, const float* v, const u32* places, const float* cos, const float* sin, \
         const u32* positions, u32 query_pairs, u32 kv_heads, u32 head_dim, u32 padded) {                                \
        turn_and_append(cache, q, k, v, places, cos, sin, positions, query_pairs, kv_heads, head_dim, padded);           \
    }

APPEND(kv_append, bf16)
APPEND(kv_append_fp8, unsigned char)
TURN_AND_APPEND(rope_append, bf16)
TURN_AND_APPEND(rope_append_fp8, unsigned char)
