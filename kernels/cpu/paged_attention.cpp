// Causal attention over a paged KV cache, with online softmax (Milakov and Gimelshein, arXiv 1805.02867) and grouped
// query heads, for a batch in which each sequence brings any number of new tokens.
//
// One order of arithmetic for every query: pieces of PIECE keys aligned to position 0, each by itself and then merged
// into those before it; in a piece tiles of TILE keys, from the first to the last; in a tile, scores sum over the head
// from 0 up and outputs sum over the keys from 0 up. A query's bits therefore do not depend on how many queries share the
// call, nor on how many threads a sequence's pieces are spread over: decode, chunked and whole prefill agree. In bfloat16
// the weights of a tile are rounded to bfloat16, and their sum is that of the rounded ones.
#include "parallel.h"
#include "vec.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <vector>

namespace octavo {
namespace {

constexpr int TILE = 64, GROUPS = TILE / LANES;  // keys of a tile, in groups of one vector
constexpr int PIECE = 1024;
constexpr int MAX_HEAD = 256;
constexpr int MAX_ROWS = 32;    // (token, head) pairs of one KV head that share the loads of a tile
constexpr int VECTOR_ROWS = 4;  // rows whose sums fit the vector registers
constexpr float LOG2_E = 1.44269504088896341f;

struct Args {
    int64_t tokens;
    void* out;                    // [tokens, heads * head_size], contiguous
    const void* q;                // [tokens, heads * head_size], row stride q_stride
    const void* cache;            // layout: see rotary_kv_write.cpp
    const int32_t* block_tables;  // [sequences, table_stride]
    const int32_t* token_begins;  // [sequences + 1], the last one = tokens
    const int32_t* context_lens;  // [sequences]: tokens in the cache, the new ones included
    int64_t table_stride, q_stride, heads, kv_heads, head_size, block_size, window;
    int64_t group, first_head;  // query heads of a KV head, and the place of the first one here among its group
    float scale;
    int32_t is_bf16;
};

// Up to MAX_ROWS (token, head) pairs of one sequence and KV head.
struct Rows {
    int count;
    int64_t sequence, kv_head;
    int64_t first_key, last_key;  // seen by any of them
    int64_t position[MAX_ROWS];
    int64_t q_offset[MAX_ROWS], out_offset[MAX_ROWS];
};

// Attention of some rows over some keys: greatest score, sum of weights, and sum of weighted values, [rows][head_size].
struct Partial {
    float row_max[MAX_ROWS], row_sum[MAX_ROWS];
    alignas(64) float sums[MAX_ROWS * MAX_HEAD];
};

template <typename T>
struct Attention : Args {
    static constexpr int S = STEP<T>;
    // What works on a tile is inlined into `attend`, so that what the parts share stays in registers: 9 % of a prefill.

    // A tile's keys and values, a pointer for each group of 16 keys, and what the tile's steps hand on.
    struct Tile {
        int num_keys;
        const T* k[GROUPS];  // [head_size / S][block_size][S], from the group's first key on
        const T* v[GROUPS];  // [16 / S][head_size][S]
        const T* next_k[GROUPS];  // those of the tile after it, to be brought to the cache meanwhile
        const T* next_v[GROUPS];
        f32x16 sum_lanes[MAX_ROWS];
        alignas(64) float scores[MAX_ROWS][TILE];
        alignas(64) T weights[MAX_ROWS][TILE];
        alignas(64) T q[MAX_ROWS * MAX_HEAD];  // [rows][head_size]
        alignas(64) T v_tail[32 * MAX_HEAD];
    };

    int block_shift;  // log2(block_size)
    int v_keys;       // keys whose values lie one after the other, at most 32: one step of a product by tiles

    explicit Attention(const Args& args)
        : Args(args), block_shift(std::countr_zero((uint64_t)args.block_size)), v_keys(std::min<int>(block_size, 32)) {}

    const T* k_tile(int64_t block, int64_t kv_head) const {
        return (const T*)cache + ((block * 2) * kv_heads + kv_head) * block_size * head_size;
    }
    const T* v_tile(int64_t block, int64_t kv_head) const {
        return (const T*)cache + ((block * 2 + 1) * kv_heads + kv_head) * block_size * head_size;
    }

