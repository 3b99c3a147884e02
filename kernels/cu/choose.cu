// A token from a row of logits, by temperature, top-k, top-p and min-p, and the tokens with the largest logits. A block takes
// a row. The twin, which says what everything means, is choice.rs.
//
// Nothing is sorted. Whatever is looked for is the entry at which a sum, run by falling keys, goes beyond a limit; eight bits of
// the key are settled at a time, by a histogram of the sums of what is still in question. Sums are whole numbers, so that no
// order matters, and with f32 operations that are never fused the token is the twin's.
//
// A row that is edited is edited where it lies, once all that is reported of it was read.
#include "num.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 BINS = 256;
constexpr u32 DIGIT_BITS = 8;
// A weight is 1 at most, and the bits of that are less than 2^30.
constexpr u32 WEIGHT_BITS = 30;
constexpr float ONE = 1099511627776.0f;
constexpr u32 NO_TOKEN = 0xffffffffu;
constexpr u32 NO_MASK = 0xffffffffu;

// As choices.rs has it.
struct Choice {
    u32 uniform_low, uniform_high;
    u32 given;
    float temperature;
    u32 top_k;
    float top_p, min_p;
    u32 top;
    // Of all edits those from the first to before the last, and the first word of the mask.
    u32 first_edit, last_edit;
    u32 mask;
};

struct Edit {
    u32 token;
    float scale, shift;
    // Becomes the logit before the edit.
    float before;
};

struct Found {
    u32 key;
    // The sum of all larger keys.
    u64 before;
};

// One entry of a row after the other, by the threads of a block.
struct Row {
    float* logits;
    u32 vocabulary;
    float max, temperature;
    // [WARPS][BINS], a histogram of each warp: fewer threads wait for the same sum.
    u64* bins;

    DEVICE float weight(u32 i) const {
        float x = (logits[i] - max) / temperature;
        float clamped = fmaxf(x, -87.0f);
        float n = add_rounded(add_rounded(multiply_rounded(clamped, 1.4426950408889634f), 12582912.0f), -12582912.0f);
        float high = add_rounded(clamped, -multiply_rounded(n, 0.6933594f));
        float r = add_rounded(high, -multiply_rounded(n, -2.1219444e-4f));
        float p = 1.0f / 720.0f;
        p = add_rounded(multiply_rounded(p, r), 1.0f / 120.0f);
        p = add_rounded(multiply_rounded(p, r), 1.0f / 24.0f);
        p = add_rounded(multiply_rounded(p, r), 1.0f / 6.0f);
        p = add_rounded(multiply_rounded(p, r), 0.5f);
        p = add_rounded(multiply_rounded(p, r), 1.0f);
        p = add_rounded(multiply_rounded(p, r), 1.0f);
        float scale = f32_of_bits(u32(int(n) + 127) << 23);
        return x < -87.0f ? 0.0f : multiply_rounded(p, scale);
    }

    DEVICE static u64 mass_of(float weight) { return u64(multiply_rounded(weight, ONE)); }
    DEVICE u64 mass(u32 i) const { return mass_of(weight(i)); }
    DEVICE u32 weight_key(u32 i) const { return bits_of_f32(weight(i)); }
    // Falling keys are rising ids.
    DEVICE u32 id_key(u32 i) const { return vocabulary - 1 - i; }
    DEVICE u32 id_bits() const {
        u32 bits = 1;
        while (bits < 32 && (vocabulary - 1) >> bits != 0) bits++;
        return bits;
    }
    // As logits compare, and both noughts alike.
    DEVICE u32 logit_key(u32 i) const {
        u32 bits = bits_of_f32(logits[i] + 0.0f);
        return bits >> 31 ? ~bits : bits | 0x80000000u;
    }
    DEVICE static float logit_of(u32 key) { return f32_of_bits(key >> 31 ? key & 0x7fffffffu : ~key); }

