// Causal attention over a paged KV cache, with online softmax (Milakov and Gimelshein, arXiv 1805.02867) and grouped
// query heads, for a batch in which each sequence brings any number of new tokens.
//
// One order of arithmetic for every query: tiles of TILE keys aligned to position 0, from the first to the last; inside a
// tile, scores sum over the head from 0 up and outputs sum over the keys from 0 up. A query's bits therefore do not depend
// on how many queries share the call: decode, chunked and whole prefill agree.
#include "vec.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace octavo {
namespace {

constexpr int TILE = 64, GROUPS = TILE / LANES;  // keys of a tile, in groups of one vector
constexpr int MAX_ROWS = 4;                      // (token, head) pairs that share the loads of a tile
constexpr int MAX_HEAD = 256;

template <typename T>
struct Attention {
    const T* q;                     // [tokens, heads * head_size], row stride q_stride
    T* out;                         // [tokens, heads * head_size], contiguous
    const T* cache;                 // layout: see rotary_kv_write.cpp
    const int32_t* block_tables;    // [sequences, table_stride]
    const int32_t* token_begins;    // [sequences + 1]
    const int32_t* context_lens;    // [sequences]: tokens in the cache, the new ones included
    int64_t sequences, table_stride, q_stride, heads, kv_heads, head_size, block_size, window;
    float scale;

    struct Rows {
        int count;
        int64_t position[MAX_ROWS];
        int64_t q_offset[MAX_ROWS], out_offset[MAX_ROWS];
    };

    const T* k_tile(int64_t block, int64_t kv_head) const {
        return cache + ((block * 2) * kv_heads + kv_head) * block_size * head_size;
    }
    const T* v_tile(int64_t block, int64_t kv_head) const {
        return cache + ((block * 2 + 1) * kv_heads + kv_head) * block_size * head_size;
    }

    template <int R>
    void scores(const float* q32, const T* const* k_groups, f32x16 (*s)[GROUPS]) const {
        f32x16 acc[R][GROUPS];
        for (int r = 0; r < R; r++)
            for (int g = 0; g < GROUPS; g++) acc[r][g] = splat(0.0f);
        for (int64_t d = 0; d < head_size; d++) {
            f32x16 k[GROUPS];
#pragma GCC unroll 4
            for (int g = 0; g < GROUPS; g++) k[g] = load(k_groups[g] + d * block_size);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int g = 0; g < GROUPS; g++) acc[r][g] = fma(k[g], splat(q32[r * MAX_HEAD + d]), acc[r][g]);
        }
        for (int r = 0; r < R; r++)
            for (int g = 0; g < GROUPS; g++) s[r][g] = acc[r][g];
    }

    // acc[r][d..] = acc * alpha + sum over keys of p[r][key] * v[key][d..], NV vectors of the head at a time.
    template <int R, int NV>
    void weigh(float* acc32, const float* alpha, const float (*p)[TILE], const T* const* v_rows, int num_keys,
               int64_t d) const {
        f32x16 acc[R][NV];
        for (int r = 0; r < R; r++)
            for (int i = 0; i < NV; i++) acc[r][i] = load(acc32 + r * MAX_HEAD + d + i * LANES) * splat(alpha[r]);
        for (int key = 0; key < num_keys; key++) {
            f32x16 v[NV];
#pragma GCC unroll 4
            for (int i = 0; i < NV; i++) v[i] = load(v_rows[key] + d + i * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int i = 0; i < NV; i++) acc[r][i] = fma(v[i], splat(p[r][key]), acc[r][i]);
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < NV; i++) store(acc32 + r * MAX_HEAD + d + i * LANES, acc[r][i]);
    }

