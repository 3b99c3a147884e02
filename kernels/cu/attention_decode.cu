// Attention of a row alone, of up to sixteen query heads that share a KV head: keys and values are read once for the
// group. A block takes a row, a KV head and a part of the context; its warps share out each page's keys, sixteen each.
//
// A part leaves its largest score, its sum of weights and its sum of weighted values; `attention_merge` makes one result
// of a row's parts.
#include "attention.cuh"

constexpr u32 WARPS = PAGE / 16;
constexpr u32 THREADS = WARPS * WARP;
// Pages under way at once.
constexpr u32 STAGES = 3;
constexpr u32 GROUP = 16;

// A row, and how much it sees: DecodeRow of attention.rs.
struct Row {
    u32 row;
    u32 num_keys;
    // Where the sequence's pages begin in the table.
    u32 pages;
};

// A head's entries of a page in bf16.
struct PlainEntries {
    static constexpr bool HAVE_POWERS = false;
    static constexpr u32 BYTES = 2 * PAGE * STRIDE * 2;
    typedef bf16 Cache;

    static DEVICE void copy(unsigned char* tile, const bf16* cache, u64 page_head, u32 num_entries) {
        bf16* keys = reinterpret_cast<bf16*>(tile);
        const bf16* entries = cache + page_head * 2 * PAGE * HEAD_DIM;
        copy_page(keys, entries, num_entries, THREADS);
        copy_page(keys + PAGE * STRIDE, entries + PAGE * HEAD_DIM, num_entries, THREADS);
    }

    // Of a step's fragment of queries, the dimensions of a lane's numbers `i`: the first, and how far from it the second is.
    static DEVICE u32 first_dim(u32 lane, u32 i) { return lane % 4 * 2 + i / 2 * 8; }
    static constexpr u32 BETWEEN = 1;

    template <typename Query>
    static DEVICE void score(float (&scores)[2][4], Query query, const unsigned char* tile, u32 first, u32 lane) {
        ::score(scores, query, reinterpret_cast<const bf16*>(tile) + first * STRIDE, lane);
    }

    static DEVICE float key_power(const unsigned char*, u32) { return 1.0f; }

    static DEVICE void add(float (&out)[DIM_FRAGMENTS][4], const u32 (&weights)[1][4], const unsigned char* tile, u32 first, u32 lane) {
        const bf16* values = reinterpret_cast<const bf16*>(tile) + (PAGE + first) * STRIDE;
        add_values(out, weights, values, lane, [](u32) { return true; });
    }

    // The dimension of a lane's column `i` of fragment `n`.
    static DEVICE u32 out_dim(u32 n, u32 lane, u32 i) { return n * 8 + lane % 4 * 2 + i; }
};

// The same in E4M3.
struct CodedEntries {
    static constexpr bool HAVE_POWERS = true;
    static constexpr u32 BYTES = CODED_PAGE;
    typedef unsigned char Cache;

    static DEVICE void copy(unsigned char* tile, const unsigned char* cache, u64 page_head, u32 num_entries) {
        copy_coded_page(tile, cache + page_head * CODED_ENTRIES, num_entries, THREADS);
    }

    static DEVICE u32 first_dim(u32 lane, u32 i) { return lane % 4 * 4 + i / 2; }
    static constexpr u32 BETWEEN = 2;

    template <typename Query>
    static DEVICE void score(float (&scores)[2][4], Query query, const unsigned char* tile, u32 first, u32 lane) {
        score_coded(scores, query, tile + first * CODE_STRIDE, lane);
    }

    static DEVICE float key_power(const unsigned char* tile, u32 entry) { return power_of(tile[POWERS + entry]); }
    static DEVICE float value_power(const unsigned char* tile, u32 entry) { return power_of(tile[POWERS + PAGE + entry]); }

    static DEVICE void add(float (&out)[DIM_FRAGMENTS][4], const u32 (&weights)[1][4], const unsigned char* tile, u32 first, u32 lane) {
        add_coded_values(out, weights[0], tile + (PAGE + first) * CODE_STRIDE, lane);
    }

    static DEVICE u32 out_dim(u32 n, u32 lane, u32 i) { return n / 2 * 16 + (lane % 4 * 2 + i) * 2 + n % 2; }
};

