// Causal attention over a paged KV cache, with online softmax (Milakov and Gimelshein, arXiv 1805.02867) and grouped
// query heads, for a batch in which each sequence brings any number of new tokens.
//
// One order of arithmetic for every query: tiles of TILE keys aligned to position 0, from the first to the last; inside a
// tile, scores sum over the head from 0 up and outputs sum over the keys from 0 up. A query's bits therefore do not depend
// on how many queries share the call: decode, chunked and whole prefill agree. In bfloat16 the weights of a tile are
// rounded to bfloat16, and their sum is that of the rounded ones.
#include "parallel.h"
#include "vec.h"

#include <algorithm>
#include <vector>

namespace octavo {
namespace {

constexpr int TILE = 64, GROUPS = TILE / LANES;  // keys of a tile, in groups of one vector
constexpr int MAX_HEAD = 256;
constexpr int MAX_ROWS = 16;    // (token, head) pairs of one KV head that share the loads of a tile
constexpr int VECTOR_ROWS = 4;  // rows whose sums fit the vector registers

struct Args {
    int64_t tokens;
    void* out;                    // [tokens, heads * head_size], contiguous
    const void* q;                // [tokens, heads * head_size], row stride q_stride
    const void* cache;            // layout: see rotary_kv_write.cpp
    const int32_t* block_tables;  // [sequences, table_stride]
    const int32_t* token_begins;  // [sequences + 1], the last one = tokens
    const int32_t* context_lens;  // [sequences]: tokens in the cache, the new ones included
    int64_t table_stride, q_stride, heads, kv_heads, head_size, block_size, window;
    float scale;
    int32_t is_bf16;
};

template <typename T>
struct Attention : Args {
    static constexpr int S = STEP<T>;

    explicit Attention(const Args& args) : Args(args) {}

    struct Rows {
        int count;
        int64_t position[MAX_ROWS];
        int64_t q_offset[MAX_ROWS], out_offset[MAX_ROWS];
    };

    // A tile's keys and values, a pointer for each group of 16 keys, and what the tile's steps hand on.
    struct Tile {
        int num_keys;
        const T* k[GROUPS];  // [head_size / S][block_size][S], from the group's first key on
        const T* v[GROUPS];  // [16 / S][head_size][S]
        alignas(64) T q[MAX_ROWS][MAX_HEAD];
        alignas(64) float scores[MAX_ROWS][TILE];
        alignas(64) T weights[MAX_ROWS][TILE];
        float alpha[MAX_ROWS];
        alignas(64) float sums[MAX_ROWS][MAX_HEAD];  // outputs, not divided by row_sum yet
        alignas(64) T v_tail[LANES * MAX_HEAD];
        float row_max[MAX_ROWS], row_sum[MAX_ROWS];
    };

    const T* k_tile(int64_t block, int64_t kv_head) const {
        return (const T*)cache + ((block * 2) * kv_heads + kv_head) * block_size * head_size;
    }
    const T* v_tile(int64_t block, int64_t kv_head) const {
        return (const T*)cache + ((block * 2 + 1) * kv_heads + kv_head) * block_size * head_size;
    }

    // Where the tile that begins at position `begin` lies.
    void find(Tile& t, int64_t begin, int64_t end, int64_t kv_head, const int32_t* table) const {
        t.num_keys = (int)std::min<int64_t>(TILE, end - begin);
        for (int g = 0; g < GROUPS; g++) {
            // A group past the last key reads the tile's first instead: its scores are masked, its weights are 0.
            const int64_t at = g * LANES < t.num_keys ? begin + g * LANES : begin;
            const int64_t block = table[at / block_size], offset = at % block_size;
            t.k[g] = k_tile(block, kv_head) + offset * S;
            t.v[g] = v_tile(block, kv_head) + offset * head_size;
        }
        // Slots past the last key may hold anything, NaN included, which a weight of 0 would not stop.
        const int rest = t.num_keys % LANES;
        if (rest) {
            const int64_t whole = rest / S * S * head_size;
            const T* v = t.v[t.num_keys / LANES];
            std::memcpy(t.v_tail, v, whole * sizeof(T));
            std::memset(t.v_tail + whole, 0, (LANES * head_size - whole) * sizeof(T));
            if (rest % S)
                for (int64_t d = 0; d < head_size; d++) t.v_tail[whole + d * S] = v[whole + d * S];
            t.v[t.num_keys / LANES] = t.v_tail;
        }
    }

    // Scores of rows [row, row + R).
    template <int R>
    void score(Tile& t, int row) const {
        f32x16 acc[R][GROUPS];
        for (int r = 0; r < R; r++)
            for (int g = 0; g < GROUPS; g++) acc[r][g] = splat(0.0f);
        for (int64_t d = 0; d < head_size; d += S)
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++)
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) acc[r][g] = step(acc[r][g], t.q[row + r] + d, t.k[g] + d * block_size);
        for (int r = 0; r < R; r++)
            for (int g = 0; g < GROUPS; g++) store(t.scores[row + r] + g * LANES, acc[r][g]);
    }

