// Sixteen-lane float vectors, bfloat16 conversion, and the one polynomial for exp and log.
//
// All arithmetic here and in the ops is explicit: the build turns contraction off, so a multiply-add is fused only where
// `fma` says so. A lane's float32 result therefore does not depend on the instruction set or on how a loop was unrolled;
// bfloat16 products and roundings are the machine's own where it has them.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace octavo {

constexpr int LANES = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

using bf16 = uint16_t;  // the upper half of a float's bits
struct f16 {            // IEEE half precision
    uint16_t bits;
};

constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

inline f32x16 splat(float x) {
    f32x16 v = {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
    return v;
}

template <typename V>
inline V load_vec(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union U {
        f32x16 v;
        __m256 h[2];
    } x{a}, y{b}, z{c};
    z.h[0] = _mm256_fmadd_ps(x.h[0], y.h[0], z.h[0]);
    z.h[1] = _mm256_fmadd_ps(x.h[1], y.h[1], z.h[1]);
    return z.v;
#else
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

inline f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#endif
    return a > b ? a : b;
}

inline f32x16 select(i32x16 mask, f32x16 a, f32x16 b) { return mask ? a : b; }

// The lanes added in one fixed tree: (i) + (i + 8), then + 4, + 2, + 1.
inline float sum_lanes(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#endif
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) v[i] = v[i] + v[i + half];
    return v[0];
}

inline float max_lanes(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float to_float(float x) { return x; }

inline f32x16 load(const float* p) { return load_vec<f32x16>(p); }
inline f32x16 load(const bf16* p) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_vec<__m256i>(p)), 16);
#endif
    u32x16 wide = __builtin_convertvector(load_vec<u16x16>(p), u32x16) << 16;
    return (f32x16)wide;
}

inline f32x16 load(const f16* p) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(load_vec<__m256i>(p));
#elif defined(__F16C__)
    union {
        __m256 h[2];
        f32x16 v;
    } x{{_mm256_cvtph_ps(load_vec<__m128i>(p)), _mm256_cvtph_ps(load_vec<__m128i>(p + 8))}};
    return x.v;
#else
    f32x16 v;
    for (int i = 0; i < LANES; i++) v[i] = (float)load_vec<_Float16>(p + i);
    return v;
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }
inline void store(bf16* p, f32x16 v) {
#if defined(__AVX512BF16__)
    const __m256bh narrow_bits = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &narrow_bits, sizeof narrow_bits);
    return;
#endif
    u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x16 is_nan = (u32x16)((bits & 0x7fffffff) > 0x7f800000);
    rounded = (rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan);
    u16x16 narrow = __builtin_convertvector(rounded, u16x16);
    std::memcpy(p, &narrow, sizeof narrow);
}

// Stores v and gives what is stored, which in bfloat16 is rounded.
inline f32x16 store_rounded(float* p, f32x16 v) {
    store(p, v);
    return v;
}
inline f32x16 store_rounded(bf16* p, f32x16 v) {
#if defined(__AVX512BF16__)
    const __m256i narrow = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &narrow, sizeof narrow);
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#endif
    store(p, v);
    return load(p);
}

inline void store_one(float* p, float f) { *p = f; }
inline void store_one(bf16* p, float f) { *p = to_bf16(f); }

// Entries of a table at indices, of which the lowest four bits count.
inline f32x16 look_up(f32x16 table, u32x16 index) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
    union U {
        f32x16 v;
        __m256 h[2];
    } t{table}, i{(f32x16)index}, high{(f32x16)(index << 28)};
    for (int part = 0; part < 2; part++) {  // an instruction has eight entries: the fourth bit, as a sign, selects
        const __m256i lane = (__m256i)i.h[part];
        const __m256 low = _mm256_permutevar8x32_ps(t.h[0], lane), up = _mm256_permutevar8x32_ps(t.h[1], lane);
        i.h[part] = _mm256_blendv_ps(low, up, high.h[part]);
    }
    return i.v;
#else
    f32x16 v;
    for (int i = 0; i < LANES; i++) v[i] = table[index[i] & 15];
    return v;
#endif
}

