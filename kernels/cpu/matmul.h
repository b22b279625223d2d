// Linear layers with one canonical product: out[m, n] = sum over k of x[m, k] * w[n, k], k from 0 upwards in one
// accumulator per output, fp32, one rounding at the end. Tiles over rows and columns vary with the shape; the order of
// the sum does not, so a row's bits do not depend on how many rows share the call.
//
// Packed weights: panels of 16 output columns. bfloat16: [N/16][K/2][16][2] (pairs along K, as dot-product instructions
// take them); float32: [N/16][K][16]. Columns past N are zero.
#pragma once

#include "parallel.h"
#include "vec.h"

#include <algorithm>
#include <vector>

namespace octavo {
namespace {

constexpr int64_t LINE = 64;  // bytes of a cache line

struct MatmulArgs {
    int64_t m;
    const void* x;         // [m, k], row stride x_stride elements
    const void* weight;    // packed; whoever makes the tiles' Weights knows how
    const float* bias;     // [n] or null
    const void* residual;  // as out, or null; may be out itself
    void* out;             // [m, n]; gated: [m, n / 2]
    int64_t n, k, x_stride;
    int32_t is_bf16, out_is_bf16;
    int64_t gated;  // panels alternate between gate and up; out = silu(gate) * up. Without residual, n / 2 % 16 = 0
};

// The 16 sums of a row and panel: bias and residual added in float32, then the one rounding.
template <typename O>
void finish(const MatmulArgs& a, int64_t row, int64_t panel, f32x16 v) {
    const int64_t col = panel * LANES;
    const int width = (int)std::min<int64_t>(LANES, a.n - col);
    O* out = (O*)a.out + row * a.n + col;
    const O* residual = a.residual ? (const O*)a.residual + row * a.n + col : nullptr;
    if (width == LANES) {
        if (a.bias) v = v + load(a.bias + col);
        if (residual) v = v + load(residual);
        store(out, v);
        return;
    }
    for (int c = 0; c < width; c++) {
        float f = v[c];
        if (a.bias) f = f + a.bias[col + c];
        if (residual) f = f + to_float(residual[c]);
        store_one(out + c, f);
    }
}

// The same for a panel of the gate and the one after it.
template <typename O>
void finish_gated(const MatmulArgs& a, int64_t row, int64_t panel, f32x16 gate, f32x16 up) {
    const int64_t col = panel / 2 * LANES, size = a.n / 2;
    if (a.bias) {
        gate = gate + load(a.bias + col);
        up = up + load(a.bias + size + col);
    }
    store((O*)a.out + row * size + col, gate / (splat(1.0f) + exp(-gate)) * up);
}

// NP panels of a row, `step` floats apart.
template <typename O, int NP>
void finish_row(const MatmulArgs& a, int64_t row, int64_t panel, const float* sums, int64_t step) {
    if (a.gated)
        for (int j = 0; j + 1 < NP; j += 2)
            finish_gated<O>(a, row, panel + j, load(sums + j * step), load(sums + (j + 1) * step));
    else
        for (int j = 0; j < NP; j++) finish<O>(a, row, panel + j, load(sums + j * step));
}

// Where tiles find a weight: in memory, as it lies. Weights of another kind have the same members.
template <typename T>
struct PackedWeights {
    using Element = T;
    static constexpr int64_t COLUMN_BYTES = LANES * sizeof(T);  // of one k of a panel, in memory
    // Passes over the rows up to which tiles take chunks of k, of about so many columns, and whether they do even in a
    // single pass.
    static constexpr int64_t MAX_PASSES = 11, CHUNK = 512;
    static constexpr bool ALWAYS_IN_CHUNKS = false, IN_ONE_STREAM = false;
    // Whether it is the first pass over the rows that makes a chunk what the other passes read (`first_rows`), not `take`.
    static constexpr bool MADE_IN_FIRST_PASS = false;
    static constexpr int64_t MAX_ROWS_AT_A_TIME = INT64_MAX;
    // Rows up to which tiles are tall: as many rows as may be go by at once, and memory brings two panels while two are
    // multiplied.
    static constexpr int64_t MAX_TALL = 24;
    // Panels that no two threads share: two, so that they do not write to one cache line of the results, either.
    static constexpr int64_t PANELS_AT_LEAST = 2;

    const void* data;
    int64_t k;

