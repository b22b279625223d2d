// Products with quantised weights: of the numbers that codes, scales and offsets stand for, rounded to the compute type,
// in the order of matmul.h, so that they are in every bit those of the dequantised weight.
//
// Codes: panels of 16 output columns, in blocks of two vectors of 16 32-bit lanes, each of which holds 32 / BITS codes of
// one column, lowest bits first. They come out in the order in which products take weights: for bfloat16 the first vector
// has columns 0 to 7, lane 2 c + p and field j being k = 2 j + p of column c, the second columns 8 to 15; for float32 lane
// c is column c, and the first vector has the first half of a block's k. Four panels, or as many as are left, take turns
// block by block, so that a product with them reads one stream; and so do their scales, and their offsets, group by group:
// [panels / 4][groups][4][16].
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

constexpr int64_t TOGETHER = 4;  // panels

// Where a panel has its block (or group) of so many, counted in blocks.
inline int64_t place(int64_t n, int64_t panel, int64_t block, int64_t num_blocks) {
    const int64_t first = panel / TOGETHER * TOGETHER, num = std::min(TOGETHER, (n + LANES - 1) / LANES - first);
    return first * num_blocks + block * num + panel - first;
}

struct Matmul4BitArgs {
    MatmulArgs product;
    Quantised weight;
};

inline f32x16 load_scales(const Quantised& q, const void* scales, int64_t i) {
    switch (q.scale_type) {
        case FLOAT16: return load((const f16*)scales + i);
        case BFLOAT16: return load((const bf16*)scales + i);
        default: return load((const float*)scales + i);
    }
}

// A group of a panel: scales and offsets for the lanes of a block's two vectors.
template <typename T>
struct Group {
    f32x16 scale[2], offset[2];

