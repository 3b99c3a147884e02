// Attention of up to 64 queries at once, which share a sequence and a KV head: some rows of the group's heads. A block
// takes a tile and a KV head, a warp sixteen queries; all walk the pages from the first.
//
// A query's result depends on its sequence alone, to the bit, whatever stands beside it: pages are walked in order at
// absolute positions, and what a query may not see counts for nothing, not even if it is no number.
#include "attention.cuh"

constexpr u32 THREADS = 128;
constexpr u32 QUERIES = THREADS / WARP * 16;
// Pages in a block's memory at once, as attention.rs has it: of wide heads one, so that two blocks run where one would, each of
// which computes while the other waits, and that a block has room on every GPU.
constexpr u32 STAGES = HEAD_DIM > 128 ? 1 : 2;
// Keys of a page that are scored together: of wide heads half of them, for sums of weights times values take half of a thread's
// registers then.
constexpr u32 KEYS = HEAD_DIM > 128 ? PAGE / 2 : PAGE;

// Rows of a sequence that a block takes: PrefillTile of attention.rs.
struct Tile {
    // Of the batch's rows, the first, and how many; times the group at most QUERIES.
    u32 first_row;
    u32 num_rows;
    u32 first_position;
    // Where the sequence's pages begin in the table.
    u32 pages;
};

DEVICE bool is_no_number(u32 pair) {
    return (pair & 0x7f80u) == 0x7f80u || (pair & 0x7f800000u) == 0x7f800000u;
}

// Makes KEYS entries of a tile zero, from `first` on.
DEVICE void forget_from(bf16* tile, u32 first) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < (KEYS - first) * HEAD_DIM; i += THREADS) {
        tile[(first + i / HEAD_DIM) * STRIDE + i % HEAD_DIM] = 0;
    }
}

// Whether some of KEYS entries of a tile is no number or infinite; the same for all threads.
DEVICE bool has_no_number(const bf16* tile) {
    bool found = false;
    for (u32 i = threadIdx.x; i < KEYS * HEAD_DIM / 2; i += THREADS) {
        u32 entry = i / (HEAD_DIM / 2), d = i % (HEAD_DIM / 2) * 2;
        found |= is_no_number(*reinterpret_cast<const u32*>(tile + entry * STRIDE + d));
    }
    return __syncthreads_or(found);
}

// A head's entries of pages in bf16, which are multiplied where they arrive.
struct PlainEntries {
    static constexpr u32 BYTES = STAGES * 2 * PAGE * STRIDE * 2;
    typedef bf16 Cache;

    static DEVICE bf16* tile(unsigned char* memory, u32 page) {
        return reinterpret_cast<bf16*>(memory) + page % STAGES * 2 * PAGE * STRIDE;
    }

    static DEVICE void copy(unsigned char* memory, u32 page, const bf16* cache, u64 page_head, u32 num_entries) {
        const bf16* entries = cache + page_head * 2 * PAGE * HEAD_DIM;
        copy_page(tile(memory, page), entries, num_entries, THREADS);
        copy_page(tile(memory, page) + PAGE * STRIDE, entries + PAGE * HEAD_DIM, num_entries, THREADS);
    }

    static DEVICE void unpack(unsigned char*, u32, u32) {}
};

// The same in E4M3: a block makes a page in bf16 of it once, for all of its warps.
struct CodedEntries {
    static constexpr u32 TILE = 2 * PAGE * STRIDE * 2;
    static constexpr u32 BYTES = TILE + STAGES * CODED_PAGE;
    typedef unsigned char Cache;

    static DEVICE bf16* tile(unsigned char* memory, u32) { return reinterpret_cast<bf16*>(memory); }

    static DEVICE void copy(unsigned char* memory, u32 page, const unsigned char* cache, u64 page_head, u32 num_entries) {
        copy_coded_page(memory + TILE + page % STAGES * CODED_PAGE, cache + page_head * CODED_ENTRIES, num_entries, THREADS);
    }

    static DEVICE void unpack(unsigned char* memory, u32 page, u32 num_entries) {
        const unsigned char* coded = memory + TILE + page % STAGES * CODED_PAGE;
        for (u32 word = threadIdx.x; word < 2 * PAGE * (HEAD_DIM / 4); word += THREADS) {
            u32 entry = word / (HEAD_DIM / 4), d = word % (HEAD_DIM / 4) * 4;
            u32 pairs[2];
            bf16_of_codes(pairs, *reinterpret_cast<const u32*>(coded + entry * CODE_STRIDE + d));
            // What lies beyond the keys is of another time, and may be no number.
            float power = entry % PAGE < num_entries ? power_of(coded[POWERS + entry]) : 0.0f;
            u32* to = reinterpret_cast<u32*>(memory) + (entry * STRIDE + d) / 2;
            to[0] = pack_bf16(f32_of_bits(pairs[0] << 16) * power, f32_of_bits(pairs[1] << 16) * power);
            to[1] = pack_bf16(f32_of_bits(pairs[0] & 0xffff0000u) * power, f32_of_bits(pairs[1] & 0xffff0000u) * power);
        }
        __syncthreads();
    }
};

