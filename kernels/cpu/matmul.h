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

// For a lambda whose captures are to stay in registers.
#define INLINE __attribute__((always_inline))

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

template <typename O>
void finish_rows(
    const MatmulArgs& a, int64_t row, int rows, int64_t panel, int num, const float* sums, int64_t row_step, int64_t step
) {
    for (int i = 0; i < rows; i++, sums += row_step)
        if (a.gated)
            for (int j = 0; j + 1 < num; j += 2)
                finish_gated<O>(a, row + i, panel + j, load(sums + j * step), load(sums + (j + 1) * step));
        else
            for (int j = 0; j < num; j++) finish<O>(a, row + i, panel + j, load(sums + j * step));
}

// Some rows of `num` panels: rows `row_step` floats apart, panels `step`.
[[gnu::noinline]] void finish_rows(
    const MatmulArgs& a, int64_t row, int rows, int64_t panel, int num, const float* sums, int64_t row_step, int64_t step
) {
    if (a.out_is_bf16) finish_rows<bf16>(a, row, rows, panel, num, sums, row_step, step);
    else finish_rows<float>(a, row, rows, panel, num, sums, row_step, step);
}

// Where tiles find a weight: in memory, as it lies. Weights that lie there in another form (IS_PACKED false) have the same
// members, and, to be unpacked:
// - BLOCK_K: columns of k that are unpacked at once; AHEAD: blocks that memory brings meanwhile; bytes from a panel's
//   block to its next (`block_step`), and to that of the j-th panel after (`panel_step`);
// - STAGED: whether unpacking takes so long that tiles of two panels, for which there are registers, unpack a block while
//   they multiply the one before, and that other tiles than tall ones do not unpack where there are several passes;
// - Blocks<NP>(weights, panel, begin): those of some panels from column `begin` of k on. next(use) unpacks one: use<S>(
//   numbers) for each of its steps, numbers(j) being the weights that the step takes of panel j.
template <typename T>
struct PackedWeights {
    using Element = T;
    static constexpr int64_t COLUMN_BYTES = LANES * sizeof(T);  // of one k of a panel, in memory
    static constexpr bool IS_PACKED = true, STAGED = false;
    static constexpr int64_t TOGETHER = 1;  // panels whose blocks take turns
    // Rows for which tiles are tall: as many rows as may be go by at once, and memory brings two panels while two are
    // multiplied.
    static constexpr int64_t MIN_TALL = 7, MAX_TALL = 24;

    const void* data;
    int64_t k;

    // Where memory has a panel from a column of k on.
    const char* address(int64_t panel, int64_t begin) const {
        return (const char*)data + (panel * k + begin) * COLUMN_BYTES;
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
[[gnu::always_inline]] inline void each_step(const F& body) {
    if constexpr (S < STEPS) {
        body.template operator()<S>();
        each_step<STEPS, S + 1>(body);
    }
}

// Columns [begin, end) of k of a panel, packed, to `out`.
template <typename W, typename T>
void unpack(const W& weights, int64_t panel, int64_t begin, int64_t end, T* out) {
    typename W::template Blocks<1> blocks(weights, panel, begin);
    for (int64_t k = begin; k < end; k += W::BLOCK_K, out += W::BLOCK_K * LANES)
        blocks.next([&]<int S>(const auto& numbers) INLINE {
            const u32x16 w = numbers(0);
            std::memcpy(out + S * STEP<T> * LANES, &w, sizeof w);
        });
}

// Panels [panel, panel + num) of them, those that are unpacked one after the other; until this thread's next call.
template <typename W>
const typename W::Element* take(const W& weights, int64_t panel, int num, int64_t begin, int64_t end) {
    using T = typename W::Element;
    if constexpr (W::IS_PACKED) return (const T*)weights.address(panel, begin);
    else {
        const int64_t size = (end - begin) * LANES;
        T* out = scratch<T>(num * size);
        for (int i = 0; i < num; i++) unpack(weights, panel + i, begin, end, out + i * size);
        return out;
    }
}

// Columns [begin, end) of k: their weights, packed, a panel `stride` elements after the other; and what memory is to
// bring meanwhile: `num_next` streams, `next_stride` bytes apart, `next_step` bytes in each step.
template <typename T>
struct Chunk {
    int64_t begin, end;
    const T* weight;
    int64_t stride;
    const char* next;
    int64_t next_stride, next_step;
    int num_next;
};

// Sums of MR rows by NP panels. `sums`, [MR][NP][16], has those of the chunks before.
template <int MR, int NP>
struct Sums {
    f32x16 of[MR][NP];

    [[gnu::always_inline]] Sums(const float* sums, bool is_first) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NP; j++) of[i][j] = is_first ? splat(0.0f) : load(sums + (i * NP + j) * LANES);
    }

