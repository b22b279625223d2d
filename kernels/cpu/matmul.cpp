// Linear layers with one canonical product: out[m, n] = sum over k of x[m, k] * w[n, k], k from 0 upwards in one
// accumulator per output, fp32, one rounding at the end. Tiles over rows and columns vary with the shape; the order of
// the sum does not, so a row's bits do not depend on how many rows share the call.
//
// Packed weights: panels of 16 output columns. bfloat16: [N/16][K/2][16][2] (pairs along K, as dot-product instructions
// take them); float32: [N/16][K][16]. Columns past N are zero.
#include "vec.h"

#include <omp.h>

#include <algorithm>

namespace octavo {
namespace {

struct Args {
    const void* x;         // [m, k], row stride x_stride elements
    const void* weight;    // packed
    const float* bias;     // [n] or null
    const void* residual;  // as out, or null; may be out itself
    void* out;             // [m, n], row stride out_stride elements
    int64_t m, n, k, x_stride, out_stride;
};

// acc += the dot product of K-pairs (bfloat16), or of single values (float32).
inline f32x16 step(f32x16 acc, const bf16* x, const bf16* w) {
    uint32_t pair;
    std::memcpy(&pair, x, 4);
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)load_vec<__m512i>(w));
#else
    const u32x16 both = load_vec<u32x16>(w);
    const float lo = to_float((bf16)(pair & 0xffff)), hi = to_float((bf16)(pair >> 16));
    acc = fma((f32x16)(both << 16), splat(lo), acc);
    return fma((f32x16)(both & 0xffff0000u), splat(hi), acc);
#endif
}
inline f32x16 step(f32x16 acc, const float* x, const float* w) { return fma(load(w), splat(*x), acc); }

template <typename T>
constexpr int STEP_K = sizeof(T) == 2 ? 2 : 1;

template <typename T, typename O, int MR, int NP>
void tile(const Args& a, int64_t row, int64_t panel) {
    constexpr int KS = STEP_K<T>;
    const T* x = (const T*)a.x + row * a.x_stride;
    const int64_t panel_size = a.k * LANES;
    const T* w = (const T*)a.weight + panel * panel_size;
    f32x16 acc[MR][NP];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NP; j++) acc[i][j] = splat(0.0f);
    for (int64_t k = 0; k < a.k; k += KS) {
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
            for (int j = 0; j < NP; j++)
                acc[i][j] = step(acc[i][j], x + i * a.x_stride + k, w + j * panel_size + k * LANES);
    }
    for (int i = 0; i < MR; i++) {
        for (int j = 0; j < NP; j++) {
            const int64_t col = (panel + j) * LANES;
            const int width = (int)std::min<int64_t>(LANES, a.n - col);
            O* out = (O*)a.out + (row + i) * a.out_stride + col;
            const O* residual = a.residual ? (const O*)a.residual + (row + i) * a.out_stride + col : nullptr;
            f32x16 v = acc[i][j];
            if (width == LANES) {
                if (a.bias) v = v + load(a.bias + col);
                if (residual) v = v + load(residual);
                store(out, v);
            } else {
                for (int c = 0; c < width; c++) {
                    float f = v[c];
                    if (a.bias) f = f + a.bias[col + c];
                    if (residual) f = f + to_float(residual[c]);
                    store_one(out + c, f);
                }
            }
        }
    }
}

// Accumulators that fit the registers: 32 of 512 bits, or 16 of 256 (a vector takes two).
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 6, MAX_PANELS = 4;
#else
constexpr int MAX_ROWS = 3, MAX_PANELS = 2;
#endif

template <typename T, typename O, int NP>
void rows_of_panels(const Args& a, int64_t panel) {
    int64_t row = 0;
    for (; row + MAX_ROWS <= a.m; row += MAX_ROWS) tile<T, O, MAX_ROWS, NP>(a, row, panel);
    switch (a.m - row) {
        case 5: if constexpr (MAX_ROWS > 5) tile<T, O, 5, NP>(a, row, panel); break;
        case 4: if constexpr (MAX_ROWS > 4) tile<T, O, 4, NP>(a, row, panel); break;
        case 3: if constexpr (MAX_ROWS > 3) tile<T, O, 3, NP>(a, row, panel); break;
        case 2: tile<T, O, 2, NP>(a, row, panel); break;
        case 1: tile<T, O, 1, NP>(a, row, panel); break;
        default: break;
    }
}

template <typename T, typename O>
void panels(const Args& a, int64_t begin, int64_t end) {
    int64_t p = begin;
    for (; p + MAX_PANELS <= end; p += MAX_PANELS) rows_of_panels<T, O, MAX_PANELS>(a, p);
    if constexpr (MAX_PANELS == 4) {
        if (end - p >= 2) rows_of_panels<T, O, 2>(a, p), p += 2;
    }
    if (p < end) rows_of_panels<T, O, 1>(a, p);
}

template <typename T, typename O>
void matmul(const Args& a) {
    const int64_t num_panels = (a.n + LANES - 1) / LANES;
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        panels<T, O>(a, num_panels * thread / threads, num_panels * (thread + 1) / threads);
    }
}

template <typename T>
void pack(T* out, const T* weight, int64_t row_begin, int64_t rows, int64_t k) {
    constexpr int KS = STEP_K<T>;
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        const int64_t n = row_begin + r;
        T* panel = out + (n / LANES) * LANES * k + (n % LANES) * KS;
        for (int64_t c = 0; c < k; c += KS)
            for (int s = 0; s < KS; s++) panel[c * LANES + s] = weight[r * k + c + s];
    }
}

template <typename T>
void unpack_rows(T* out, const T* packed, const int32_t* ids, int64_t count, int64_t k) {
    constexpr int KS = STEP_K<T>;
    for (int64_t i = 0; i < count; i++) {
        const int64_t n = ids[i];
        const T* panel = packed + (n / LANES) * LANES * k + (n % LANES) * KS;
        for (int64_t c = 0; c < k; c += KS)
            for (int s = 0; s < KS; s++) out[i * k + c + s] = panel[c * LANES + s];
    }
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_matmul(const void* x, const void* weight, const float* bias, const void* residual, void* out,
                              int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t out_stride, int is_bf16,
                              int out_is_bf16) {
    const Args a{x, weight, bias, residual, out, m, n, k, x_stride, out_stride};
    if (!is_bf16) matmul<float, float>(a);
    else if (out_is_bf16) matmul<bf16, bf16>(a);
    else matmul<bf16, float>(a);
}

extern "C" void octavo_pack_weight(void* out, const void* weight, int64_t row_begin, int64_t rows, int64_t k,
                                   int is_bf16) {
    if (is_bf16) pack((bf16*)out, (const bf16*)weight, row_begin, rows, k);
    else pack((float*)out, (const float*)weight, row_begin, rows, k);
}

// Rows of a packed weight, as an embedding lookup. ids must lie in [0, n).
extern "C" void octavo_embedding(void* out, const void* packed, const int32_t* ids, int64_t count, int64_t k,
                                 int is_bf16) {
    if (is_bf16) unpack_rows((bf16*)out, (const bf16*)packed, ids, count, k);
    else unpack_rows((float*)out, (const float*)packed, ids, count, k);
}