// What matrix products are made of. A step takes STEP consecutive elements of x, broadcast, and as many for each of 16
// lanes of w ([16][STEP], paired as bfloat16 dot-product instructions take them), and adds the products to acc.
template <typename T>
constexpr int STEP = sizeof(T) == 2 ? 2 : 1;

inline f32x16 step(f32x16 acc, const float* x, u32x16 w) { return fma((f32x16)w, splat(*x), acc); }
inline f32x16 step(f32x16 acc, const bf16* x, u32x16 w) {
    uint32_t pair;
    std::memcpy(&pair, x, 4);
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
#else
    const float lo = to_float((bf16)(pair & 0xffff)), hi = to_float((bf16)(pair >> 16));
    acc = fma((f32x16)(w << 16), splat(lo), acc);
    return fma((f32x16)(w & 0xffff0000u), splat(hi), acc);
#endif
}
template <typename T>
inline f32x16 step(f32x16 acc, const T* x, const T* w) {
    return step(acc, x, load_vec<u32x16>(w));
}

// 32 numbers rounded to bfloat16: those of `a` and then those of `b`.
inline u32x16 to_bf16(f32x16 a, f32x16 b) {
#if defined(__AVX512BF16__)
    return (u32x16)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#else
    bf16 both[2 * LANES];
    store(both, a);
    store(both + LANES, b);
    return load_vec<u32x16>(both);
#endif
}

// Numbers of low and high bytes: of the first (HALF 0) or the last eight of each 16.
template <int HALF>
inline u32x16 interleave(u8x64 low, u8x64 high) {
#if defined(__AVX512BW__)
    return HALF ? (u32x16)_mm512_unpackhi_epi8((__m512i)low, (__m512i)high)
                : (u32x16)_mm512_unpacklo_epi8((__m512i)low, (__m512i)high);
#else
    constexpr int H = 8 * HALF;
    union {
        bf16 v[32];
        u32x16 all;
    } out;
    for (int i = 0; i < 32; i++) {
        const int from = i / 8 * 16 + H + i % 8;
        out.v[i] = (bf16)(low[from] | high[from] << 8);
    }
    return out.all;
#endif
}

// 64 bytes that the compiler computes: of a vector it would not.
struct Bytes {
    alignas(64) uint8_t at[64] = {};

    template <typename F>
    constexpr explicit Bytes(const F& of) {
        for (int i = 0; i < 64; i++) at[i] = (uint8_t)of(i);
    }
};

#if defined(__AVX512VBMI__)
constexpr bool HAS_BYTE_TABLES = true;  // of 128 entries

// Bytes FIRST, FIRST + 2, ... of `a` and then of `b`.
template <int FIRST>
inline u8x64 every_other(u8x64 a, u8x64 b) {
    static constexpr Bytes FROM([](int i) { return 2 * i + FIRST; });
    const u8x64 from = load_vec<u8x64>(FROM.at);
    return (u8x64)_mm512_permutex2var_epi8((__m512i)a, (__m512i)from, (__m512i)b);
}

// Entries of a table of 128 bytes; 0 where `mask` is.
inline u8x64 look_up_unless_zero(const u8x64* table, u8x64 index, u8x64 mask) {
    const __mmask64 kept = _mm512_test_epi8_mask((__m512i)mask, (__m512i)mask);
    return (u8x64)_mm512_maskz_permutex2var_epi8(kept, (__m512i)table[0], (__m512i)index, (__m512i)table[1]);
}
#else
constexpr bool HAS_BYTE_TABLES = false;

template <int FIRST>
u8x64 every_other(u8x64 a, u8x64 b);
u8x64 look_up_unless_zero(const u8x64* table, u8x64 index, u8x64 mask);
#endif

#if defined(__AMX_BF16__)
// Tile registers (Intel AMX): up to 16 rows of 64 bytes. A product instruction adds [rows, 32] by [32, 16] bfloat16 to
// rows by 16 float32 sums; its right-hand tile holds pairs: [16][16][2].
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int num_rows, int num_bytes) {
        rows[tile] = (uint8_t)num_rows;
        row_bytes[tile] = (uint16_t)num_bytes;
    }
};