    // Adds two columns of k, or one of float32: x's, in its first row, and weights(j) of panel j.
    template <typename T, typename F>
    [[gnu::always_inline]] void add(const T* x, int64_t x_stride, const F& weights) {
        u32x16 w[NP];
#pragma GCC unroll 4
        for (int j = 0; j < NP; j++) w[j] = weights(j);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NP; j++) of[i][j] = step(of[i][j], x + i * x_stride, w[j]);
    }

    // To `sums`, or, where k has ended, to the result.
    [[gnu::always_inline]] void store(
        const MatmulArgs& a, int64_t row, int64_t panel, float* sums, bool is_last
    ) const {
        alignas(64) float last[MR * NP * LANES];  // in the cache, as `sums` may not be
        float* to = is_last ? last : sums;
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NP; j++) octavo::store(to + (i * NP + j) * LANES, of[i][j]);
        if (is_last) finish_rows(a, row, MR, panel, NP, last, NP * LANES, LANES);
    }
};

template <typename T, int MR, int NP>
void tile(const MatmulArgs& a, int64_t row, int64_t panel, float* sums, const Chunk<T>& chunk) {
    constexpr int KS = STEP<T>;
    const T* x = (const T*)a.x + row * a.x_stride;
    const T* w = chunk.weight;
    const char* next = chunk.next;
    Sums<MR, NP> acc(sums, chunk.begin == 0);
    for (int64_t k = chunk.begin; k < chunk.end; k += KS, w += KS * LANES, next += chunk.next_step) {
        for (int i = 0; i < chunk.num_next; i++) __builtin_prefetch(next + i * chunk.next_stride, 0, 2);
        acc.add(x + k, a.x_stride, [&](int j) INLINE { return load_vec<u32x16>(w + j * chunk.stride); });
    }
    acc.store(a, row, panel, sums, chunk.end == a.k);
}

// Accumulators that fit the registers: 32 of 512 bits, or 16 of 256 (a vector takes two).
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 6, MAX_PANELS = 4;
constexpr int TALL_ROWS = 12;
#else
constexpr int MAX_ROWS = 3, MAX_PANELS = 2, TALL_ROWS = 3;
#endif
// Passes up to which a weight is taken in chunks of k, of about so many columns, and memory brings the next chunk while the
// cache has this one for all passes but the first. Beyond them memory has so little to do that it would only cost.
constexpr int64_t MAX_PASSES = 11, CHUNK = 512;
// Panels that no two threads share: two, so that they do not write to one cache line of the results, either.
constexpr int64_t PANELS_AT_LEAST = 2;

template <typename T, int NP, int MR>
void some_rows(const MatmulArgs& a, int64_t row, int rows, int64_t panel, float* sums, const Chunk<T>& chunk) {
    if constexpr (MR > 0) {
        if (rows == MR) tile<T, MR, NP>(a, row, panel, sums, chunk);
        else some_rows<T, NP, MR - 1>(a, row, rows, panel, sums, chunk);
    }
}