    // sums = sums * alpha + weights times values for rows [row, row + R), NV vectors of the head from d on.
    template <int R, int NV>
    void weigh_vectors(Tile& t, int row, int64_t d) const {
        f32x16 acc[R][NV];
        for (int r = 0; r < R; r++)
            for (int i = 0; i < NV; i++) acc[r][i] = load(t.sums[row + r] + d + i * LANES) * splat(t.alpha[row + r]);
        for (int key = 0; key < t.num_keys; key += S) {
            const T* v = t.v[key / LANES] + key % LANES * head_size + d * S;
#pragma GCC unroll 4
            for (int i = 0; i < NV; i++)
#pragma GCC unroll 4
                for (int r = 0; r < R; r++)
                    acc[r][i] = step(acc[r][i], t.weights[row + r] + key, v + i * LANES * S);
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < NV; i++) store(t.sums[row + r] + d + i * LANES, acc[r][i]);
    }

    template <int R>
    void weigh(Tile& t, int row) const {
        int64_t d = 0;
        for (; d + 4 * LANES <= head_size; d += 4 * LANES) weigh_vectors<R, 4>(t, row, d);
        for (; d < head_size; d += LANES) weigh_vectors<R, 1>(t, row, d);
    }

#if defined(__AMX_BF16__)
    // By tiles where the head is whole ones: sums in 0 to 3, queries in 4, keys in 5, weights in 6, values in 7.
    bool by_tiles() const { return S == 2 && head_size % 32 == 0; }

    static void configure(int rows) {
        TileConfig config;
        for (int i = 0; i < 4; i++) config.set(i, rows, 64);
        config.set(4, rows, 64);
        config.set(5, 16, 64);
        config.set(6, rows, 32);
        config.set(7, 8, 64);
        _tile_loadconfig(&config);
    }