    // The groups of the tile that begins at position `begin`; those past the last key are the tile's first.
    void locate(const T** k, const T** v, const Rows& rows, int64_t begin) const {
        const int32_t* table = block_tables + rows.sequence * table_stride;
        for (int g = 0; g < GROUPS; g++) {
            const int64_t at = begin + g * LANES <= rows.last_key ? begin + g * LANES : begin;
            const int64_t block = table[at >> block_shift], offset = at & (block_size - 1);
            k[g] = k_tile(block, rows.kv_head) + offset * S;
            v[g] = v_tile(block, rows.kv_head) + offset * head_size;
        }
    }

    // Where the tile that begins at position `begin` lies.
    void find(Tile& t, const Rows& rows, int64_t begin) const {
        t.num_keys = (int)std::min<int64_t>(TILE, rows.last_key + 1 - begin);
        locate(t.k, t.v, rows, begin);  // groups past the last key: their scores are masked, their weights are 0
        // Slots past the last key may hold anything, NaN included, which a weight of 0 would not stop.
        const int rest = t.num_keys % v_keys;
        if (rest) {
            const int first = (t.num_keys - rest) / LANES;
            const int64_t whole = rest / S * S * head_size;
            const T* v = t.v[first];
            std::memcpy(t.v_tail, v, whole * sizeof(T));
            std::memset(t.v_tail + whole, 0, (v_keys * head_size - whole) * sizeof(T));
            if (rest % S)
                for (int64_t d = 0; d < head_size; d++) t.v_tail[whole + d * S] = v[whole + d * S];
            for (int g = first; g < first + v_keys / LANES; g++) t.v[g] = t.v_tail + (g - first) * LANES * head_size;
        }
    }

    // Scores of rows [row, row + R). The first rows of a tile also fetch the next tile, a line for each line they read:
    // memory then works while the products are computed, which a burst of as many fetches would only hold up.
    template <int R, bool FETCH>
    [[gnu::always_inline]] void score(Tile& t, int row) const {
        f32x16 acc[R][GROUPS];
        for (int r = 0; r < R; r++)
            for (int g = 0; g < GROUPS; g++) acc[r][g] = splat(0.0f);
        const T* query = t.q + row * head_size;
        for (int64_t d = 0; d < head_size; d += S)
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++) {
                if constexpr (FETCH) __builtin_prefetch(t.next_k[g] + d * block_size, 0, 3);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) acc[r][g] = step(acc[r][g], query + r * head_size + d, t.k[g] + d * block_size);
            }
        for (int r = 0; r < R; r++)
            for (int g = 0; g < GROUPS; g++) store(t.scores[row + r] + g * LANES, acc[r][g]);
    }

    // sums += weights times values for rows [row, row + R), NV vectors of the head from d on.
    template <int R, int NV, bool FETCH>
    [[gnu::always_inline]] void weigh_vectors(const Tile& t, float* sums, int row, int64_t d) const {
        f32x16 acc[R][NV];
        for (int r = 0; r < R; r++)
            for (int i = 0; i < NV; i++) acc[r][i] = load(sums + (row + r) * head_size + d + i * LANES);
        for (int key = 0; key < t.num_keys; key += S) {
            const int64_t at = key % LANES * head_size + d * S;
            const T* v = t.v[key / LANES] + at;
            const T* next = t.next_v[key / LANES] + at;
#pragma GCC unroll 4
            for (int i = 0; i < NV; i++) {
                if constexpr (FETCH) __builtin_prefetch(next + i * LANES * S, 0, 3);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) acc[r][i] = step(acc[r][i], t.weights[row + r] + key, v + i * LANES * S);
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < NV; i++) store(sums + (row + r) * head_size + d + i * LANES, acc[r][i]);
    }

    template <int R, bool FETCH>
    [[gnu::always_inline]] void weigh(const Tile& t, float* sums, int row) const {
        int64_t d = 0;
        for (; d + 4 * LANES <= head_size; d += 4 * LANES) weigh_vectors<R, 4, FETCH>(t, sums, row, d);
        for (; d < head_size; d += LANES) weigh_vectors<R, 1, FETCH>(t, sums, row, d);
    }

#if defined(__AMX_BF16__)
    // Brings the next tile to the cache.
    void fetch(const Tile& t) const {
        for (int g = 0; g < GROUPS; g++)
            for (int64_t i = 0; i < LANES * head_size; i += LANES * S) {
                __builtin_prefetch(t.next_k[g] + i / LANES * block_size, 0, 2);
                __builtin_prefetch(t.next_v[g] + i, 0, 2);
            }
    }