// As `tile`, of the first rows, with weights that are yet to be unpacked. They go straight into the product, and, packed,
// to `kept` if there are to be other passes.
template <int MR, int NP, bool KEPT, typename W, typename T>
void unpacking_tile(const MatmulArgs& a, const W& weights, int64_t panel, float* sums, const Chunk<T>& chunk, T* kept) {
    constexpr int KS = STEP<T>, BLOCK_SIZE = W::BLOCK_K * LANES;
    constexpr bool STAGED = W::STAGED && NP < MAX_PANELS;
    constexpr int64_t BLOCK_BYTES = W::BLOCK_K * W::COLUMN_BYTES;
    const int64_t block_step = weights.block_step(panel);
    const int64_t ahead = std::min(W::AHEAD, a.k / W::BLOCK_K) * W::BLOCK_K;
    const T* x = (const T*)a.x;
    Sums<MR, NP> acc(sums, chunk.begin == 0);
    typename W::template Blocks<NP> blocks(weights, panel, chunk.begin);
    // Without other passes memory brings what is `ahead` of this, at last of the next panels.
    const char* next = KEPT ? chunk.next : weights.address(panel, ahead);
    const auto bring = [&](int64_t k) INLINE {
        if (!KEPT && k == a.k - ahead) next = weights.address(panel + NP, 0);
        const int num_next = KEPT ? chunk.num_next * (int)W::TOGETHER : NP;
#pragma GCC unroll 4
        for (int j = 0; j < num_next; j++)
#pragma GCC unroll 4
            for (int64_t at = 0; at < BLOCK_BYTES; at += LINE) __builtin_prefetch(next + weights.panel_step(j) + at, 0, 2);
        next += block_step;
    };
    alignas(64) T stage[STAGED && !KEPT ? 2 * NP * BLOCK_SIZE : 1];  // of two blocks, in turn
    T* to = KEPT ? kept : stage;
    const int64_t stride = KEPT ? chunk.stride : 2 * BLOCK_SIZE;
    const auto keep = [&](int step, int j, u32x16 w) INLINE {
        std::memcpy(to + j * stride + step * KS * LANES, &w, sizeof w);
    };
    if constexpr (STAGED) {
        const T* before;  // the block before
        const auto turn = [&] {
            before = to;
            if (KEPT) to += BLOCK_SIZE;
            else to = stage + (to == stage ? BLOCK_SIZE : 0);
        };
        const auto keep_all = [&]<int S>(const auto& numbers) INLINE {
#pragma GCC unroll 4
            for (int j = 0; j < NP; j++) keep(S, j, numbers(j));
        };
        const auto multiply_before = [&]<int S>(int64_t k) INLINE {
            acc.add(x + k + S * KS, a.x_stride, [&](int j) INLINE {
                return load_vec<u32x16>(before + j * stride + S * KS * LANES);
            });
        };
        int64_t k = chunk.begin;
        bring(k);
        blocks.next(keep_all);
        turn();
        while ((k += W::BLOCK_K) < chunk.end) {
            bring(k);
            blocks.next([&]<int S>(const auto& numbers) INLINE {
                keep_all.template operator()<S>(numbers);
                multiply_before.template operator()<S>(k - W::BLOCK_K);
            });
            turn();
        }
        each_step<W::BLOCK_K / KS>([&]<int S>() INLINE { multiply_before.template operator()<S>(k - W::BLOCK_K); });
    } else {
        for (int64_t k = chunk.begin; k < chunk.end; k += W::BLOCK_K, to += KEPT ? BLOCK_SIZE : 0) {
            bring(k);
            blocks.next([&]<int S>(const auto& numbers) INLINE {
                acc.add(x + k + S * KS, a.x_stride, [&](int j) INLINE {
                    const u32x16 w = numbers(j);
                    if constexpr (KEPT) keep(S, j, w);
                    return w;
                });
            });
        }
    }
    acc.store(a, 0, panel, sums, chunk.end == a.k);
}