    void load(const Quantised& q, int64_t panel, int64_t group) {
        const int64_t i = place(q.n, panel, group, q.k / q.group_size) * LANES;
        const f32x16 scales = load_scales(q, q.scales, i);
        spread(scales, scale);
        if (!q.offsets) return;
        const f32x16 offsets = load_scales(q, q.offsets, i);
        spread(q.offsets_are_zeros ? -(offsets * scales) : offsets, offset);
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

// Two vectors of codes.
template <typename T, int BITS>
struct Block {
    static constexpr int FIELDS = 32 / BITS, SIZE = 2 * FIELDS;  // codes of a lane; columns of k
    static constexpr int64_t BYTES = 2 * sizeof(u32x16);

    u32x16 codes[2];

    Block() = default;
    Block(const char* p) : codes{load_vec<u32x16>(p), load_vec<u32x16>(p + sizeof(u32x16))} {}

    // The weights that step S of a product takes, as packed weights have them.
    template <int S, bool OFFSETS>
    u32x16 weights(f32x16 table, const Group<T>& group) const {
        if constexpr (sizeof(T) == 2)
            return to_bf16(value<OFFSETS>(table, 0, S, group), value<OFFSETS>(table, 1, S, group));
        else return (u32x16)value<OFFSETS>(table, S / FIELDS, S % FIELDS, group);
    }

private:
    template <bool OFFSETS>
    f32x16 value(f32x16 table, int i, int field, const Group<T>& group) const {
        f32x16 code;
        if constexpr (BITS == 4) code = look_up(table, codes[i] >> (BITS * field));
        else code = __builtin_convertvector((i32x16)(codes[i] << (24 - BITS * field)) >> 24, f32x16);
        return OFFSETS ? fma(code, group.scale[i], group.offset[i]) : code * group.scale[i];
    }
};

template <typename T, int BITS>
struct QuantisedWeights {
    using Element = T;
    using Codes = Block<T, BITS>;
    static constexpr int64_t COLUMN_BYTES = LANES * BITS / 8;
    static constexpr int64_t MAX_PASSES = 22, MAX_ROWS_AT_A_TIME = MAX_PASSES * MAX_ROWS;
    static constexpr int64_t PANELS_AT_LEAST = TOGETHER;
    static constexpr int64_t CHUNK = 512, MAX_TALL = 0;
    static constexpr bool ALWAYS_IN_CHUNKS = true, IN_ONE_STREAM = true, MADE_IN_FIRST_PASS = false;
    static constexpr int STEPS = Codes::SIZE / STEP<T>;
    static constexpr int64_t AHEAD = 4096;  // bytes that memory is to bring meanwhile
    static constexpr int FEW = BITS == 4 && sizeof(T) == 2 ? TALL_ROWS : MAX_ROWS;

    const Quantised& q;
    f32x16 table;

    explicit QuantisedWeights(const Quantised& quantised)
        : q(quantised), table(quantised.table ? load(quantised.table) : splat(0.0f)) {}

    const char* address(int64_t panel, int64_t begin) const {
        return (const char*)q.codes + place(q.n, panel, begin / Codes::SIZE, q.k / Codes::SIZE) * Codes::BYTES;
    }
    int64_t stride(int64_t begin, int64_t end) const { return (end - begin) * LANES; }

    const T* take(int64_t panel, int num, int64_t begin, int64_t end) const {
        T* out = scratch<T>(num * stride(begin, end));
        for (int i = 0; i < num; i++) dequantise(panel + i, begin, end, out + i * stride(begin, end));
        return out;
    }

    // Columns [begin, end) of k of a panel, packed.
    void dequantise(int64_t panel, int64_t begin, int64_t end, T* out) const {
        if (q.offsets) dequantise<true>(panel, begin, end, out);
        else dequantise<false>(panel, begin, end, out);
    }

    // Few rows: weights go from the codes straight into the product.
    template <typename O>
    bool multiply(const MatmulArgs& a, int64_t begin, int64_t end) const {
        if (a.m > FEW) return false;
        if (q.offsets) multiply_panels<O, true>(a, begin, end);
        else multiply_panels<O, false>(a, begin, end);
        return true;
    }

private:
    template <typename O, bool OFFSETS, int MR = FEW>
    void multiply_panels(const MatmulArgs& a, int64_t begin, int64_t end) const {
        if constexpr (MR > 1) {
            if (a.m < MR) return multiply_panels<O, OFFSETS, MR - 1>(a, begin, end);
        }
        constexpr int NP = MR > MAX_ROWS ? 2 : TOGETHER;  // whose sums fit the registers
        for (int64_t p = begin; p < end; p += NP) {
            const int64_t num = std::min<int64_t>(NP, end - p);
            if (num == NP) multiply_rows<O, OFFSETS, MR, NP>(a, p);
            else if (num == 1) multiply_rows<O, OFFSETS, MR, 1>(a, p);
            else if constexpr (NP > 2) {
                if (num == 2) multiply_rows<O, OFFSETS, MR, 2>(a, p);
                else multiply_rows<O, OFFSETS, MR, 3>(a, p);
            }
        }
    }

    template <typename O, bool OFFSETS, int MR, int NP>
    void multiply_rows(const MatmulArgs& a, int64_t panel) const {
        const f32x16 table = this->table;
        const T* x = (const T*)a.x;
        const char* codes = address(panel, 0);
        const int64_t next = address(panel, Codes::SIZE) - codes;
        f32x16 acc[MR][NP];
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NP; j++) acc[i][j] = splat(0.0f);
        for (int64_t group = 0; group < q.k / q.group_size; group++) {
            Group<T> groups[NP];
            for (int j = 0; j < NP; j++) groups[j].load(q, panel + j, group);
            for (int64_t k = 0; k < q.group_size; k += Codes::SIZE) {
                Codes blocks[NP];
                for (int j = 0; j < NP; j++) {
                    blocks[j] = Codes(codes + j * Codes::BYTES);
                    __builtin_prefetch(codes + j * Codes::BYTES + AHEAD, 0, 2);
                    __builtin_prefetch(codes + j * Codes::BYTES + AHEAD + LINE, 0, 2);
                }
                each_step<STEPS>([&]<int S>() {
                    u32x16 w[NP];
#pragma GCC unroll 4
                    for (int j = 0; j < NP; j++) w[j] = blocks[j].template weights<S, OFFSETS>(table, groups[j]);
#pragma GCC unroll 16
                    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
                        for (int j = 0; j < NP; j++)
                            acc[i][j] = step(acc[i][j], x + i * a.x_stride + S * STEP<T>, w[j]);
                });
                codes += next, x += Codes::SIZE;
            }
        }
        for (int i = 0; i < MR; i++) finish_row<O, NP>(a, i, panel, (const float*)acc[i], LANES);
    }

    template <bool OFFSETS>
    void dequantise(int64_t panel, int64_t begin, int64_t end, T* out) const {
        const f32x16 table = this->table;
        const char* codes = address(panel, begin);
        const int64_t next = address(panel, Codes::SIZE) - address(panel, 0);
        Group<T> group;
        for (int64_t k = begin; k < end;) {
            group.load(q, panel, k / q.group_size);
            for (const int64_t last = std::min(end, (k / q.group_size + 1) * q.group_size); k < last; k += Codes::SIZE) {
                const Codes block(codes);
                each_step<STEPS>([&]<int S>() {
                    const u32x16 w = block.template weights<S, OFFSETS>(table, group);
                    std::memcpy(out + S * STEP<T> * LANES, &w, sizeof w);
                });
                codes += next, out += Codes::SIZE * LANES;
            }
        }
    }
};

template <int BITS>
void matmul_4bit(const Matmul4BitArgs& args) {
    const MatmulArgs& a = args.product;
    if (!a.is_bf16) matmul<float>(a, QuantisedWeights<float, BITS>(args.weight));
    else if (a.out_is_bf16) matmul<bf16>(a, QuantisedWeights<bf16, BITS>(args.weight));
    else matmul<float>(a, QuantisedWeights<bf16, BITS>(args.weight));
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
    parallel_rows(a.rows, q.k, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const int64_t n = a.row_begin + r, panel = a.panel_begin + n / LANES * a.panel_step, c = n % LANES;
            for (int64_t b = 0; b < num_blocks; b++) {
                const uint8_t* codes = a.codes + r * q.k + b * Codes::SIZE;
                uint32_t* lanes = (uint32_t*)((char*)q.codes + place(q.n, panel, b, num_blocks) * Codes::BYTES);
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

template <typename T, int BITS>
void rows_of_weight(const Embedding4BitArgs& a) {
    constexpr int64_t SIZE = 256;  // columns of k at a time
    constexpr int KS = STEP<T>;
    const int64_t k = a.weight.k, part_size = a.weight.n / a.num_parts;
    const QuantisedWeights<T, BITS> weights(a.weight);
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
                if (panel != last_panel) weights.dequantise(panel, k_begin, k_end, columns);
                last_panel = panel;
                const T* column = columns + n % LANES * KS;
                for (int64_t c = k_begin; c < k_end; c += KS, column += LANES * KS)
                    for (int s = 0; s < KS; s++) out[c + s] = column[s];
            }
        }
    });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_matmul_4bit(const void* args) {
    const Matmul4BitArgs& a = *(const Matmul4BitArgs*)args;
    if (a.weight.table) matmul_4bit<4>(a);
    else matmul_4bit<8>(a);
}

extern "C" void octavo_pack_4bit(const void* args) {
    const Pack4BitArgs& a = *(const Pack4BitArgs*)args;
    if (a.weight.table) a.is_bf16 ? pack<bf16, 4>(a) : pack<float, 4>(a);
    else a.is_bf16 ? pack<bf16, 8>(a) : pack<float, 8>(a);
}

extern "C" void octavo_embedding_4bit(const void* args) {
    const Embedding4BitArgs& a = *(const Embedding4BitArgs*)args;
    if (a.weight.table) a.is_bf16 ? rows_of_weight<bf16, 4>(a) : rows_of_weight<float, 4>(a);
    else a.is_bf16 ? rows_of_weight<bf16, 8>(a) : rows_of_weight<float, 8>(a);
}