template <typename Entries>
DEVICE void prefill(unsigned char* memory, bf16* out, const float* q, const typename Entries::Cache* cache, const u32* page_table,
                    const Tile* tiles, u32 heads, u32 kv_heads, u32 head_dim, u32 out_stride, float scale) {
    bf16* queries = reinterpret_cast<bf16*>(memory + Entries::BYTES);
    const Tile tile = tiles[blockIdx.x];
    u32 kv_head = blockIdx.y, group = heads / kv_heads;
    u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 num_queries = tile.num_rows * group;
    u32 last_position = tile.first_position + tile.num_rows - 1;
    u32 num_pages = last_position / PAGE + 1;

    auto copy = [&](u32 page) {
        if (page < num_pages) {
            u64 page_head = u64(page_table[tile.pages + page]) * kv_heads + kv_head;
            Entries::copy(memory, page, cache, page_head, min_of(PAGE, last_position + 1 - page * PAGE));
        }
        close_copies();
    };
    if (STAGES > 1) copy(0);

    // The queries, rounded to bf16; those beyond the tile are zero. The first page's barrier is theirs too.
    for (u32 i = threadIdx.x; i < QUERIES * HEAD_DIM; i += THREADS) {
        u32 query = i / HEAD_DIM, d = i % HEAD_DIM;
        u64 at = u64(tile.first_row + query / group) * heads + kv_head * group + query % group;
        bool is_there = query < num_queries && d < head_dim;
        queries[query * STRIDE + d] = is_there ? bf16_of(q[at * head_dim + d]) : bf16(0);
    }
    const bf16* lane_queries = queries + (warp * 16 + lane % 16) * STRIDE + lane / 16 * 8;
    auto query = [&](u32 step, u32(&a)[4]) { load_matrices(a, lane_queries + step * 16); };
    // The last position that each of this lane's two queries may see.
    u32 rows[2], last[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        rows[half] = min_of((warp * 16 + lane / 4 + half * 8) / group, tile.num_rows - 1);
        last[half] = tile.first_position + rows[half];
    }

    Softmax softmax;
    softmax.clear();
    for (u32 page = 0; page < num_pages; page++) {
        copy(page + STAGES - 1);
        await_copies<STAGES - 1>();
        __syncthreads();
        Entries::unpack(memory, page, min_of(PAGE, last_position + 1 - page * PAGE));
#pragma unroll 1
        for (u32 part = 0; part < PAGE; part += KEYS) {
            const bf16* keys = Entries::tile(memory, page) + part * STRIDE;
            bf16* values = Entries::tile(memory, page) + (PAGE + part) * STRIDE;
            u32 position = page * PAGE + part;
            float scores[KEYS / 8][4];
            score(scores, query, keys, lane);
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    bool is_seen = position + n * 8 + lane % 4 * 2 + i % 2 <= last[i / 2];
                    scores[n][i] = is_seen ? scores[n][i] * scale : minus_infinity();
                }
            }
            softmax.weigh(scores);
            u32 weights[KEYS / 16][4];
            pack_weights(weights, scores);
            // A weight of zero times what is no number is no number: where a row may not see a value that is none, rows take
            // their turns from the last to the first, and forget what they may not see.
            bool hides = tile.num_rows > 1 && position + KEYS - 1 > tile.first_position;
            bool in_turns = hides && has_no_number(values);
            for (u32 turn = in_turns ? tile.num_rows : 1; turn-- > 0;) {
                if (in_turns) {
                    u32 end = tile.first_position + turn + 1;
                    __syncthreads();
                    forget_from(values, end <= position ? 0 : min_of(KEYS, end - position));
                    __syncthreads();
                }
                add_values(softmax.out, weights, values, lane, [&](u32 half) { return !in_turns || rows[half] == turn; });
            }
        }
        __syncthreads(); // Nobody reads this page any more when it is written over.
    }
    await_copies<0>();

#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        float sum = softmax.whole_sum(half);
        u32 query = warp * 16 + lane / 4 + half * 8;
        if (query >= num_queries) continue;
        bf16* to = out + u64(tile.first_row + query / group) * out_stride + (kv_head * group + query % group) * head_dim;
#pragma unroll
        for (u32 n = 0; n < DIM_FRAGMENTS; n++) {
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 d = n * 8 + lane % 4 * 2 + i;
                if (d < head_dim) to[d] = bf16_of(softmax.out[n][2 * half + i] / sum);
            }
        }
    }
}

KERNEL(THREADS)
attention_prefill(bf16* out, const float* q, const bf16* cache, const u32* page_table, const Tile* tiles, u32 heads,
                  u32 kv_heads, u32 head_dim, u32 out_stride, float scale) {
    DYNAMIC_SHARED(memory);
    prefill<PlainEntries>(memory, out, q, cache, page_table, tiles, heads, kv_heads, head_dim, out_stride, scale);
}

KERNEL(THREADS)
attention_prefill_fp8(bf16* out, const float* q, const unsigned char* cache, const u32* page_table, const Tile* tiles, u32 heads,
                      u32 kv_heads, u32 head_dim, u32 out_stride, float scale) {
    DYNAMIC_SHARED(memory);
    prefill<CodedEntries>(memory, out, q, cache, page_table, tiles, heads, kv_heads, head_dim, out_stride, scale);
}