// LEAST to MR rows.
template <int LEAST, int MR, int NP, bool KEPT, typename W, typename T>
void unpacking_rows(
    const MatmulArgs& a, const W& weights, int rows, int64_t panel, float* sums, const Chunk<T>& chunk, T* kept
) {
    if constexpr (MR > LEAST) {
        if (rows < MR) return unpacking_rows<LEAST, MR - 1, NP, KEPT>(a, weights, rows, panel, sums, chunk, kept);
    }
    unpacking_tile<MR, NP, KEPT>(a, weights, panel, sums, chunk, kept);
}

// All rows by NP panels, in passes of about equal size. Panels from `end` on are another thread's.
template <int NP, int ROWS, typename W>
void rows_of_panels(const MatmulArgs& a, const W& weights, int64_t panel, int64_t end) {
    using T = typename W::Element;
    const int64_t passes = (a.m + ROWS - 1) / ROWS;
    // Whether tiles unpack as they multiply; or chunks are unpacked before.
    constexpr bool IS_TALL = ROWS > MAX_ROWS;
    const bool unpacks = !W::IS_PACKED && (!W::STAGED || IS_TALL || (NP > 1 && passes == 1));
    const bool few = a.m > MAX_ROWS && passes <= MAX_PASSES && !(unpacks && passes == 1);
    const int64_t num_chunks = few ? std::max<int64_t>(1, a.k / CHUNK) : 1;
    const int64_t size = (a.k / num_chunks + 15) / 16 * 16;
    constexpr int STREAMS = std::max<int>(1, NP / W::TOGETHER);
    Chunk<T> chunk{};
    chunk.next_step = W::TOGETHER * STEP<T> * W::COLUMN_BYTES, chunk.next_stride = W::TOGETHER * a.k * W::COLUMN_BYTES;
    alignas(64) float sums[MAX_PASSES * ROWS * NP * LANES];
    for (int64_t begin = 0; begin < a.k; begin += size) {
        chunk.begin = begin, chunk.end = std::min(a.k, begin + size);
        chunk.stride = (W::IS_PACKED ? a.k : chunk.end - begin) * LANES;
        T* kept = nullptr;
        if (!unpacks) chunk.weight = take(weights, panel, NP, begin, chunk.end);
        else if (passes > 1) chunk.weight = kept = scratch<T>(NP * chunk.stride);
        const bool is_last = chunk.end == a.k;
        const char* next = weights.address(panel + (is_last ? NP : 0), is_last ? 0 : chunk.end);
        const bool brings = (few || (!W::IS_PACKED && passes > 1)) && (!is_last || panel + NP < end);
        const int share = passes > STREAMS ? 1 : (int)((STREAMS + passes - 1) / passes);  // that a pass brings
        int64_t row = 0;
        for (int64_t pass = 0; pass < passes; pass++) {
            const int rows = (int)((a.m - row) / (passes - pass));
            const int64_t first = (passes > STREAMS ? pass - 1 : pass) * share;
            chunk.num_next = brings && first >= 0 ? (int)std::clamp<int64_t>(STREAMS - first, 0, share) : 0;
            chunk.next = next + (chunk.num_next ? first * chunk.next_stride : 0);
            float* sums_of_rows = sums + (few ? row * NP * LANES : 0);
            if (!unpacks || pass) some_rows<T, NP, ROWS>(a, row, rows, panel, sums_of_rows, chunk);
            else if constexpr (!W::IS_PACKED) {
                // The least rows of a single pass, and of the first of several.
                constexpr int LEAST = IS_TALL ? W::MIN_TALL : 1, HALF = (ROWS + 1) / 2;
                if constexpr (!W::STAGED || NP > 1) {
                    if (passes == 1) unpacking_rows<LEAST, ROWS, NP, false>(a, weights, rows, panel, sums, chunk, kept);
                }
                if constexpr (!W::STAGED || IS_TALL) {
                    if (passes > 1) unpacking_rows<HALF, ROWS, NP, true>(a, weights, rows, panel, sums, chunk, kept);
                }
            }
            row += rows;
        }
    }
}