// `sums` and `maxima` are [rows, kv_heads, parts, GROUP], `partial` is the same times HEAD_DIM.
template <typename Entries>
DEVICE void decode(unsigned char* memory, float* partial, float* maxima, float* sums, const float* q, const typename Entries::Cache* cache,
                   const u32* page_table, const Row* rows, u32 heads, u32 kv_heads, u32 head_dim, u32 part_pages, float scale) {
    const Row row = rows[blockIdx.x];
    u32 kv_head = blockIdx.y, part = blockIdx.z, group = heads / kv_heads;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 first_page = part * part_pages;
    u32 end_page = min_of(first_page + part_pages, (row.num_keys + PAGE - 1) / PAGE);

    auto copy = [&](u32 page) {
        if (page < end_page) {
            u64 page_head = u64(page_table[row.pages + page]) * kv_heads + kv_head;
            u32 num_entries = min_of(PAGE, row.num_keys - page * PAGE);
            Entries::copy(memory + page % STAGES * Entries::BYTES, cache, page_head, num_entries);
        }
        close_copies();
    };
    for (u32 page = 0; page < STAGES - 1; page++) copy(first_page + page);

    // The group's queries as fragments, rounded to bf16; heads beyond the group are zero.
    u32 queries[DIM_STEPS][4];
#pragma unroll
    for (u32 step = 0; step < DIM_STEPS; step++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 head = lane / 4 + i % 2 * 8, d = step * 16 + Entries::first_dim(lane, i);
            const float* at = q + (u64(row.row) * heads + kv_head * group + head) * head_dim + d;
            float low = head < group && d < head_dim ? at[0] : 0.0f;
            float high = head < group && d + Entries::BETWEEN < head_dim ? at[Entries::BETWEEN] : 0.0f;
            queries[step][i] = pack_bf16(low, high);
        }
    }
    auto query = [&](u32 step, u32(&a)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) a[i] = queries[step][i];
    };

    Softmax softmax;
    softmax.clear();
    for (u32 page = first_page; page < end_page; page++) {
        await_copies<STAGES - 2>();
        __syncthreads(); // This page is there for all, and the one before is done with by all.
        copy(page + STAGES - 1);
        const unsigned char* tile = memory + page % STAGES * Entries::BYTES;
        float scores[2][4];
        Entries::score(scores, query, tile, warp * 16, lane);
#pragma unroll
        for (u32 n = 0; n < 2; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 entry = warp * 16 + n * 8 + lane % 4 * 2 + i % 2;
                float score = scores[n][i] * (scale * Entries::key_power(tile, entry));
                scores[n][i] = page * PAGE + entry < row.num_keys ? score : minus_infinity();
            }
        }
        softmax.weigh(scores);
        if constexpr (Entries::HAVE_POWERS) {
#pragma unroll
            for (u32 n = 0; n < 2; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    u32 entry = warp * 16 + n * 8 + lane % 4 * 2 + i % 2;
                    // What lies beyond the keys is of another time, and may be no number.
                    bool is_there = page * PAGE + entry < row.num_keys;
                    scores[n][i] = is_there ? scores[n][i] * Entries::value_power(tile, entry) : 0.0f;
                }
            }
        }
        u32 weights[1][4];
        pack_weights(weights, scores);
        Entries::add(softmax.out, weights, tile, warp * 16, lane);
    }
    await_copies<0>();

    // The warps' results side by side, in the place of pages.
    __syncthreads();
    float* warp_out = reinterpret_cast<float*>(memory);
    float* warp_max = warp_out + WARPS * GROUP * HEAD_DIM;
    float* warp_sum = warp_max + WARPS * GROUP;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 at = warp * GROUP + lane / 4 + half * 8;
        float sum = softmax.whole_sum(half);
        if (lane % 4 == 0) warp_max[at] = softmax.max[half], warp_sum[at] = sum;
#pragma unroll
        for (u32 n = 0; n < DIM_FRAGMENTS; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                warp_out[at * HEAD_DIM + Entries::out_dim(n, lane, i)] = softmax.out[n][2 * half + i];
            }
        }
    }
    __syncthreads();

    u64 base = ((u64(blockIdx.x) * kv_heads + kv_head) * gridDim.z + part) * GROUP;
    for (u32 i = threadIdx.x; i < group * HEAD_DIM; i += THREADS) {
        u32 head = i / HEAD_DIM, d = i % HEAD_DIM;
        float max = minus_infinity();
        for (u32 w = 0; w < WARPS; w++) max = fmaxf(max, warp_max[w * GROUP + head]);
        float base_max = max == minus_infinity() ? 0.0f : max;
        float sum = 0.0f, value = 0.0f;
        for (u32 w = 0; w < WARPS; w++) {
            float share = exp2f(warp_max[w * GROUP + head] - base_max);
            sum += warp_sum[w * GROUP + head] * share;
            value += warp_out[(w * GROUP + head) * HEAD_DIM + d] * share;
        }
        partial[(base + head) * HEAD_DIM + d] = value;
        if (d == 0) maxima[base + head] = max, sums[base + head] = sum;
    }
}

KERNEL(THREADS)
attention_decode(float* partial, float* maxima, float* sums, const float* q, const bf16* cache, const u32* page_table,
                 const Row* rows, u32 heads, u32 kv_heads, u32 head_dim, u32 part_pages, float scale) {
    DYNAMIC_SHARED(memory);
    decode<PlainEntries>(memory, partial, maxima, sums, q, cache, page_table, rows, heads, kv_heads, head_dim, part_pages, scale);
}

KERNEL(THREADS)
attention_decode_fp8(float* partial, float* maxima, float* sums, const float* q, const unsigned char* cache, const u32* page_table,
                     const Row* rows, u32 heads, u32 kv_heads, u32 head_dim, u32 part_pages, float scale) {
    DYNAMIC_SHARED(memory);
    decode<CodedEntries>(memory, partial, maxima, sums, q, cache, page_table, rows, heads, kv_heads, head_dim, part_pages, scale);
}