// Tiles 0 to 3, which hold the sums in every op.
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
// Tile i to out + i * step, its rows `row_size` floats apart.
inline void store_sums(float* out, int64_t step, int64_t row_size) {
    _tile_stored(0, out, row_size * sizeof(float));
    _tile_stored(1, out + step, row_size * sizeof(float));
    _tile_stored(2, out + 2 * step, row_size * sizeof(float));
    _tile_stored(3, out + 3 * step, row_size * sizeof(float));
}
#endif

// exp and log after Cephes (S. Moshier, expf and logf): reduced to |r| <= ln(2)/2, degree 5 and 8, error under 2 ulp.
// Below EXP_MIN the result is 0, which also gives exp(-inf) = 0.
constexpr float EXP_MIN = -87.0f, EXP_MAX = 88.0f;

inline f32x16 exp(f32x16 x) {
    const i32x16 flush = x < splat(EXP_MIN);
    x = select(flush, splat(EXP_MIN), x);
    x = select(x > splat(EXP_MAX), splat(EXP_MAX), x);
    const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to an integer
    const f32x16 shifted = fma(x, splat(1.44269504088896341f), magic);
    const f32x16 n = shifted - magic;
    f32x16 r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    f32x16 p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    const i32x16 exponent = ((i32x16)shifted - (i32x16)magic + 127) << 23;
    return select(flush, splat(0.0f), p * (f32x16)exponent);
}

inline float exp(float x) { return exp(splat(x))[0]; }

// 2^x for x below 128: |r| <= 1/2, degree 6 (after Cephes, exp2f), or 4 and an error of 3e-6, which is plenty for what is then
// rounded to bfloat16. Below -126 the result is 0, which also gives 2^-inf = 0.
template <int DEGREE = 6>
inline f32x16 exp2(f32x16 x) {
    constexpr float C[2][7] = {
        {1.0f, 6.931472028550421e-1f, 2.402264791363012e-1f, 5.550332471162809e-2f, 9.618437357674640e-3f,
         1.339887440266574e-3f, 1.535336188319500e-4f},
        {9.999992847e-01f, 6.931217909e-01f, 2.402474433e-01f, 5.591785908e-02f, 9.570101276e-03f},
    };
    const float* c = C[DEGREE == 6 ? 0 : 1];
    const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which its lowest bits hold
    const f32x16 shifted = x + magic;
    const f32x16 r = x - (shifted - magic);
    f32x16 p = splat(c[DEGREE]);
#pragma GCC unroll 6
    for (int i = DEGREE - 1; i >= 0; i--) p = fma(p, r, splat(c[i]));
    const f32x16 scaled = (f32x16)((i32x16)p + ((i32x16)shifted << 23));
    return select(x < splat(-126.0f), splat(0.0f), scaled);
}

inline float exp2(float x) { return exp2(splat(x))[0]; }

// log of a positive, normal, finite number.
inline f32x16 log(f32x16 x) {
    i32x16 bits = (i32x16)x;
    i32x16 e = ((bits >> 23) & 0xff) - 126;
    f32x16 m = (f32x16)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
    const i32x16 low = m < splat(0.707106781186547524f);
    m = select(low, m + m, m) - splat(1.0f);
    f32x16 n = __builtin_convertvector(e + low, f32x16);  // true lanes of `low` are -1
    const f32x16 z = m * m;
    f32x16 p = splat(7.0376836292e-2f);
    p = fma(p, m, splat(-1.1514610310e-1f));
    p = fma(p, m, splat(1.1676998740e-1f));
    p = fma(p, m, splat(-1.2420140846e-1f));
    p = fma(p, m, splat(1.4249322787e-1f));
    p = fma(p, m, splat(-1.6668057665e-1f));
    p = fma(p, m, splat(2.0000714765e-1f));
    p = fma(p, m, splat(-2.4999993993e-1f));
    p = fma(p, m, splat(3.3333331174e-1f));
    p = p * (m * z);
    p = fma(n, splat(-2.12194440e-4f), p);
    p = fma(z, splat(-0.5f), p);
    return fma(n, splat(0.693359375f), m + p);
}

inline float log(float x) { return log(splat(x))[0]; }

}  // namespace octavo