    // A sum over all entries; every thread has it.
    template <typename Measure>
    DEVICE u64 sum(Measure measure) const {
        if (threadIdx.x == 0) bins[0] = 0;
        __syncthreads();
        u64 own = 0;
        for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) own += measure(i);
        add_to(bins, own);
        __syncthreads();
        u64 all = bins[0];
        __syncthreads();
        return all;
    }

    // The key at which the sum of a measure, run by falling keys of so many bits, goes beyond a limit.
    template <typename Key, typename Measure>
    DEVICE Found find(u64 limit, u32 bits, Key key, Measure measure) const {
        u32 settled = 0;
        u64 before = 0;
        for (u32 left = bits; left > 0;) {
            u32 width = min_of(left, DIGIT_BITS), shift = left - width;
            for (u32 bin = threadIdx.x; bin < WARPS * BINS; bin += THREADS) bins[bin] = 0;
            __syncthreads();
            for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) {
                u32 k = key(i);
                if (left < 32 && k >> left != settled) continue;
                u64 more = measure(i);
                u32 digit = (k >> shift) & ((1u << width) - 1);
                if (more > 0) add_to(bins + threadIdx.x / WARP * BINS + digit, more);
            }
            __syncthreads();
            if (threadIdx.x < BINS) {
                u64 all = 0;
                for (u32 warp = 0; warp < WARPS; warp++) all += bins[warp * BINS + threadIdx.x];
                bins[threadIdx.x] = all;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                u32 digit = (1u << width) - 1;
                while (digit > 0 && before + bins[digit] <= limit) before += bins[digit--];
                bins[BINS] = digit, bins[BINS + 1] = before;
            }
            __syncthreads();
            settled = settled << width | u32(bins[BINS]);
            before = bins[BINS + 1];
            __syncthreads();
            left = shift;
        }
        return Found{settled, before};
    }

    // The id of the `nth` entry of a key, from 0.
    template <typename Key>
    DEVICE u32 nth_of(u64 nth, u32 wanted, Key key) const {
        auto is_wanted = [&](u32 i) { return u64(key(i) == wanted); };
        return vocabulary - 1 - find(nth, id_bits(), [&](u32 i) { return id_key(i); }, is_wanted).key;
    }

    DEVICE void edit(Edit* edits, u32 count, const u32* mask) {
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            float before = logits[edits[i].token], scale = edits[i].scale;
            float scaled = before > 0.0f ? before / scale : multiply_rounded(before, scale);
            edits[i].before = before;
            logits[edits[i].token] = add_rounded(scaled, edits[i].shift);
        }
        __syncthreads();
        for (u32 i = threadIdx.x; mask && i < vocabulary; i += THREADS)
            if ((mask[i / 32] >> i % 32 & 1) == 0) logits[i] = -f32_of_bits(0x7f800000u);
        __syncthreads();
    }

    DEVICE u32 draw(const Choice& choice) const {
        auto mass = [&](u32 i) { return this->mass(i); };
        auto key = [&](u32 i) { return weight_key(i); };
        u64 uniform = u64(choice.uniform_high) << 32 | choice.uniform_low;
        u64 total = sum(mass);
        bool has_top_k = choice.top_k > 0 && choice.top_k < vocabulary;
        if (!has_top_k && choice.top_p >= 1.0f && choice.min_p == 0.0f && choice.top_k == 0) {
            auto id = [&](u32 i) { return id_key(i); };
            return vocabulary - 1 - find(multiply_high(total, uniform), id_bits(), id, mass).key;
        }
        u64 kept = total;
        if (has_top_k) {
            Found last = find(choice.top_k - 1, WEIGHT_BITS, key, [&](u32) { return u64(1); });
            u64 heavier = sum([&](u32 i) { return weight_key(i) > last.key ? this->mass(i) : u64(0); });
            kept = heavier + (choice.top_k - last.before) * mass_of(f32_of_bits(last.key));
        }
        if (choice.top_p < 1.0f) {
            u64 limit = u64(ceil(double(choice.top_p) * double(kept)));
            Found last = find(limit - 1, WEIGHT_BITS, key, mass);
            u64 each = mass_of(f32_of_bits(last.key));
            u64 nucleus = last.before + ((limit - 1 - last.before) / each + 1) * each;
            kept = nucleus < kept ? nucleus : kept;
        }
        if (choice.min_p > 0.0f) {
            u64 heavy = sum([&](u32 i) { return weight(i) >= choice.min_p ? this->mass(i) : u64(0); });
            kept = heavy < kept ? heavy : kept;
        }
        u64 target = multiply_high(kept, uniform);
        Found found = find(target, WEIGHT_BITS, key, mass);
        return nth_of((target - found.before) / mass_of(f32_of_bits(found.key)), found.key, key);
    }

    // Writes ids and logits of the largest, in any order. All of them are read when it returns: a row is edited next.
    DEVICE void largest(u32 count, u32* out) const {
        auto key = [&](u32 i) { return logit_key(i); };
        count = min_of(count, vocabulary);
        Found last = find(count - 1, 32, key, [&](u32) { return u64(1); });
        if (threadIdx.x == 0) bins[0] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < vocabulary; i += THREADS) {
            if (logit_key(i) <= last.key) continue;
            u32 place = u32(add_to(bins, 1));
            out[2 * place] = i, out[2 * place + 1] = bits_of_f32(logits[i]);
        }
        __syncthreads();
        for (u32 place = u32(last.before); place < count; place++) {
            u32 i = nth_of(place - last.before, last.key, key);
            if (threadIdx.x == 0) out[2 * place] = i, out[2 * place + 1] = bits_of_f32(logits[i]);
        }
        __syncthreads();
    }
};