    void score_by_tiles(Tile& t) const {
        zero_sums();
        const int64_t stride = block_size * S * sizeof(T);
        for (int64_t d = 0; d < head_size; d += 32) {
            _tile_loadd(4, t.q[0] + d, sizeof t.q[0]);
            _tile_loadd(5, t.k[0] + d * block_size, stride);
            _tile_dpbf16ps(0, 4, 5);
            if (t.num_keys > LANES) {
                _tile_loadd(5, t.k[1] + d * block_size, stride);
                _tile_dpbf16ps(1, 4, 5);
            }
            if (t.num_keys > 2 * LANES) {
                _tile_loadd(5, t.k[2] + d * block_size, stride);
                _tile_dpbf16ps(2, 4, 5);
                _tile_loadd(5, t.k[3] + d * block_size, stride);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        store_sums(t.scores[0], LANES, TILE);
    }

    void weigh_by_tiles(Tile& t, int rows) const {
        alignas(64) float products[MAX_ROWS][4 * LANES];
        const int64_t stride = head_size * S * sizeof(T);
        for (int64_t d = 0; d < head_size; d += 4 * LANES) {
            const bool four = d + 4 * LANES <= head_size;  // else two vectors are left
            zero_sums();
            for (int g = 0; g * LANES < t.num_keys; g++) {
                const T* v = t.v[g] + d * S;
                _tile_loadd(6, t.weights[0] + g * LANES, sizeof t.weights[0]);
                _tile_loadd(7, v, stride);
                _tile_dpbf16ps(0, 6, 7);
                _tile_loadd(7, v + LANES * S, stride);
                _tile_dpbf16ps(1, 6, 7);
                if (four) {
                    _tile_loadd(7, v + 2 * LANES * S, stride);
                    _tile_dpbf16ps(2, 6, 7);
                    _tile_loadd(7, v + 3 * LANES * S, stride);
                    _tile_dpbf16ps(3, 6, 7);
                }
            }
            store_sums(products[0], LANES, 4 * LANES);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < (four ? 4 : 2); i++) {
                    float* sums = t.sums[r] + d + i * LANES;
                    store(sums, fma(load(sums), splat(t.alpha[r]), load(products[r] + i * LANES)));
                }
        }
    }
#endif

    void score_rows(Tile& t, int rows) const {
#if defined(__AMX_BF16__)
        if (by_tiles()) return score_by_tiles(t);
#endif
        for (int row = 0; row < rows; row += VECTOR_ROWS) switch (rows - row) {
            case 1: score<1>(t, row); break;
            case 2: score<2>(t, row); break;
            case 3: score<3>(t, row); break;
            default: score<4>(t, row); break;
        }
    }

    void weigh_rows(Tile& t, int rows) const {
#if defined(__AMX_BF16__)
        if (by_tiles()) return weigh_by_tiles(t, rows);
#endif
        for (int row = 0; row < rows; row += VECTOR_ROWS) switch (rows - row) {
            case 1: weigh<1>(t, row); break;
            case 2: weigh<2>(t, row); break;
            case 3: weigh<3>(t, row); break;
            default: weigh<4>(t, row); break;
        }
    }

    // Scores of one row to weights, relative to the greatest score so far.
    void soften(Tile& t, int r, int64_t position, int64_t begin) const {
        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int32_t keep_end = (int32_t)std::clamp<int64_t>(position + 1 - begin, 0, TILE);
        const int32_t keep_begin = window ? (int32_t)std::clamp<int64_t>(position - window + 1 - begin, 0, TILE) : 0;
        f32x16 s[GROUPS], tile_max = splat(NEG_INF);
        for (int g = 0; g < GROUPS; g++) {
            const i32x16 key = lane + g * LANES;
            s[g] = load(t.scores[r] + g * LANES) * splat(scale);
            s[g] = select((key >= keep_begin) & (key < keep_end), s[g], splat(NEG_INF));
            tile_max = max(tile_max, s[g]);
        }
        const float new_max = std::max(t.row_max[r], max_lanes(tile_max));
        if (new_max == NEG_INF) {  // nothing visible to this row yet: leave it as it is
            t.alpha[r] = 1.0f;
            std::fill(t.weights[r], t.weights[r] + TILE, T(0));
            return;
        }
        f32x16 sum = splat(0.0f);
        for (int g = 0; g < GROUPS; g++) {
            store(t.weights[r] + g * LANES, exp(s[g] - splat(new_max)));
            sum = sum + load(t.weights[r] + g * LANES);
        }
        t.alpha[r] = exp(t.row_max[r] - new_max);
        t.row_sum[r] = __builtin_fmaf(t.row_sum[r], t.alpha[r], sum_lanes(sum));
        t.row_max[r] = new_max;
    }

    void attend(const Rows& rows, int64_t kv_head, const int32_t* table) const {
        Tile t;
#if defined(__AMX_BF16__)
        if (by_tiles()) configure(rows.count);
#endif
        int64_t last = 0, first = INT64_MAX;
        for (int r = 0; r < rows.count; r++) {
            std::memcpy(t.q[r], (const T*)q + rows.q_offset[r], head_size * sizeof(T));
            std::fill(t.sums[r], t.sums[r] + head_size, 0.0f);
            t.row_max[r] = NEG_INF;
            t.row_sum[r] = 0.0f;
            last = std::max(last, rows.position[r]);
            first = std::min(first, window ? std::max<int64_t>(0, rows.position[r] - window + 1) : 0);
        }
        for (int64_t begin = first / TILE * TILE; begin <= last; begin += TILE) {
            find(t, begin, last + 1, kv_head, table);
            score_rows(t, rows.count);
            for (int r = 0; r < rows.count; r++) soften(t, r, rows.position[r], begin);
            weigh_rows(t, rows.count);
        }
        for (int r = 0; r < rows.count; r++) {
            const f32x16 inverse = splat(1.0f / t.row_sum[r]);
            for (int64_t d = 0; d < head_size; d += LANES)
                store((T*)out + rows.out_offset[r] + d, load(t.sums[r] + d) * inverse);
        }
#if defined(__AMX_BF16__)
        if (by_tiles()) _tile_release();
#endif
    }

    void item(int64_t sequence, int64_t kv_head, int64_t row_begin) const {
        const int64_t group = heads / kv_heads;
        const int64_t num_new = token_begins[sequence + 1] - token_begins[sequence];
        const int64_t position = context_lens[sequence] - num_new;
        Rows rows;
        rows.count = (int)std::min<int64_t>(MAX_ROWS, num_new * group - row_begin);
        for (int r = 0; r < rows.count; r++) {
            const int64_t token = (row_begin + r) / group, head = kv_head * group + (row_begin + r) % group;
            rows.position[r] = position + token;
            rows.q_offset[r] = (token_begins[sequence] + token) * q_stride + head * head_size;
            rows.out_offset[r] = ((token_begins[sequence] + token) * heads + head) * head_size;
        }
        attend(rows, kv_head, block_tables + sequence * table_stride);
    }

    void run() const {
        const int64_t group = heads / kv_heads;
        int64_t sequences = 0;
        while (token_begins[sequences] < tokens) sequences++;
        // begins[s]: number of work items (row tile, KV head) of the sequences before s
        std::vector<int64_t> begins(sequences + 1, 0);
        for (int64_t s = 0; s < sequences; s++) {
            const int64_t rows = (token_begins[s + 1] - token_begins[s]) * group;
            begins[s + 1] = begins[s] + (rows + MAX_ROWS - 1) / MAX_ROWS * kv_heads;
        }
        parallel_for(begins[sequences], [&](int64_t index) {
            const int64_t i = begins[sequences] - 1 - index;  // the longest rows of a prefill first
            const int64_t s = std::upper_bound(begins.begin(), begins.end(), i) - begins.begin() - 1;
            const int64_t in_sequence = i - begins[s];
            item(s, in_sequence % kv_heads, in_sequence / kv_heads * MAX_ROWS);
        });
    }
};

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_paged_attention(const void* args) {
    const Args& a = *(const Args*)args;
    if (a.is_bf16) Attention<bf16>(a).run();
    else Attention<float>(a).run();
}