    // By tiles where the head is whole ones: sums in 0 to 3, queries in 4, keys in 5, weights in 6, values in 7. Up to 16
    // rows fill four tiles of sums along the keys or the head; more are two tiles deep and two wide, and what the second
    // one holds past the last row is never looked at.
    bool by_tiles() const { return S == 2 && head_size % 32 == 0; }

    static int tile_rows(int rows) { return std::min(rows, 16); }

    void configure(int rows) const {
        TileConfig config;
        for (int i : {0, 1, 2, 3, 4}) config.set(i, tile_rows(rows), 64);
        config.set(5, 16, 64);
        config.set(6, tile_rows(rows), v_keys * (int)sizeof(T));
        config.set(7, v_keys / S, 64);
        _tile_loadconfig(&config);
    }

    void score_by_tiles(Tile& t, int rows) const {
        const int64_t stride = block_size * S * sizeof(T), q_bytes = head_size * sizeof(T);
        if (rows <= 16) {
            zero_sums();
            for (int64_t d = 0; d < head_size; d += 32) {
                _tile_loadd(4, t.q + d, q_bytes);
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
            return;
        }
        for (int g = 0; g * LANES < t.num_keys; g += 2) {
            zero_sums();
            for (int64_t d = 0; d < head_size; d += 32) {
                _tile_loadd(4, t.q + d, q_bytes);
                _tile_loadd(5, t.k[g] + d * block_size, stride);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(5, t.k[g + 1] + d * block_size, stride);
                _tile_dpbf16ps(1, 4, 5);
                _tile_loadd(4, t.q + 16 * head_size + d, q_bytes);
                _tile_dpbf16ps(3, 4, 5);
                _tile_loadd(5, t.k[g] + d * block_size, stride);
                _tile_dpbf16ps(2, 4, 5);
            }
            _tile_stored(0, t.scores[0] + g * LANES, sizeof t.scores[0]);
            _tile_stored(1, t.scores[0] + (g + 1) * LANES, sizeof t.scores[0]);
            _tile_stored(2, t.scores[16] + g * LANES, sizeof t.scores[0]);
            _tile_stored(3, t.scores[16] + (g + 1) * LANES, sizeof t.scores[0]);
        }
    }

    void weigh_by_tiles(const Tile& t, float* sums, int rows) const {
        const int64_t stride = head_size * S * sizeof(T), sums_bytes = head_size * sizeof(float);
        if (rows <= 16) {
            for (int64_t d = 0; d < head_size; d += 4 * LANES) {
                const bool four = d + 4 * LANES <= head_size;  // else two vectors are left
                _tile_loadd(0, sums + d, sums_bytes);
                _tile_loadd(1, sums + d + LANES, sums_bytes);
                if (four) {
                    _tile_loadd(2, sums + d + 2 * LANES, sums_bytes);
                    _tile_loadd(3, sums + d + 3 * LANES, sums_bytes);
                }
                for (int key = 0; key < t.num_keys; key += v_keys) {
                    const T* v = t.v[key / LANES] + d * S;
                    _tile_loadd(6, t.weights[0] + key, sizeof t.weights[0]);
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
                _tile_stored(0, sums + d, sums_bytes);
                _tile_stored(1, sums + d + LANES, sums_bytes);
                if (four) {
                    _tile_stored(2, sums + d + 2 * LANES, sums_bytes);
                    _tile_stored(3, sums + d + 3 * LANES, sums_bytes);
                }
            }
            return;
        }
        for (int64_t d = 0; d < head_size; d += 2 * LANES) {
            float* second = sums + 16 * head_size + d;
            _tile_loadd(0, sums + d, sums_bytes);
            _tile_loadd(1, sums + d + LANES, sums_bytes);
            _tile_loadd(2, second, sums_bytes);
            _tile_loadd(3, second + LANES, sums_bytes);
            for (int key = 0; key < t.num_keys; key += v_keys) {
                const T* v = t.v[key / LANES] + d * S;
                _tile_loadd(6, t.weights[0] + key, sizeof t.weights[0]);
                _tile_loadd(7, v, stride);
                _tile_dpbf16ps(0, 6, 7);
                _tile_loadd(7, v + LANES * S, stride);
                _tile_dpbf16ps(1, 6, 7);
                _tile_loadd(6, t.weights[16] + key, sizeof t.weights[0]);
                _tile_dpbf16ps(3, 6, 7);
                _tile_loadd(7, v, stride);
                _tile_dpbf16ps(2, 6, 7);
            }
            _tile_stored(0, sums + d, sums_bytes);
            _tile_stored(1, sums + d + LANES, sums_bytes);
            _tile_stored(2, second, sums_bytes);
            _tile_stored(3, second + LANES, sums_bytes);
        }
    }
#endif

    template <bool FETCH>
    [[gnu::always_inline]] void score_rows(Tile& t, int row, int rows) const {
        switch (rows) {
            case 1: return score<1, FETCH>(t, row);
            case 2: return score<2, FETCH>(t, row);
            case 3: return score<3, FETCH>(t, row);
            default: return score<VECTOR_ROWS, FETCH>(t, row);
        }
    }

    template <bool FETCH>
    [[gnu::always_inline]] void weigh_rows(const Tile& t, float* sums, int row, int rows) const {
        switch (rows) {
            case 1: return weigh<1, FETCH>(t, sums, row);
            case 2: return weigh<2, FETCH>(t, sums, row);
            case 3: return weigh<3, FETCH>(t, sums, row);
            default: return weigh<VECTOR_ROWS, FETCH>(t, sums, row);
        }
    }

    // Where rows are few, memory is what takes the time.
    static bool few(int rows) { return rows <= 16; }

    [[gnu::always_inline]] void score_all(Tile& t, int rows) const {
#if defined(__AMX_BF16__)
        if (by_tiles()) return score_by_tiles(t, rows);
#endif
        few(rows) ? score_rows<true>(t, 0, rows) : score_rows<false>(t, 0, rows);
        for (int row = VECTOR_ROWS; row < rows; row += VECTOR_ROWS) score_rows<false>(t, row, rows - row);
    }

    [[gnu::always_inline]] void weigh_all(const Tile& t, float* sums, int rows) const {
#if defined(__AMX_BF16__)
        if (by_tiles()) return weigh_by_tiles(t, sums, rows);
#endif
        few(rows) ? weigh_rows<true>(t, sums, 0, rows) : weigh_rows<false>(t, sums, 0, rows);
        for (int row = VECTOR_ROWS; row < rows; row += VECTOR_ROWS) weigh_rows<false>(t, sums, row, rows - row);
    }

    // Scores of one row to weights relative to its greatest score so far; what it has summed up follows.
    [[gnu::always_inline]] void soften(Tile& t, Partial& p, int r, int64_t position, int64_t begin) const {
        const int32_t keep_end = (int32_t)std::clamp<int64_t>(position + 1 - begin, 0, t.num_keys);
        const int32_t keep_begin = window ? (int32_t)std::clamp<int64_t>(position - window + 1 - begin, 0, TILE) : 0;
        f32x16 s[GROUPS];
        for (int g = 0; g < GROUPS; g++) s[g] = load(t.scores[r] + g * LANES);
        if (keep_end < TILE || keep_begin > 0) {
            const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            for (int g = 0; g < GROUPS; g++) {
                const i32x16 key = lane + g * LANES;
                s[g] = select((key >= keep_begin) & (key < keep_end), s[g], splat(NEG_INF));
            }
        }
        const f32x16 scaling = splat(scale * LOG2_E);
        const float tile_max = max_lanes(max(max(s[0], s[1]), max(s[2], s[3]))) * scaling[0];
        if (tile_max > p.row_max[r]) {
            const float alpha = exp2(p.row_max[r] - tile_max);
            p.row_max[r] = tile_max;
            t.sum_lanes[r] = t.sum_lanes[r] * splat(alpha);
            float* sums = p.sums + r * head_size;
            for (int64_t d = 0; d < head_size; d += LANES) store(sums + d, load(sums + d) * splat(alpha));
        }
        if (p.row_max[r] == NEG_INF) {  // nothing visible to this row yet
            std::fill(t.weights[r], t.weights[r] + TILE, T(0));
            if (tile_max == tile_max) return;
        }
        const f32x16 row_max = splat(p.row_max[r]);
        for (int g = 0; g < GROUPS; g++) {
            const f32x16 weight = exp2<S == 2 ? 4 : 6>(fma(s[g], scaling, -row_max));
            t.sum_lanes[r] = t.sum_lanes[r] + store_rounded(t.weights[r] + g * LANES, weight);
        }
    }

    // Attention over keys [begin, end), which lie in one piece; t.q is filled. `next`: the rows that come after these.
    void attend(Tile& t, Partial& p, const Rows& rows, const Rows& next, int64_t begin, int64_t end) const {
        std::fill(p.sums, p.sums + rows.count * head_size, 0.0f);
        for (int r = 0; r < rows.count; r++) {
            t.sum_lanes[r] = splat(0.0f);
            p.row_max[r] = NEG_INF;
        }
        for (; begin < end; begin += TILE) {
            find(t, rows, begin);
            if (begin + TILE <= rows.last_key) locate(t.next_k, t.next_v, rows, begin + TILE);
            else locate(t.next_k, t.next_v, next, next.first_key / TILE * TILE);
#if defined(__AMX_BF16__)
            if (by_tiles() && few(rows.count)) fetch(t);
#endif
            score_all(t, rows.count);
            for (int r = 0; r < rows.count; r++) soften(t, p, r, rows.position[r], begin);
            weigh_all(t, p.sums, rows.count);
        }
        for (int r = 0; r < rows.count; r++) p.row_sum[r] = sum_lanes(t.sum_lanes[r]);
    }

    // Adds a piece to those before it.
    void merge(Partial& total, const Partial& p, int count) const {
        for (int r = 0; r < count; r++) {
            if (p.row_sum[r] == 0.0f) continue;  // saw nothing
            const float row_max = std::max(total.row_max[r], p.row_max[r]);
            const float a = exp2(total.row_max[r] - row_max), b = exp2(p.row_max[r] - row_max);
            total.row_max[r] = row_max;
            total.row_sum[r] = __builtin_fmaf(total.row_sum[r], a, p.row_sum[r] * b);
            for (int64_t d = r * head_size; d < (r + 1) * head_size; d += LANES)
                store(total.sums + d, fma(load(total.sums + d), splat(a), load(p.sums + d) * splat(b)));
        }
    }

    void finish(const Partial& p, const Rows& rows) const {
        for (int r = 0; r < rows.count; r++) {
            const f32x16 inverse = splat(1.0f / p.row_sum[r]);
            for (int64_t d = 0; d < head_size; d += LANES)
                store((T*)out + rows.out_offset[r] + d, load(p.sums + r * head_size + d) * inverse);
        }
    }

    int64_t num_pieces(const Rows& rows) const { return rows.last_key / PIECE - rows.first_key / PIECE + 1; }

    // Pieces [begin, end) of those that the rows see.
    void attend_pieces(Partial& total, const Rows& rows, const Rows& next, int64_t begin, int64_t end) const {
        Tile t;
        for (int r = 0; r < rows.count; r++)
            std::memcpy(t.q + r * head_size, (const T*)q + rows.q_offset[r], head_size * sizeof(T));
#if defined(__AMX_BF16__)
        if (by_tiles()) configure(rows.count);
#endif
        for (int64_t piece = begin; piece < end; piece++) {
            const int64_t first = (rows.first_key / PIECE + piece) * PIECE;
            const int64_t from = std::max(first, rows.first_key / TILE * TILE);
            const int64_t to = std::min(first + PIECE, rows.last_key + 1);
            if (piece == begin) {
                attend(t, total, rows, next, from, to);
            } else {
                Partial p;
                attend(t, p, rows, next, from, to);
                merge(total, p, rows.count);
            }
        }
#if defined(__AMX_BF16__)
        if (by_tiles()) _tile_release();
#endif
    }

    // None where the KV head's group is cut and has fewer rows than others.
    Rows rows_of(int64_t sequence, int64_t kv_head, int64_t row_begin) const {
        const int64_t head_begin = std::max<int64_t>(0, kv_head * group - first_head);
        const int64_t num_heads = std::min(heads, (kv_head + 1) * group - first_head) - head_begin;
        const int64_t num_new = token_begins[sequence + 1] - token_begins[sequence];
        const int64_t position = context_lens[sequence] - num_new;
        Rows rows;
        rows.sequence = sequence;
        rows.kv_head = kv_head;
        rows.count = (int)std::clamp<int64_t>(num_new * num_heads - row_begin, 0, MAX_ROWS);
        rows.first_key = rows.last_key = 0;
        if (rows.count == 0) return rows;
        for (int r = 0; r < rows.count; r++) {
            const int64_t token = (row_begin + r) / num_heads, head = head_begin + (row_begin + r) % num_heads;
            rows.position[r] = position + token;
            rows.q_offset[r] = (token_begins[sequence] + token) * q_stride + head * head_size;
            rows.out_offset[r] = ((token_begins[sequence] + token) * heads + head) * head_size;
        }
        rows.first_key = window ? std::max<int64_t>(0, rows.position[0] - window + 1) : 0;
        rows.last_key = rows.position[rows.count - 1];
        return rows;
    }

    void run() const {
        const int64_t most_heads = std::min(group, heads);  // of a KV head
        int64_t sequences = 0;
        while (token_begins[sequences] < tokens) sequences++;
        // begins[s]: number of work items (rows, KV head) of the sequences before s
        std::vector<int64_t> begins(sequences + 1, 0);
        for (int64_t s = 0; s < sequences; s++) {
            const int64_t rows = (token_begins[s + 1] - token_begins[s]) * most_heads;
            begins[s + 1] = begins[s] + (rows + MAX_ROWS - 1) / MAX_ROWS * kv_heads;
        }
        const int64_t num_items = begins[sequences];
        const auto item = [&](int64_t i) {
            const int64_t s = std::upper_bound(begins.begin(), begins.end(), i) - begins.begin() - 1;
            const int64_t in_sequence = i - begins[s];
            return rows_of(s, in_sequence % kv_heads, in_sequence / kv_heads * MAX_ROWS);
        };
        if (num_items < 4 * num_threads()) return run_by_pieces(num_items, item);
        // A thread takes all KV heads of a sequence, since they lie side by side in each block, if enough takes are left.
        const int64_t heads_at_a_time = num_items / kv_heads < 4 * num_threads() ? 1 : kv_heads;
        const int64_t num_takes = num_items / heads_at_a_time;
        parallel_for(num_takes, [&](int64_t index) {
            const int64_t take = num_takes - 1 - index;  // the longest rows of a prefill first
            const int64_t likely_next = std::max<int64_t>(0, take - num_threads());
            for (int64_t i = take * heads_at_a_time; i < (take + 1) * heads_at_a_time; i++) {
                const Rows rows = item(i);
                if (rows.count == 0) continue;
                const Rows next = item((i + 1) % heads_at_a_time ? i + 1 : likely_next * heads_at_a_time);
                Partial p;
                attend_pieces(p, rows, next, 0, num_pieces(rows));
                finish(p, rows);
            }
        });
    }

    // Few items: their pieces are spread over the threads as well.
    template <typename F>
    void run_by_pieces(int64_t num_items, const F& item) const {
        std::vector<Rows> rows;
        std::vector<int64_t> begins{0};  // of each item's pieces
        for (int64_t i = 0; i < num_items; i++) {
            const Rows some = item(i);
            if (some.count == 0) continue;
            rows.push_back(some);
            begins.push_back(begins.back() + num_pieces(some));
        }
        const std::unique_ptr<Partial[]> partials(new Partial[begins.back()]);
        parallel_for(begins.back(), [&](int64_t index) {
            const int64_t i = std::upper_bound(begins.begin(), begins.end(), index) - begins.begin() - 1;
            attend_pieces(partials[index], rows[i], rows[i], index - begins[i], index - begins[i] + 1);
        });
        for (size_t i = 0; i < rows.size(); i++) {
            Partial& total = partials[begins[i]];
            for (int64_t piece = begins[i] + 1; piece < begins[i + 1]; piece++) merge(total, partials[piece], rows[i].count);
            finish(total, rows[i]);
        }
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