// `stats` is logit_stats.cu's, [rows, 3]; `out` is [rows, width]: token, logit, then pairs of them. The token also goes to `tokens`,
// where there are any.
KERNEL(THREADS)
choose(u32* out, float* logits, const u32* stats, const Choice* choices, Edit* edits, const u32* masks, u32 vocabulary, u32 width,
       u32* tokens) {
    __shared__ u64 bins[WARPS * BINS];
    const Choice choice = choices[blockIdx.x];
    u32 argmax = stats[u64(blockIdx.x) * 3];
    float max = f32_of_bits(stats[u64(blockIdx.x) * 3 + 1]);
    Row row = {logits + u64(blockIdx.x) * vocabulary, vocabulary, max, choice.temperature, bins};
    u32* answer = out + u64(blockIdx.x) * width;
    auto say = [&](u32 token, float logit) {
        if (threadIdx.x != 0) return;
        answer[0] = token, answer[1] = bits_of_f32(logit);
        if (tokens) tokens[blockIdx.x] = token;
    };
    // Of a row that is not finite nothing can be drawn, and its statistics say so.
    if (!(max - max == 0.0f)) {
        say(NO_TOKEN, max);
        return;
    }
    if (choice.top > 0) row.largest(choice.top, answer + 2);
    u32 token = argmax;
    if (choice.given != NO_TOKEN) token = choice.given;
    Edit* own = edits + choice.first_edit;
    u32 count = choice.given == NO_TOKEN ? choice.last_edit - choice.first_edit : 0;
    bool is_masked = choice.given == NO_TOKEN && choice.mask != NO_MASK;
    if (count > 0 || is_masked) {
        row.edit(own, count, is_masked ? masks + choice.mask : nullptr);
        u32 largest = row.find(0, 32, [&](u32 i) { return row.logit_key(i); }, [](u32) { return u64(1); }).key;
        token = row.nth_of(0, largest, [&](u32 i) { return row.logit_key(i); });
        row.max = Row::logit_of(largest);
        if (!(row.max - row.max == 0.0f)) {
            say(NO_TOKEN, max);
            return;
        }
    }
    if (choice.given == NO_TOKEN && choice.temperature != 0.0f) token = row.draw(choice);
    say(token, row.logits[token]);
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += THREADS)
        if (own[i].token == token) answer[1] = bits_of_f32(own[i].before);
}
