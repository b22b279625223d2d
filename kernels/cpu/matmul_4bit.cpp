// Products with quantised weights: of the numbers that codes, scales and offsets stand for, rounded to the compute type,
// in the order of matmul.h, so that they are in every bit those of the dequantised weight.
//
// Codes (those of Kind::SIGNED lie otherwise): panels of 16 output columns, in blocks of two vectors of 16 32-bit lanes,
// each of which holds 32 / BITS codes of one column, lowest bits first. They come out in the order in which products take
// weights: for bfloat16 the first vector has columns 0 to 7, lane 2 c + p and field j being k = 2 j + p of column c, the
// second columns 8 to 15; for float32 lane c is column c, and the first vector has the first half of a block's k. Two
// panels take turns block by block, unless the last is alone, so that a product reads few streams; and so do their scales,
// and their offsets, group by group: [panels / 2][groups][2][16].
#include "matmul.h"

namespace octavo {
namespace {

enum ScaleType : int32_t { FLOAT32, FLOAT16, BFLOAT16 };

struct Quantised {
    const void* codes;
    const float* table;   // [16], for codes of 4 bits; null for 8, which are signed numbers
    const void* scales;   // of scale_type
    const void* offsets;  // as the scales, or null
    int64_t n, k, group_size;
    int32_t scale_type, offsets_are_zeros;  // a zero point's offset is -(zero * scale)
};

constexpr int64_t TOGETHER = 2;  // panels

// How many panels take turns where this one is.
inline int64_t in_turn(int64_t n, int64_t panel) {
    return std::min(TOGETHER, (n + LANES - 1) / LANES - panel / TOGETHER * TOGETHER);
}
// Where a panel has its block (or group) of so many, counted in blocks.
inline int64_t place(int64_t n, int64_t panel, int64_t block, int64_t num_blocks) {
    const int64_t first = panel / TOGETHER * TOGETHER;
    return first * num_blocks + block * in_turn(n, panel) + panel - first;
}

struct Matmul4BitArgs {
    MatmulArgs product;
    Quantised weight;
};

// How codes become numbers. SCALED: code * scale. OFFSET: fma(code, scale, offset). SIGNED: code * scale, for bfloat16,
// where the table is that of signed numbers: the eight magnitudes that a group has in each column are computed once, and
// looked up. Codes are then a magnitude below a sign; a vector of them is 8 k of a panel, in the order of compressed
// weights: steps 0 and 1 of a product have the lower four bits, 2 and 3 the upper ones. Zero has no sign then, nor does
// an infinite scale make it NaN.
enum class Kind { SCALED, OFFSET, SIGNED };

// Whether a weight for products of type T may be, and is, of kind SIGNED.
template <typename T, int BITS>
constexpr bool MAY_BE_SIGNED = HAS_BYTE_TABLES && sizeof(T) == 2 && BITS == 4;

template <typename T, int BITS>
inline bool is_signed(const Quantised& q) {
    if (!MAY_BE_SIGNED<T, BITS> || q.offsets || q.table[8] != 0) return false;
    for (int i = 1; i < 8; i++)
        if (q.table[8 - i] != -q.table[8 + i]) return false;
    return q.table[0] < 0;
}
// A code of that kind for one of the table. Magnitude 0 below a sign is -8; without, zero.
inline int signed_code(int code) { return code >= 8 ? code - 8 : code ? 16 - code : 8; }

// A group of a panel: scales and offsets for the lanes of a block's two vectors.
template <typename T, Kind KIND>
struct Group {
    f32x16 scale[2], offset[2];

    // From those of the columns; S: their type.
    template <typename S>
    [[gnu::always_inline]] void load(const Quantised& q, int64_t i) {
        const f32x16 scales = octavo::load((const S*)q.scales + i);
        spread(scales, scale);
        if constexpr (KIND == Kind::OFFSET) {
            const f32x16 offsets = octavo::load((const S*)q.offsets + i);
            spread(q.offsets_are_zeros ? -(offsets * scales) : offsets, offset);
        }
    }

private:
    static void spread(f32x16 v, f32x16* out) {
        if constexpr (sizeof(T) == 2) {
            out[0] = __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            out[1] = __builtin_shufflevector(v, v, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
        } else {
            out[0] = out[1] = v;
        }
    }
};

// Bytes of its 128 numbers, [magnitude][column].
template <>
struct Group<bf16, Kind::SIGNED> {
    u8x64 low[2], high[2];

