// From logits to tokens: penalties, biases and bans, temperature, top-k, top-p, min-p, and a draw whose noise is a pure
// function of (seed, token id, output index, choice index), so that it depends on nothing else in the batch.
//
// The draw is the exponential race (equal to the Gumbel-max trick): score = logit / T - log(E), E = -log(u), u from
// Philox-4x32-10 (Salmon et al., SC 2011); the best score wins, ties go to the lowest id.
//
// kernels/gpu/sample.py chooses the very same tokens: every comparison below is of numbers that come out the same there,
// float32 by the same operations, sums in fixed point (any order) or in a fixed tree.
#include "parallel.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace octavo {
namespace {

// One row of work; kernels/sample.py mirrors this layout.
struct Row {
    uint64_t seed;
    float temperature;  // 0: greedy
    float top_p, min_p;
    float presence_penalty, frequency_penalty, repetition_penalty;
    int32_t top_k;  // 0: off
    int32_t slot;   // row of `tokens`
    int32_t prompt_len, total_len;  // tokens of the prompt, of prompt and output
    int32_t choice_index;
    int32_t num_top;  // top logprobs wanted; -1: no logprobs at all
    int32_t target;   // >= 0: no draw, the logprob of this token is wanted
    int32_t edits_begin, edits_end;      // range in `edits`
    int32_t allowed_begin, allowed_end;  // range in `allowed`; empty: every token
};

struct Edit {
    int32_t id;
    float add;  // -inf bans the token
};

constexpr int LOGICAL_SHARDS = 8;
constexpr int SHARD_VECTORS = 8;  // a shard's exponentials are added in 8 * 16 lanes, in turn, then in a tree
constexpr uint32_t DOMAIN_TOKEN = 0;
constexpr float MAX_NOISE = 16.65f;  // -log(-log(1 - 2^-24)) rounded up: the most that noise can add to a logit

struct U32x4 {
    u32x16 word[4];
};

U32x4 philox(u32x16 block, uint32_t index, uint32_t choice, uint64_t seed) {
    u32x16 c0 = block, c1 = block - block + index, c2 = block - block + choice, c3 = block - block + DOMAIN_TOKEN;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    typedef uint64_t u64x16 __attribute__((vector_size(128)));
    for (int round = 0; round < 10; round++) {
        const u64x16 p0 = __builtin_convertvector(c0, u64x16) * 0xD2511F53u;
        const u64x16 p1 = __builtin_convertvector(c2, u64x16) * 0xCD9E8D57u;
        const u32x16 hi0 = __builtin_convertvector(p0 >> 32, u32x16), lo0 = __builtin_convertvector(p0, u32x16);
        const u32x16 hi1 = __builtin_convertvector(p1 >> 32, u32x16), lo1 = __builtin_convertvector(p1, u32x16);
        c0 = hi1 ^ c1 ^ k0;
        c1 = lo1;
        c2 = hi0 ^ c3 ^ k1;
        c3 = lo0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// -log(E) from 32 random bits: u = (23 high bits + 1/2) / 2^23, never 0 or 1.
f32x16 noise(u32x16 bits) {
    const f32x16 u = fma(__builtin_convertvector((i32x16)(bits >> 9), f32x16), splat(0x1p-23f), splat(0x1p-24f));
    return -log(-log(u));
}

typedef int64_t i64x16 __attribute__((vector_size(128)));

// Weights in [0, 1] in units of 2^-40, cut off: their sums are exact, hence the same in any order.
i64x16 fixed(f32x16 weight) { return __builtin_convertvector(weight * splat(0x1p40f), i64x16); }

int64_t sum_fixed(i64x16 v) {
    int64_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

f32x16 load_partial(const float* p, int64_t count, float fill) {
    if (count >= LANES) return load(p);
    f32x16 v = splat(fill);
    for (int64_t i = 0; i < count; i++) v[i] = p[i];
    return v;
}

struct Best {
    float score = NEG_INF;
    int32_t id = -1;
    void offer(float s, int32_t i) {
        if (s > score || (s == score && i < id) || id < 0) score = s, id = i;
    }
};

using Candidate = std::pair<float, int32_t>;  // (logit, token id)
bool before(const Candidate& a, const Candidate& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; }

class Sampler {
public:
    Sampler(const float* logits, int64_t vocab, const Row& row, const int32_t* tokens, const Edit* edits,
            const int32_t* allowed)
        : raw_(logits), vocab_(vocab), row_(row), tokens_(tokens), edits_(edits), allowed_(allowed) {}

    // False where the logits hold NaN or +inf, or nothing but -inf.
    bool finite() {
        likeliest_raw_ = likeliest(raw_);
        return std::isfinite(likeliest_raw_.score);
    }

    // log(sum(exp(raw))): eight logical shards of the vocabulary, each relative to its own maximum, merged in a fixed tree.
    float log_sum_exp() const {
        float shard_max[LOGICAL_SHARDS], shard_sum[LOGICAL_SHARDS];
        for (int s = 0; s < LOGICAL_SHARDS; s++) {
            const int64_t begin = s * vocab_ / LOGICAL_SHARDS, end = (s + 1) * vocab_ / LOGICAL_SHARDS;
            f32x16 top = splat(NEG_INF), sums[SHARD_VECTORS] = {};
            for (int64_t i = begin; i < end; i += LANES) top = max(top, load_partial(raw_ + i, end - i, NEG_INF));
            shard_max[s] = max_lanes(top);
            if (shard_max[s] > NEG_INF) {
                const f32x16 origin = splat(shard_max[s]);
                int64_t i = begin;
                for (; i + SHARD_VECTORS * LANES <= end; i += SHARD_VECTORS * LANES)
                    for (int v = 0; v < SHARD_VECTORS; v++) sums[v] = sums[v] + exp(load(raw_ + i + v * LANES) - origin);
                for (int v = 0; i < end; i += LANES, v++)
                    sums[v] = sums[v] + exp(load_partial(raw_ + i, end - i, NEG_INF) - origin);
            }
            for (int half = SHARD_VECTORS / 2; half > 0; half /= 2)
                for (int v = 0; v < half; v++) sums[v] = sums[v] + sums[v + half];
            shard_sum[s] = sum_lanes(sums[0]);
        }
        for (int half = 1; half < LOGICAL_SHARDS; half *= 2)
            for (int s = 0; s < LOGICAL_SHARDS; s += 2 * half) {
                const float m = std::max(shard_max[s], shard_max[s + half]);
                const float a = shard_max[s] > NEG_INF ? exp(shard_max[s] - m) * shard_sum[s] : 0.0f;
                const float b = shard_max[s + half] > NEG_INF ? exp(shard_max[s + half] - m) * shard_sum[s + half] : 0.0f;
                shard_max[s] = m;
                shard_sum[s] = a + b;
            }
        return shard_max[0] + log(shard_sum[0]);
    }

    // The `count` best raw logits, best first.
    void top(int count, int32_t* ids, float* logits) const {
        std::vector<Candidate> best;  // a heap whose front is the worst kept
        for (int64_t i = 0; i < vocab_; i++) {
            const Candidate c{raw_[i], (int32_t)i};
            if ((int)best.size() < count) {
                best.push_back(c);
                std::push_heap(best.begin(), best.end(), before);
            } else if (before(c, best.front())) {
                std::pop_heap(best.begin(), best.end(), before);
                best.back() = c;
                std::push_heap(best.begin(), best.end(), before);
            }
        }
        std::sort(best.begin(), best.end(), before);
        for (int i = 0; i < (int)best.size(); i++) ids[i] = best[i].second, logits[i] = best[i].first;
    }

    // Bans that leave no token at all are not applied.
    int32_t draw() {
        edit(true);
        Best best = x_ == raw_ ? likeliest_raw_ : likeliest(x_);
        if (best.id < 0) {
            edit(false);
            best = likeliest(x_);
        }
        if (best.id < 0)  // the model itself gives the allowed ones no probability
            return row_.allowed_begin < row_.allowed_end ? allowed_[row_.allowed_begin] : likeliest_raw_.id;
        if (row_.temperature == 0.0f) return best.id;
        max_ = best.score;
        const bool filtered = (row_.top_k > 0 && row_.top_k < vocab_) || row_.top_p < 1.0f || row_.min_p > 0.0f;
        return filtered ? draw_among(survivors(), best.id) : draw_among_all(best.id);
    }

private:
    // The lowest id among equals. Id -1, score -inf: there are none but -inf; score NaN: there is one.
    Best likeliest(const float* x) const {
        f32x16 top = splat(NEG_INF);
        i32x16 nan = {}, at = {}, ids = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int64_t i = 0; i < vocab_; i += LANES, ids += LANES) {
            const f32x16 v = load_partial(x + i, vocab_ - i, NEG_INF);
            const i32x16 better = v > top;
            nan |= v != v;
            at = better ? ids : at;
            top = select(better, v, top);
        }
        Best best;
        for (int i = 0; i < LANES; i++) {
            if (nan[i]) return {std::numeric_limits<float>::quiet_NaN(), -1};
            if (top[i] > NEG_INF) best.offer(top[i], at[i]);
        }
        return best;
    }

    // Penalties first, on the raw logits, then biases and bans, then the allowed set.
    void edit(bool with_bans) {
        x_ = raw_;
        const bool penalised =
            row_.presence_penalty != 0.0f || row_.frequency_penalty != 0.0f || row_.repetition_penalty != 1.0f;
        const bool restricted = row_.allowed_begin < row_.allowed_end;
        if (!penalised && !restricted && row_.edits_begin == row_.edits_end) return;
        static thread_local std::vector<float> scratch;
        static thread_local std::vector<int32_t> counts;  // all zero between calls
        scratch.assign(raw_, raw_ + vocab_);
        float* x = scratch.data();
        if (penalised) {
            counts.resize(std::max<size_t>(counts.size(), vocab_));
            for (int32_t i = 0; i < row_.total_len; i++) {  // repetition: once for each token of prompt and output
                int32_t& seen = counts[tokens_[i]];
                if (seen++ == 0 && row_.repetition_penalty != 1.0f) {
                    float& v = x[tokens_[i]];
                    v = v > 0.0f ? v / row_.repetition_penalty : v * row_.repetition_penalty;
                }
            }
            for (int32_t i = 0; i < row_.total_len; i++) counts[tokens_[i]] = 0;
            for (int32_t i = row_.prompt_len; i < row_.total_len; i++) counts[tokens_[i]]++;
            for (int32_t i = row_.prompt_len; i < row_.total_len; i++) {
                int32_t& count = counts[tokens_[i]];
                if (count == 0) continue;
                x[tokens_[i]] = x[tokens_[i]] - (row_.presence_penalty + row_.frequency_penalty * (float)count);
                count = 0;
            }
        }
        for (int32_t e = row_.edits_begin; e < row_.edits_end; e++)
            if (with_bans || edits_[e].add > NEG_INF) x[edits_[e].id] = x[edits_[e].id] + edits_[e].add;
        if (restricted) {
            static thread_local std::vector<float> kept;
            kept.clear();
            for (int32_t a = row_.allowed_begin; a < row_.allowed_end; a++) kept.push_back(x[allowed_[a]]);
            std::fill(x, x + vocab_, NEG_INF);
            for (int32_t a = row_.allowed_begin; a < row_.allowed_end; a++) x[allowed_[a]] = kept[a - row_.allowed_begin];
        }
        x_ = x;
    }

    f32x16 weights(f32x16 x) const { return exp((x - splat(max_)) / splat(row_.temperature)); }

    // Weights of kept[begin] and the 15 behind it; 0 past the end.
    f32x16 weights(const std::vector<Candidate>& kept, size_t begin) const {
        f32x16 x = splat(NEG_INF);
        for (size_t i = 0; i < LANES && begin + i < kept.size(); i++) x[i] = kept[begin + i].first;
        return weights(x);
    }

    int64_t mass(const std::vector<Candidate>& kept) const {
        i64x16 sums = {};
        for (size_t i = 0; i < kept.size(); i += LANES) sums += fixed(weights(kept, i));
        return sum_fixed(sums);
    }

    int64_t mass_of_all() const {
        i64x16 sums = {};
        for (int64_t i = 0; i < vocab_; i += LANES) sums += fixed(weights(load_partial(x_ + i, vocab_ - i, NEG_INF)));
        return sum_fixed(sums);
    }

    // What the tokens kept by top-p have together at least.
    int64_t target_mass(int64_t total) const {
        return std::max<int64_t>(1, (int64_t)((double)row_.top_p * (double)total));
    }

    // Tokens that survive top-k, then top-p among those, then min-p. The order that counts is (logit, lowest id).
    std::vector<Candidate>& survivors() const {
        static thread_local std::vector<Candidate> kept;
        const int64_t k = row_.top_k > 0 ? std::min<int64_t>(row_.top_k, vocab_) : vocab_;
        const bool by_mass = row_.top_p < 1.0f && k == vocab_;
        int64_t target = by_mass ? target_mass(mass_of_all()) : 0;
        // Going through the whole vocabulary is dear: collect what lies within a margin of the best, and widen it until enough.
        for (float margin = 8.0f * row_.temperature;; margin *= 2.0f) {
            kept.clear();
            const float floor = margin < 1e30f ? max_ - margin : NEG_INF;
            int64_t below = 0;
            for (int64_t i = 0; i < vocab_; i++) {
                if (x_[i] >= floor && x_[i] > NEG_INF) kept.emplace_back(x_[i], (int32_t)i);
                else if (x_[i] > NEG_INF) below++;
            }
            if (below == 0) break;
            if (k < vocab_ ? (int64_t)kept.size() >= k
                : by_mass  ? mass(kept) >= target
                           : weights(splat(floor))[0] < 0.999f * row_.min_p)  // exp need not be monotone in the last bit
                break;
        }
        if ((int64_t)kept.size() > k) {
            std::nth_element(kept.begin(), kept.begin() + k, kept.end(), before);
            kept.resize(k);
        }
        if (row_.top_p < 1.0f) {
            if (!by_mass) target = target_mass(mass(kept));
            std::sort(kept.begin(), kept.end(), before);
            int64_t mass = 0;
            size_t count = 0;
            while (mass < target && count < kept.size()) {
                const i64x16 next = fixed(weights(kept, count));
                for (int i = 0; i < LANES && mass < target && count < kept.size(); i++, count++) mass += next[i];
            }
            kept.resize(count);
        }
        if (row_.min_p > 0.0f) {
            size_t count = 0;
            for (size_t begin = 0; begin < kept.size(); begin += LANES) {
                const f32x16 w = weights(kept, begin);
                for (size_t i = begin; i < std::min(begin + LANES, kept.size()); i++)
                    if (w[i - begin] >= row_.min_p) kept[count++] = kept[i];
            }
            kept.resize(count);
        }
        return kept;
    }

    int32_t draw_among(const std::vector<Candidate>& kept, int32_t likeliest) const {
        Best best;
        best.offer(score_of(likeliest), likeliest);
        for (size_t begin = 0; begin < kept.size(); begin += LANES) {
            const size_t count = std::min<size_t>(LANES, kept.size() - begin);
            u32x16 block = {};
            f32x16 x = splat(NEG_INF);
            for (size_t i = 0; i < count; i++) {
                block[i] = (uint32_t)kept[begin + i].second / 4;
                x[i] = kept[begin + i].first;
            }
            const U32x4 random = philox(block, index(), row_.choice_index, row_.seed);
            u32x16 bits = {};
            for (size_t i = 0; i < count; i++) bits[i] = random.word[kept[begin + i].second % 4][i];
            const f32x16 score = x / splat(row_.temperature) + noise(bits);
            for (size_t i = 0; i < count; i++)
                if (score[i] > NEG_INF) best.offer(score[i], kept[begin + i].second);
        }
        return best.id;
    }

    // Every token survives: 64 at a time, but noise only where it could still win.
    int32_t draw_among_all(int32_t likeliest) const {
        Best best;
        best.offer(score_of(likeliest), likeliest);
        const f32x16 t = splat(row_.temperature);
        u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int64_t begin = 0; begin < vocab_; begin += 4 * LANES) {
            f32x16 x[4], top = splat(NEG_INF);
            for (int j = 0; j < 4; j++) {
                const int64_t at = begin + j * LANES;
                x[j] = at < vocab_ ? load_partial(x_ + at, vocab_ - at, NEG_INF) / t : splat(NEG_INF);
                top = max(top, x[j]);
            }
            if (max_lanes(top) + MAX_NOISE < best.score) continue;
            const U32x4 random = philox(lane + (uint32_t)(begin / 4), index(), row_.choice_index, row_.seed);
            alignas(64) float in_order[4 * LANES];  // token begin + 4 * lane + word
            for (int w = 0; w < 4; w++) {
                const f32x16 g = noise(random.word[w]);
                for (int i = 0; i < LANES; i++) in_order[4 * i + w] = g[i];
            }
            for (int j = 0; j < 4; j++) {
                const f32x16 score = x[j] + load(in_order + j * LANES);
                for (int i = 0; i < LANES; i++)
                    if (score[i] > NEG_INF) best.offer(score[i], (int32_t)(begin + j * LANES + i));
            }
        }
        return best.id;
    }

    float score_of(int32_t id) const {
        const u32x16 block = u32x16{} + (uint32_t)id / 4;
        const u32x16 bits = philox(block, index(), row_.choice_index, row_.seed).word[id % 4];
        return (splat(x_[id]) / splat(row_.temperature) + noise(bits))[0];
    }

    uint32_t index() const { return (uint32_t)(row_.total_len - row_.prompt_len); }

    const float* raw_;
    const float* x_ = nullptr;  // after the edits
    int64_t vocab_;
    const Row& row_;
    const int32_t* tokens_;
    const Edit* edits_;
    const int32_t* allowed_;
    Best likeliest_raw_;
    float max_ = 0.0f;  // after the edits
};

struct Args {
    int64_t num_rows;
    const float* logits;    // [num_rows, vocab]
    const void* rows;       // [num_rows] of Row
    const int32_t* tokens;  // [slots, tokens_stride]
    const void* edits;
    const int32_t* allowed;
    int32_t* token_ids;   // [num_rows]: the token drawn (or the target); -1 where the logits are not finite
    float* logprobs;      // [num_rows]; this and below from the raw logits, where num_top >= 0
    int32_t* top_ids;     // [num_rows, max_top]
    float* top_logprobs;  // [num_rows, max_top]
    int64_t vocab, tokens_stride, max_top;
};

void sample_row(const Args& a, int64_t r) {
    const Row& row = ((const Row*)a.rows)[r];
    const float* x = a.logits + r * a.vocab;
    Sampler sampler(x, a.vocab, row, a.tokens + row.slot * a.tokens_stride, (const Edit*)a.edits, a.allowed);
    if (!sampler.finite()) {
        a.token_ids[r] = -1;
        return;
    }
    a.token_ids[r] = row.target >= 0 ? row.target : sampler.draw();
    if (row.num_top < 0) return;
    const float lse = sampler.log_sum_exp();
    a.logprobs[r] = x[a.token_ids[r]] - lse;
    if (row.num_top == 0) return;
    float* top_logprobs = a.top_logprobs + r * a.max_top;
    sampler.top(row.num_top, a.top_ids + r * a.max_top, top_logprobs);
    for (int32_t i = 0; i < row.num_top; i++) top_logprobs[i] = top_logprobs[i] - lse;
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_sample(const void* args) {
    const Args& a = *(const Args*)args;
    parallel_for(a.num_rows, [&](int64_t r) { sample_row(a, r); });
}