template <typename W>
void panels(const MatmulArgs& a, const W& weights, int64_t begin, int64_t end) {
    int64_t p = begin;
    if constexpr (TALL_ROWS > MAX_ROWS && W::MAX_TALL > 0) {
        if (a.m >= W::MIN_TALL && a.m <= W::MAX_TALL)
            for (; p + 2 <= end; p += 2) rows_of_panels<2, TALL_ROWS>(a, weights, p, end);
    }
    for (; p + MAX_PANELS <= end; p += MAX_PANELS) rows_of_panels<MAX_PANELS, MAX_ROWS>(a, weights, p, end);
    if constexpr (MAX_PANELS == 4) {
        if (end - p >= 2) rows_of_panels<2, MAX_ROWS>(a, weights, p, end), p += 2;
    }
    if (p < end) rows_of_panels<1, MAX_ROWS>(a, weights, p, end);
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
template <int NP, typename W>
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
    finish_rows(a, row, rows, panel, NP, sums[0], LANES, TILE_ROWS * LANES);
}

// 32 rows by NP panels. Memory brings the results' lines, and `lines` at `next` in each step, the weights to come.
template <int NP>
void two_tile_rows(
    const MatmulArgs& a, int64_t row, int64_t panel, const bf16* w, const char* next, int64_t lines
) {
    const bf16* x = (const bf16*)a.x + row * a.x_stride;
    const int64_t panel_size = a.k * LANES;
    const int64_t size = a.out_is_bf16 ? 2 : 4, row_bytes = (a.gated ? a.n / 2 : a.n) * size;
    const char* out = (const char*)a.out + row * row_bytes + (a.gated ? panel / 2 : panel) * LANES * size;
    for (int i = 0; i < 2 * TILE_ROWS; i++) _mm_prefetch(out + i * row_bytes, _MM_HINT_T1);
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
    for (int i = 0; i < 2; i++)
        finish_rows(a, row + i * TILE_ROWS, TILE_ROWS, panel, NP, sums[2 * i], LANES, TILE_ROWS * LANES);
}

template <typename W>
void few_rows_of_panels(const MatmulArgs& a, const W& weights, int64_t row, int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p += 4) {
        const bf16* w = take(weights, p, (int)std::min<int64_t>(4, end - p), 0, a.k);
        for (int64_t r = row; r < a.m; r += TILE_ROWS) {
            const int rows = (int)std::min(TILE_ROWS, a.m - r);
            if (r == row || rows < TILE_ROWS) configure(rows, rows);
            switch (end - p) {
                case 1: one_tile_row<1>(a, weights, r, rows, p, w, r > row); break;
                case 2: one_tile_row<2>(a, weights, r, rows, p, w, r > row); break;
                case 3: one_tile_row<3>(a, weights, r, rows, p, w, r > row); break;
                default: one_tile_row<4>(a, weights, r, rows, p, w, r > row); break;
            }
        }
    }
}

template <typename W>
void many_rows_of_panels(const MatmulArgs& a, const W& weights, int64_t end_row, int64_t begin, int64_t end) {
    const int64_t panel_bytes = a.k * W::COLUMN_BYTES, num_pairs = end_row / (2 * TILE_ROWS);
    const int64_t lines = (2 * panel_bytes / LINE + num_pairs * (a.k / TILE_K) - 1) / (num_pairs * (a.k / TILE_K));
    configure(TILE_ROWS, TILE_ROWS);
    for (int64_t p = begin; p < end; p += 2) {
        const bf16* w = take(weights, p, (int)std::min<int64_t>(2, end - p), 0, a.k);
        const char* next = weights.address(p + 2, 0);
        for (int64_t r = 0; r < end_row; r += 2 * TILE_ROWS, next += lines * (a.k / TILE_K) * LINE) {
            if (end - p >= 2) two_tile_rows<2>(a, r, p, w, next, lines);
            else two_tile_rows<1>(a, r, p, w, next, lines);
        }
    }
}