    template <typename S>
    [[gnu::always_inline]] void load(const Quantised& q, int64_t i) {
        const f32x16 scales = octavo::load((const S*)q.scales + i);
        u8x64 numbers[4];  // of two magnitudes each
#pragma GCC unroll 4
        for (int m = 0; m < 4; m++)
            numbers[m] = (u8x64)to_bf16(
                scales * splat(m ? q.table[8 + 2 * m] : -q.table[0]), scales * splat(q.table[9 + 2 * m]));
        for (int half = 0; half < 2; half++) {
            low[half] = every_other<0>(numbers[2 * half], numbers[2 * half + 1]);
            high[half] = every_other<1>(numbers[2 * half], numbers[2 * half + 1]);
        }
    }
};

// Two vectors of codes.
template <typename T, int BITS>
struct Block {
    static constexpr int FIELDS = 32 / BITS, SIZE = 2 * FIELDS;  // codes of a lane; columns of k
    static constexpr int64_t BYTES = 2 * sizeof(u32x16);

    u32x16 codes[2];

    Block() = default;
    explicit Block(const char* p) : codes{load_vec<u32x16>(p), load_vec<u32x16>(p + sizeof(u32x16))} {}

    // The weights that step S of a product takes, as packed weights have them.
    template <int S, Kind KIND>
    [[gnu::always_inline]] u32x16 weights(f32x16 table, const Group<T, KIND>& group) const {
        if constexpr (sizeof(T) == 2) return to_bf16(value(table, 0, S, group), value(table, 1, S, group));
        else return (u32x16)value(table, S / FIELDS, S % FIELDS, group);
    }

    // Bytes of the numbers of kind SIGNED that steps 2 PAIR and 2 PAIR + 1 take.
    template <int PAIR>
    [[gnu::always_inline]] void look_up_signed(const Group<T, Kind::SIGNED>& group, u8x64& low, u8x64& high) const {
        static constexpr Bytes COLUMN([](int i) { return i / 16 * 4 + i % 8 / 2; });  // of each byte
        const u8x64 column = load_vec<u8x64>(COLUMN.at);
        const u8x64 code = (u8x64)(PAIR % 2 ? codes[PAIR / 2] : codes[PAIR / 2] << 4);  // in the upper bits
        const u8x64 index = (code & 0x70) | column;
        low = look_up_unless_zero(group.low, index, code & 0xf0);
        high = look_up_unless_zero(group.high, index, code & 0xf0) ^ (code & 0x80);
    }

private:
    template <Kind KIND>
    [[gnu::always_inline]] f32x16 value(f32x16 table, int i, int field, const Group<T, KIND>& group) const {
        f32x16 code;
        if constexpr (BITS == 4) code = look_up(table, codes[i] >> (BITS * field));
        else code = __builtin_convertvector((i32x16)(codes[i] << (24 - BITS * field)) >> 24, f32x16);
        if constexpr (KIND == Kind::OFFSET) return fma(code, group.scale[i], group.offset[i]);
        else return code * group.scale[i];
    }
};

template <typename T, int BITS, Kind KIND>
struct QuantisedWeights {
    using Element = T;
    using Codes = Block<T, BITS>;
    static constexpr int64_t BLOCK_K = Codes::SIZE, COLUMN_BYTES = LANES * BITS / 8, AHEAD = 8;
    static constexpr int64_t MIN_TALL = 7, MAX_TALL = BITS == 4 && sizeof(T) == 2 ? 24 : 0;
    static constexpr bool IS_PACKED = false, STAGED = true;
    static constexpr int64_t TOGETHER = octavo::TOGETHER;

    const Quantised& q;
    f32x16 table;

    explicit QuantisedWeights(const Quantised& quantised)
        : q(quantised), table(quantised.table ? load(quantised.table) : splat(0.0f)) {}

    const char* address(int64_t panel, int64_t begin) const {
        return (const char*)q.codes + place(q.n, panel, begin / BLOCK_K, q.k / BLOCK_K) * Codes::BYTES;
    }
    int64_t panel_step(int j) const {
        return j / TOGETHER * TOGETHER * q.k * COLUMN_BYTES + j % TOGETHER * Codes::BYTES;
    }
    int64_t block_step(int64_t panel) const { return in_turn(q.n, panel) * Codes::BYTES; }

    template <int NP>
    class Blocks {
        const QuantisedWeights& weights;
        const char* codes;
        int64_t num, scale, left;  // panels in turn; place of the next group's scales; columns of this group
        Group<T, KIND> groups[NP];

    public:
        [[gnu::always_inline]] Blocks(const QuantisedWeights& w, int64_t panel, int64_t begin)
            : weights(w), codes(w.address(panel, begin)), num(in_turn(w.q.n, panel)) {
            const int64_t size = w.q.group_size;
            scale = place(w.q.n, panel, begin / size, w.q.k / size) * LANES;
            left = (size - begin % size) % size;
            if (left) load_groups();
        }