    // Panels [panel, panel + num) at columns [begin, end) of k, as tiles read them; until this thread's next call.
    const T* take(int64_t panel, int num, int64_t begin, int64_t end) const { return (const T*)address(panel, begin); }
    // Elements from one of them to the next.
    int64_t stride(int64_t begin, int64_t end) const { return k * LANES; }
    // Where memory has them.
    const char* address(int64_t panel, int64_t begin) const { return (const char*)data + (panel * k + begin) * COLUMN_BYTES; }
    // Multiplies panels [begin, end) without tiles, and says so, where that is quicker.
    template <typename O>
    bool multiply(const MatmulArgs& a, int64_t begin, int64_t end) const {
        return false;
    }
};

// Memory of this thread for so many numbers; until its next call.
template <typename T>
T* scratch(int64_t count) {
    struct alignas(LINE) Line {
        char bytes[LINE];
    };
    static thread_local std::vector<Line> buffer;
    const size_t num_lines = (count * sizeof(T) + LINE - 1) / LINE;
    if (buffer.size() < num_lines) buffer.resize(num_lines);
    return (T*)buffer.data();
}

// body(step) for each of some steps, the number being a constant.
template <int STEPS, int S = 0, typename F>
inline void each_step(const F& body) {
    if constexpr (S < STEPS) {
        body.template operator()<S>();
        each_step<STEPS, S + 1>(body);
    }
}

// Columns [begin, end) of k: their weights, packed, a panel `stride` elements after the other; and what memory is to bring
// meanwhile: `num_next` streams, `next_stride` bytes apart, `next_step` bytes in each step.
template <typename T>
struct Chunk {
    int64_t begin, end;
    const T* weight;
    int64_t stride;
    const char* next;
    int64_t next_stride, next_step;
    int num_next;
};

// MR rows by NP panels. `sums`, [MR][NP][16], hold those of the chunks before, and take those of this one unless it is
// the last.
template <typename T, typename O, int MR, int NP>
void tile(const MatmulArgs& a, int64_t row, int64_t panel, float* sums, const Chunk<T>& chunk) {
    constexpr int KS = STEP<T>;
    const T* x = (const T*)a.x + row * a.x_stride;
    const T* w = chunk.weight;
    f32x16 acc[MR][NP];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NP; j++) acc[i][j] = chunk.begin ? load(sums + (i * NP + j) * LANES) : splat(0.0f);
    const char* next = chunk.next;
    for (int64_t k = chunk.begin; k < chunk.end; k += KS, w += KS * LANES, next += chunk.next_step) {
        for (int i = 0; i < chunk.num_next; i++) __builtin_prefetch(next + i * chunk.next_stride, 0, 2);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
            for (int j = 0; j < NP; j++)
                acc[i][j] = step(acc[i][j], x + i * a.x_stride + k, w + j * chunk.stride);
    }
    for (int i = 0; i < MR; i++)
        if (chunk.end == a.k) finish_row<O, NP>(a, row + i, panel, (const float*)acc[i], LANES);
        else
            for (int j = 0; j < NP; j++) store(sums + (i * NP + j) * LANES, acc[i][j]);
}

// Accumulators that fit the registers: 32 of 512 bits, or 16 of 256 (a vector takes two).
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 6, MAX_PANELS = 4;
constexpr int TALL_ROWS = 12;
#else
constexpr int MAX_ROWS = 3, MAX_PANELS = 2, TALL_ROWS = 3;
#endif
// Passes up to which a weight is taken in chunks of k, and memory brings the next chunk while the cache has this one for
// all passes but the first. Beyond them memory has so little to do that it would only cost, unless the first pass has more
// to do than to read.

template <typename T, typename O, int NP, int MR>
void some_rows(const MatmulArgs& a, int64_t row, int rows, int64_t panel, float* sums, const Chunk<T>& chunk) {
    if constexpr (MR > 0) {
        if (rows == MR) tile<T, O, MR, NP>(a, row, panel, sums, chunk);
        else some_rows<T, O, NP, MR - 1>(a, row, rows, panel, sums, chunk);
    }
}

// All rows by NP panels, in passes of about equal size. Panels from `end` on are another thread's.
template <typename O, int NP, int ROWS, typename W>
void rows_of_panels(const MatmulArgs& a, const W& weights, int64_t panel, int64_t end) {
    using T = typename W::Element;
    const int64_t passes = (a.m + ROWS - 1) / ROWS;
    const bool some = a.m > MAX_ROWS && passes <= W::MAX_PASSES && !(W::MADE_IN_FIRST_PASS && passes == 1);
    const bool few = W::ALWAYS_IN_CHUNKS || some;
    const int64_t num_chunks = few ? std::max<int64_t>(1, a.k / W::CHUNK) : 1;
    const int64_t size = (a.k / num_chunks + 15) / 16 * 16;
    Chunk<T> chunk{};
    constexpr int STREAMS = W::IN_ONE_STREAM ? 1 : NP;
    chunk.next_stride = a.k * W::COLUMN_BYTES, chunk.next_step = NP / STREAMS * STEP<T> * W::COLUMN_BYTES;
    alignas(64) float sums[W::MAX_PASSES * ROWS * NP * LANES];
    for (int64_t begin = 0; begin < a.k; begin += size) {
        chunk.begin = begin, chunk.end = std::min(a.k, begin + size);
        chunk.stride = weights.stride(begin, chunk.end);
        if constexpr (!W::MADE_IN_FIRST_PASS) chunk.weight = weights.take(panel, NP, begin, chunk.end);
        else if (passes > 1) chunk.weight = scratch<T>(NP * chunk.stride);
        const bool is_last = chunk.end == a.k;
        const char* next = weights.address(panel + (is_last ? NP : 0), is_last ? 0 : chunk.end);
        const bool brings = (few || (W::MADE_IN_FIRST_PASS && passes > 1)) && (!is_last || panel + NP < end);
        const int share = passes > STREAMS ? 1 : (int)((STREAMS + passes - 1) / passes);  // that a pass brings
        int64_t row = 0;
        for (int64_t pass = 0; pass < passes; pass++) {
            const int rows = (int)((a.m - row) / (passes - pass));
            const int64_t first = (passes > STREAMS ? pass - 1 : pass) * share;
            chunk.num_next = brings && first >= 0 ? (int)std::clamp<int64_t>(STREAMS - first, 0, share) : 0;
            chunk.next = next + (chunk.num_next ? first * chunk.next_stride : 0);
            float* sums_of_rows = sums + (few ? row * NP * LANES : 0);
            if (!W::MADE_IN_FIRST_PASS || pass) some_rows<T, O, NP, ROWS>(a, row, rows, panel, sums_of_rows, chunk);
            else if constexpr (W::MADE_IN_FIRST_PASS) weights.template first_rows<O, NP, ROWS>(a, rows, panel, sums, chunk);
            row += rows;
        }
    }
}

template <typename O, typename W>
void panels(const MatmulArgs& a, const W& weights, int64_t begin, int64_t end) {
    int64_t p = begin;
#if defined(__AVX512F__)
    if (a.m > MAX_ROWS && a.m <= W::MAX_TALL)
        for (; p + 2 <= end; p += 2) rows_of_panels<O, 2, TALL_ROWS>(a, weights, p, end);
#endif
    for (; p + MAX_PANELS <= end; p += MAX_PANELS) rows_of_panels<O, MAX_PANELS, MAX_ROWS>(a, weights, p, end);
    if constexpr (MAX_PANELS == 4) {
        if (end - p >= 2) rows_of_panels<O, 2, MAX_ROWS>(a, weights, p, end), p += 2;
    }
    if (p < end) rows_of_panels<O, 1, MAX_ROWS>(a, weights, p, end);
}

#if defined(__AMX_BF16__)
// By tiles: sums in tile registers 0 to 3, x in 4 and 5, weights in 6 and 7. A panel of a packed weight is a column of
// right-hand tiles as it lies.
constexpr int64_t TILE_ROWS = 16, TILE_K = 32;
// Up to so many rows the time goes into streaming the weights: x is held, four panels go by at once.
constexpr int64_t FEW_ROWS = 64;
constexpr int64_t BLOCK_ROWS = 128, GROUP_PANELS = 12;

// x tile 4 and sums 0, 1 have `first` rows; x tile 5 and sums 2, 3 have `second`.
void configure(int first, int second) {
    TileConfig config;
    const int rows[8] = {first, first, second, second, first, second, TILE_ROWS, TILE_ROWS};
    for (int i = 0; i < 8; i++) config.set(i, rows[i], 64);
    _tile_loadconfig(&config);
}

// Up to 16 rows by NP panels. With `again` the panels are in the cache from other rows, and memory is free to bring the
// beginning of the next ones.
template <typename O, int NP, typename W>
void one_tile_row(const MatmulArgs& a, const W& weights, int64_t row, int rows, int64_t panel, const bf16* w, bool again) {
    const bf16* x = (const bf16*)a.x + row * a.x_stride;
    const int64_t panel_size = a.k * LANES, next_size = a.k * W::COLUMN_BYTES;
    const char* next = weights.address(panel + NP, 0);
    zero_sums();
    for (int64_t k = 0; k < a.k; k += TILE_K) {
        const bf16* wk = w + k * LANES;
        if (again) {
            for (int j = 0; j < NP; j++) {
                _mm_prefetch(next + j * next_size, _MM_HINT_T1);
                _mm_prefetch(next + j * next_size + LINE, _MM_HINT_T1);
            }
            next += 2 * LINE;
        }
        _tile_loadd(4, x + k, a.x_stride * sizeof(bf16));
        _tile_loadd(6, wk, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (NP > 1) {
            _tile_loadd(7, wk + panel_size, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (NP > 2) {
            _tile_loadd(6, wk + 2 * panel_size, 64);
            _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (NP > 3) {
            _tile_loadd(7, wk + 3 * panel_size, 64);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    alignas(64) float sums[4][TILE_ROWS * LANES];
    store_sums(sums[0], TILE_ROWS * LANES, LANES);
    for (int i = 0; i < rows; i++) finish_row<O, NP>(a, row + i, panel, sums[0] + i * LANES, TILE_ROWS * LANES);
}

// 17 to 32 rows by NP panels. Memory brings the results' lines, and `lines` at `next` in each step, the weights to come.
template <typename O, int NP>
void two_tile_rows(
    const MatmulArgs& a, int64_t row, int rows, int64_t panel, const bf16* w, const char* next, int64_t lines
) {
    const bf16* x = (const bf16*)a.x + row * a.x_stride;
    const int64_t panel_size = a.k * LANES;
    const int64_t out_size = a.gated ? a.n / 2 : a.n, out_panel = a.gated ? panel / 2 : panel;
    for (int i = 0; i < rows; i++)
        _mm_prefetch((const char*)((const O*)a.out + (row + i) * out_size + out_panel * LANES), _MM_HINT_T1);
    zero_sums();
    for (int64_t k = 0; k < a.k; k += TILE_K) {
        for (int64_t i = 0; i < lines; i++) _mm_prefetch(next + i * LINE, _MM_HINT_T1);
        next += lines * LINE;
        _tile_loadd(4, x + k, a.x_stride * sizeof(bf16));
        _tile_loadd(6, w + k * LANES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, x + TILE_ROWS * a.x_stride + k, a.x_stride * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (NP > 1) {
            _tile_loadd(7, w + panel_size + k * LANES, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[4][TILE_ROWS * LANES];
    store_sums(sums[0], TILE_ROWS * LANES, LANES);
    for (int i = 0; i < rows; i++)
        finish_row<O, NP>(a, row + i, panel, sums[i < TILE_ROWS ? 0 : 2] + i % TILE_ROWS * LANES, TILE_ROWS * LANES);
}

template <typename O, typename W>
void few_rows_of_panels(const MatmulArgs& a, const W& weights, int64_t row, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p += 4) {
        const bf16* w = weights.take(p, (int)std::min<int64_t>(4, end - p), 0, a.k);
        for (int64_t r = row; r < a.m; r += TILE_ROWS) {
            const int rows = (int)std::min(TILE_ROWS, a.m - r);
            if (r == row || rows < TILE_ROWS) configure(rows, rows);
            switch (end - p) {
                case 1: one_tile_row<O, 1>(a, weights, r, rows, p, w, r > row); break;
                case 2: one_tile_row<O, 2>(a, weights, r, rows, p, w, r > row); break;
                case 3: one_tile_row<O, 3>(a, weights, r, rows, p, w, r > row); break;
                default: one_tile_row<O, 4>(a, weights, r, rows, p, w, r > row); break;
            }
        }
    }
}

template <typename O, typename W>
void many_rows_of_panels(const MatmulArgs& a, const W& weights, int64_t end_row, int64_t begin, int64_t end) {
    const int64_t panel_bytes = a.k * W::COLUMN_BYTES, num_pairs = end_row / (2 * TILE_ROWS);
    const int64_t lines = (2 * panel_bytes / LINE + num_pairs * (a.k / TILE_K) - 1) / (num_pairs * (a.k / TILE_K));
    configure(TILE_ROWS, TILE_ROWS);
    for (int64_t p = begin; p < end; p += 2) {
        const bf16* w = weights.take(p, (int)std::min<int64_t>(2, end - p), 0, a.k);
        const char* next = weights.address(p + 2, 0);
        for (int64_t r = 0; r < end_row; r += 2 * TILE_ROWS, next += lines * (a.k / TILE_K) * LINE) {
            if (end - p >= 2) two_tile_rows<O, 2>(a, r, 2 * TILE_ROWS, p, w, next, lines);
            else two_tile_rows<O, 1>(a, r, 2 * TILE_ROWS, p, w, next, lines);
        }
    }
}

template <typename O, typename W>
void panels_by_tiles(const MatmulArgs& a, const W& weights, int64_t begin, int64_t end) {
    const int64_t many = a.m <= FEW_ROWS ? 0 : a.m / (2 * TILE_ROWS) * (2 * TILE_ROWS);
    if (many) many_rows_of_panels<O>(a, weights, many, begin, end);
    if (many < a.m) few_rows_of_panels<O>(a, weights, many, begin, end);
    _tile_release();
}
#endif

// Rows [row, row + num) of the product.
template <typename T, typename O>
MatmulArgs rows_of(const MatmulArgs& a, int64_t row, int64_t num) {
    const int64_t out_size = a.gated ? a.n / 2 : a.n;
    MatmulArgs rows = a;
    rows.m = std::min(num, a.m - row);
    rows.x = (const T*)a.x + row * a.x_stride;
    rows.out = (O*)a.out + row * out_size;
    if (a.residual) rows.residual = (const O*)a.residual + row * out_size;
    return rows;
}

// Panels that a thread takes at a time, in multiples of `unit`: as many as leave each thread three takes, or fewer where
// all threads then end at about the same time.
int64_t panels_at_a_time(int64_t num_panels, int64_t unit) {
    const int64_t threads = num_threads(), most = std::max<int64_t>(unit, num_panels / (threads * 3) / unit * unit);
    int64_t best = most, least = INT64_MAX;
    for (int64_t size = most; 2 * size > most; size -= unit) {
        const int64_t takes = (num_panels + size - 1) / size;
        const int64_t longest = (takes + threads - 1) / threads * size;  // panels of the busiest thread
        if (longest < least) best = size, least = longest;
    }
    return best;
}

#if defined(__AMX_BF16__)
// Many rows: a take is a block of rows by a group of panels, so that threads that work at the same time read the same
// weights and share no line of x and the results.
template <typename O, typename W>
void many_rows_by_tiles(const MatmulArgs& a, const W& weights, int64_t num_panels) {
    const int64_t blocks = (a.m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t groups = (num_panels + GROUP_PANELS - 1) / GROUP_PANELS;
    parallel_for(blocks * groups, [&](int64_t i) {
        const MatmulArgs block = rows_of<bf16, O>(a, i % blocks * BLOCK_ROWS, BLOCK_ROWS);
        const int64_t begin = i / blocks * GROUP_PANELS;
        panels_by_tiles<O>(block, weights, begin, std::min(num_panels, begin + GROUP_PANELS));
    });
}
#endif

template <typename O, typename W>
void matmul(const MatmulArgs& a, const W& weights) {
    using T = typename W::Element;
    const int64_t num_panels = (a.n + LANES - 1) / LANES, size = panels_at_a_time(num_panels, W::PANELS_AT_LEAST);
#if defined(__AMX_BF16__)
    // By the weight's shape alone: a weight has one instruction class, whatever the number of rows.
    const bool by_tiles = sizeof(T) == 2 && a.k % TILE_K == 0;
    if constexpr (sizeof(T) == 2) {
        if (by_tiles && a.m > FEW_ROWS) return many_rows_by_tiles<O>(a, weights, num_panels);
    }
#endif
    for (int64_t row = 0; row < a.m; row += W::MAX_ROWS_AT_A_TIME) {
        const MatmulArgs rows = rows_of<T, O>(a, row, W::MAX_ROWS_AT_A_TIME);
        parallel_for((num_panels + size - 1) / size, [&](int64_t i) {
            const int64_t begin = i * size, end = std::min(num_panels, begin + size);
#if defined(__AMX_BF16__)
            if constexpr (sizeof(T) == 2) {
                if (by_tiles) return panels_by_tiles<O>(rows, weights, begin, end);
            }
#endif
            if (!weights.template multiply<O>(rows, begin, end)) panels<O>(rows, weights, begin, end);
        });
    }
}

}  // namespace
}  // namespace octavo