    template <int R>
    void attend(const Rows& rows, int64_t kv_head, const int32_t* table) const {
        alignas(64) float q32[R * MAX_HEAD], acc32[R * MAX_HEAD];
        float row_max[R], row_sum[R];
        int64_t last = 0, first = INT64_MAX;
        for (int r = 0; r < R; r++) {
            for (int64_t d = 0; d < head_size; d += LANES) {
                store(q32 + r * MAX_HEAD + d, load(q + rows.q_offset[r] + d) * splat(scale));
                store(acc32 + r * MAX_HEAD + d, splat(0.0f));
            }
            row_max[r] = NEG_INF;
            row_sum[r] = 0.0f;
            last = std::max(last, rows.position[r]);
            first = std::min(first, window ? std::max<int64_t>(0, rows.position[r] - window + 1) : 0);
        }
        for (int64_t begin = first / TILE * TILE; begin <= last; begin += TILE) {
            const int num_keys = (int)std::min<int64_t>(TILE, last + 1 - begin);
            const T* k_groups[GROUPS];
            const T* v_rows[TILE];
            for (int g = 0; g < GROUPS; g++) {
                // A group past the last key reads the tile's first block instead; its scores are masked.
                const int64_t at = g * LANES < num_keys ? begin + g * LANES : begin;
                k_groups[g] = k_tile(table[at / block_size], kv_head) + at % block_size;
            }
            for (int key = 0; key < num_keys; key++) {
                const int64_t at = begin + key;
                v_rows[key] = v_tile(table[at / block_size], kv_head) + (at % block_size) * head_size;
            }
            f32x16 s[R][GROUPS];
            scores<R>(q32, k_groups, s);
            alignas(64) float p[R][TILE];
            float alpha[R];
            for (int r = 0; r < R; r++) {
                const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
                const int32_t keep_end = (int32_t)std::clamp<int64_t>(rows.position[r] + 1 - begin, 0, TILE);
                const int32_t keep_begin =
                    window ? (int32_t)std::clamp<int64_t>(rows.position[r] - window + 1 - begin, 0, TILE) : 0;
                f32x16 tile_max = splat(NEG_INF);
                for (int g = 0; g < GROUPS; g++) {
                    const i32x16 key = lane + g * LANES;
                    s[r][g] = select((key >= keep_begin) & (key < keep_end), s[r][g], splat(NEG_INF));
                    tile_max = max(tile_max, s[r][g]);
                }
                const float new_max = std::max(row_max[r], max_lanes(tile_max));
                if (new_max == NEG_INF) {  // nothing visible to this row yet: leave it as it is
                    alpha[r] = 1.0f;
                    std::fill(p[r], p[r] + TILE, 0.0f);
                    continue;
                }
                f32x16 sum = splat(0.0f);
                for (int g = 0; g < GROUPS; g++) {
                    const f32x16 e = exp(s[r][g] - splat(new_max));
                    store(p[r] + g * LANES, e);
                    sum = sum + e;
                }
                alpha[r] = exp(row_max[r] - new_max);
                row_sum[r] = __builtin_fmaf(row_sum[r], alpha[r], sum_lanes(sum));
                row_max[r] = new_max;
            }
            int64_t d = 0;
            for (; d + 4 * LANES <= head_size; d += 4 * LANES) weigh<R, 4>(acc32, alpha, p, v_rows, num_keys, d);
            for (; d < head_size; d += LANES) weigh<R, 1>(acc32, alpha, p, v_rows, num_keys, d);
        }
        for (int r = 0; r < R; r++) {
            const f32x16 inverse = splat(1.0f / row_sum[r]);
            for (int64_t d = 0; d < head_size; d += LANES)
                store(out + rows.out_offset[r] + d, load(acc32 + r * MAX_HEAD + d) * inverse);
        }
    }

    void item(int64_t sequence, int64_t kv_head, int64_t row_begin) const {
        const int64_t group = heads / kv_heads;
        const int64_t tokens = token_begins[sequence + 1] - token_begins[sequence];
        const int64_t position = context_lens[sequence] - tokens;
        Rows rows;
        rows.count = (int)std::min<int64_t>(MAX_ROWS, tokens * group - row_begin);
        for (int r = 0; r < rows.count; r++) {
            const int64_t token = (row_begin + r) / group, head = kv_head * group + (row_begin + r) % group;
            rows.position[r] = position + token;
            rows.q_offset[r] = (token_begins[sequence] + token) * q_stride + head * head_size;
            rows.out_offset[r] = ((token_begins[sequence] + token) * heads + head) * head_size;
        }
        const int32_t* table = block_tables + sequence * table_stride;
        switch (rows.count) {
            case 4: attend<4>(rows, kv_head, table); break;
            case 3: attend<3>(rows, kv_head, table); break;
            case 2: attend<2>(rows, kv_head, table); break;
            default: attend<1>(rows, kv_head, table); break;
        }
    }

    void run() const {
        const int64_t group = heads / kv_heads;
        // begins[s]: number of work items (row tile, KV head) of the sequences before s
        std::vector<int64_t> begins(sequences + 1, 0);
        for (int64_t s = 0; s < sequences; s++) {
            const int64_t rows = (token_begins[s + 1] - token_begins[s]) * group;
            begins[s + 1] = begins[s] + (rows + MAX_ROWS - 1) / MAX_ROWS * kv_heads;
        }
#pragma omp parallel for schedule(dynamic, 1)
        for (int64_t i = begins[sequences] - 1; i >= 0; i--) {  // the longest rows of a prefill first
            const int64_t s = std::upper_bound(begins.begin(), begins.end(), i) - begins.begin() - 1;
            const int64_t in_sequence = i - begins[s];
            item(s, in_sequence % kv_heads, in_sequence / kv_heads * MAX_ROWS);
        }
    }
};

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_paged_attention(void* out, const void* q, const void* cache, const int32_t* block_tables,
                                       const int32_t* token_begins, const int32_t* context_lens, int64_t sequences,
                                       int64_t table_stride, int64_t q_stride, int64_t heads, int64_t kv_heads,
                                       int64_t head_size, int64_t block_size, int64_t window, float scale,
                                       int is_bf16) {
    if (is_bf16)
        Attention<bf16>{(const bf16*)q, (bf16*)out, (const bf16*)cache, block_tables, token_begins, context_lens,
                        sequences, table_stride, q_stride, heads, kv_heads, head_size, block_size, window, scale}.run();
    else
        Attention<float>{(const float*)q, (float*)out, (const float*)cache, block_tables, token_begins, context_lens,
                         sequences, table_stride, q_stride, heads, kv_heads, head_size, block_size, window, scale}.run();
}