template <typename W>
void panels_by_tiles(const MatmulArgs& a, const W& weights, int64_t begin, int64_t end) {
    const int64_t many = a.m <= FEW_ROWS ? 0 : a.m / (2 * TILE_ROWS) * (2 * TILE_ROWS);
    if (many) many_rows_of_panels(a, weights, many, begin, end);
    if (many < a.m) few_rows_of_panels(a, weights, many, begin, end);
    _tile_release();
}
#endif

// Panels that a thread takes at a time: as many as leave each thread three takes, or fewer where all threads then end at
// about the same time.
int64_t panels_at_a_time(int64_t num_panels) {
    constexpr int64_t UNIT = PANELS_AT_LEAST;
    const int64_t threads = num_threads(), most = std::max(UNIT, num_panels / (threads * 3) / UNIT * UNIT);
    int64_t best = most, least = INT64_MAX;
    for (int64_t size = most; 2 * size > most; size -= UNIT) {
        const int64_t takes = (num_panels + size - 1) / size;
        const int64_t longest = (takes + threads - 1) / threads * size;  // panels of the busiest thread
        if (longest < least) best = size, least = longest;
    }
    return best;
}

#if defined(__AMX_BF16__)
// Rows [row, row + num) of the product.
MatmulArgs rows_of(const MatmulArgs& a, int64_t row, int64_t num) {
    const int64_t row_bytes = (a.gated ? a.n / 2 : a.n) * (a.out_is_bf16 ? 2 : 4);
    MatmulArgs rows = a;
    rows.m = std::min(num, a.m - row);
    rows.x = (const bf16*)a.x + row * a.x_stride;
    rows.out = (char*)a.out + row * row_bytes;
    if (a.residual) rows.residual = (const char*)a.residual + row * row_bytes;
    return rows;
}

// Many rows: a take is a block of rows by a group of panels, so that threads that work at the same time read the same
// weights and share no line of x and the results.
template <typename W>
void many_rows_by_tiles(const MatmulArgs& a, const W& weights, int64_t num_panels) {
    const int64_t blocks = (a.m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t groups = (num_panels + GROUP_PANELS - 1) / GROUP_PANELS;
    parallel_for(blocks * groups, [&](int64_t i) {
        const MatmulArgs block = rows_of(a, i % blocks * BLOCK_ROWS, BLOCK_ROWS);
        const int64_t begin = i / blocks * GROUP_PANELS;
        panels_by_tiles(block, weights, begin, std::min(num_panels, begin + GROUP_PANELS));
    });
}
#endif

template <typename W>
void matmul(const MatmulArgs& a, const W& weights) {
    const int64_t num_panels = (a.n + LANES - 1) / LANES, size = panels_at_a_time(num_panels);
#if defined(__AMX_BF16__)
    using T = typename W::Element;
    // By the weight's shape alone: a weight has one instruction class, whatever the number of rows.
    const bool by_tiles = sizeof(T) == 2 && a.k % TILE_K == 0;
    if constexpr (sizeof(T) == 2) {
        if (by_tiles && a.m > FEW_ROWS) return many_rows_by_tiles(a, weights, num_panels);
    }
#endif
    parallel_for((num_panels + size - 1) / size, [&](int64_t i) {
        const int64_t begin = i * size, end = std::min(num_panels, begin + size);
#if defined(__AMX_BF16__)
        if constexpr (sizeof(T) == 2) {
            if (by_tiles) return panels_by_tiles(a, weights, begin, end);
        }
#endif
        panels(a, weights, begin, end);
    });
}

}  // namespace
}  // namespace octavo