        template <typename F>
        [[gnu::always_inline]] void next(const F& use) {
            const f32x16 table = weights.table;
            if (left == 0) load_groups(), left = weights.q.group_size;
            Codes blocks[NP];
#pragma GCC unroll 4
            for (int j = 0; j < NP; j++) blocks[j] = Codes(codes + weights.panel_step(j));
            if constexpr (KIND == Kind::SIGNED) {
                each_step<BLOCK_K / STEP<T> / 2>([&]<int PAIR>() INLINE {
                    u8x64 low[NP], high[NP];
#pragma GCC unroll 4
                    for (int j = 0; j < NP; j++) blocks[j].template look_up_signed<PAIR>(groups[j], low[j], high[j]);
                    each_step<2>([&]<int S>() INLINE {
                        use.template operator()<2 * PAIR + S>([&](int j) INLINE {
                            return interleave<S>(low[j], high[j]);
                        });
                    });
                });
            } else {
                each_step<BLOCK_K / STEP<T>>([&]<int S>() INLINE {
                    use.template operator()<S>([&](int j) INLINE {
                        return blocks[j].template weights<S>(table, groups[j]);
                    });
                });
            }
            codes += num * Codes::BYTES, left -= BLOCK_K;
        }

    private:
        [[gnu::always_inline]] void load_groups() {
            switch (weights.q.scale_type) {
                case FLOAT16: return load_groups<f16>();
                case BFLOAT16: return load_groups<bf16>();
                default: return load_groups<float>();
            }
        }
        template <typename S>
        [[gnu::always_inline]] void load_groups() {
            const int64_t pair = TOGETHER * (weights.q.k / weights.q.group_size) * LANES;  // scales
#pragma GCC unroll 4
            for (int j = 0; j < NP; j++)
                groups[j].template load<S>(weights.q, scale + j / TOGETHER * pair + j % TOGETHER * LANES);
            bring<S>(weights.q.scales, pair);
            if constexpr (KIND == Kind::OFFSET) bring<S>(weights.q.offsets, pair);
            scale += num * LANES;
        }
        // The scales of the groups that memory is to bring codes of.
        template <typename S>
        [[gnu::always_inline]] void bring(const void* scales, int64_t pair) const {
            const int64_t ahead = AHEAD * BLOCK_K / weights.q.group_size * num * LANES;
            const char* next = (const char*)((const S*)scales + scale + ahead);
#pragma GCC unroll 4
            for (int j = 0; j < NP; j += TOGETHER) __builtin_prefetch(next + j / TOGETHER * pair * sizeof(S), 0, 2);
        }
    };
};

// Calls use(weights), of the kind that a weight is.
template <typename T, int BITS, typename F>
void with_weights(const Quantised& q, const F& use) {
    if constexpr (MAY_BE_SIGNED<T, BITS>) {
        if (is_signed<T, BITS>(q)) return use(QuantisedWeights<T, BITS, Kind::SIGNED>(q));
    }
    if (q.offsets) use(QuantisedWeights<T, BITS, Kind::OFFSET>(q));
    else use(QuantisedWeights<T, BITS, Kind::SCALED>(q));
}

template <typename T, int BITS>
void matmul_4bit(const Matmul4BitArgs& args) {
    with_weights<T, BITS>(args.weight, [&](const auto& weights) { matmul(args.product, weights); });
}

// Rows of codes, a byte each, and of scales and offsets to panels panel_begin, + panel_step, + ...; row_begin: place of
// the first row among their rows.
struct Pack4BitArgs {
    int64_t rows;
    const uint8_t* codes;  // [rows, k]
    const void* scales;    // [rows, k / group_size]
    const void* offsets;   // as the scales, or null
    int64_t row_begin, panel_begin, panel_step, is_bf16;
    Quantised weight;
};

template <typename T, int BITS>
void pack(const Pack4BitArgs& a) {
    using Codes = Block<T, BITS>;
    const Quantised& q = a.weight;
    const int64_t num_blocks = q.k / Codes::SIZE, num_groups = q.k / q.group_size;
    const bool with_signs = is_signed<T, BITS>(q);
    parallel_rows(a.rows, q.k, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const int64_t n = a.row_begin + r, panel = a.panel_begin + n / LANES * a.panel_step, c = n % LANES;
            for (int64_t b = 0; b < num_blocks; b++) {
                const uint8_t* codes = a.codes + r * q.k + b * Codes::SIZE;
                uint32_t* lanes = (uint32_t*)((char*)q.codes + place(q.n, panel, b, num_blocks) * Codes::BYTES);
                if (with_signs) {
                    uint8_t* bytes = (uint8_t*)lanes + c / 4 * 16 + c % 4 * 2;
                    for (int i = 0; i < Codes::SIZE / 2; i++) {  // k below 4, or 8 to 11, and the one 4 after it
                        const int k = i / 4 * 8 + i % 4;
                        bytes[i / 4 * 64 + i % 4 / 2 * 8 + i % 2] =
                            (uint8_t)(signed_code(codes[k]) | signed_code(codes[k + 4]) << 4);
                    }
                    continue;
                }
                for (int half = 0; half < 2; half++) {
                    uint32_t lane = 0;
                    for (int j = 0; j < Codes::FIELDS; j++)
                        lane |= (uint32_t)codes[sizeof(T) == 2 ? 2 * j + half : half * Codes::FIELDS + j] << (BITS * j);
                    lanes[sizeof(T) == 2 ? 2 * c + half : half * LANES + c] = lane;
                }
            }
            const int64_t size = q.scale_type == FLOAT32 ? 4 : 2;  // bytes
            for (int64_t g = 0; g < num_groups; g++) {
                const int64_t to = (place(q.n, panel, g, num_groups) * LANES + c) * size, from = (r * num_groups + g) * size;
                std::memcpy((char*)q.scales + to, (const char*)a.scales + from, size);
                if (q.offsets) std::memcpy((char*)q.offsets + to, (const char*)a.offsets + from, size);
            }
        }
    });
}

// Rows of the dequantised weight.
struct Embedding4BitArgs {
    int64_t count;
    void* out;           // [count, k]
    const int32_t* ids;  // [count], or null: rows 0, 1, ...
    int64_t first_id;  // the weight has the rows of ids [first_id, first_id + n); the others' are zeros
    int32_t num_parts, is_bf16;
    Quantised weight;
};

template <typename T, typename W>
void rows_of_weight(const Embedding4BitArgs& a, const W& weights) {
    constexpr int64_t SIZE = 256;  // columns of k at a time
    constexpr int KS = STEP<T>;
    const int64_t k = a.weight.k, part_size = a.weight.n / a.num_parts;
    parallel_rows((a.count + LANES - 1) / LANES, LANES * k, [&](int64_t begin, int64_t end) {
        alignas(64) T columns[SIZE * LANES];
        for (int64_t k_begin = 0; k_begin < k; k_begin += SIZE) {
            const int64_t k_end = std::min(k, k_begin + SIZE);
            int64_t last_panel = -1;
            for (int64_t i = begin * LANES; i < std::min(a.count, end * LANES); i++) {
                T* out = (T*)a.out + i * k;
                const int64_t n = (a.ids ? a.ids[i] : i) - a.first_id;
                if (n < 0 || n >= a.weight.n) {
                    std::fill(out + k_begin, out + k_end, T(0));
                    continue;
                }
                const int64_t panel = n % part_size / LANES * a.num_parts + n / part_size;
                if (panel != last_panel) unpack(weights, panel, k_begin, k_end, columns);
                last_panel = panel;
                const T* column = columns + n % LANES * KS;
                for (int64_t c = k_begin; c < k_end; c += KS, column += LANES * KS)
                    for (int s = 0; s < KS; s++) out[c + s] = column[s];
            }
        }
    });
}

template <typename T, int BITS>
void embedding(const Embedding4BitArgs& a) {
    with_weights<T, BITS>(a.weight, [&](const auto& weights) { rows_of_weight<T>(a, weights); });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_matmul_4bit(const void* args) {
    const Matmul4BitArgs& a = *(const Matmul4BitArgs*)args;
    if (a.weight.table) a.product.is_bf16 ? matmul_4bit<bf16, 4>(a) : matmul_4bit<float, 4>(a);
    else a.product.is_bf16 ? matmul_4bit<bf16, 8>(a) : matmul_4bit<float, 8>(a);
}

extern "C" void octavo_pack_4bit(const void* args) {
    const Pack4BitArgs& a = *(const Pack4BitArgs*)args;
    if (a.weight.table) a.is_bf16 ? pack<bf16, 4>(a) : pack<float, 4>(a);
    else a.is_bf16 ? pack<bf16, 8>(a) : pack<float, 8>(a);
}

extern "C" void octavo_embedding_4bit(const void* args) {
    const Embedding4BitArgs& a = *(const Embedding4BitArgs*)args;
    if (a.weight.table) a.is_bf16 ? embedding<bf16, 4>(a) : embedding<float, 4>(a);
    else a.is_bf16 ? embedding<bf16, 8>(a) : embedding<float, 8>(a);
}
