// Products with bfloat16 weights that take 12 bits each, nothing of which is lost: a number's low byte lies there as it is,
// and of its high byte (sign and exponent but for the last bit) four bits say which of the weight's 16 most frequent ones
// it is. The few numbers that have another are exceptions, listed beside.
//
// Codes: panels of 16 output columns, in blocks of 8 k: 128 numbers, four vectors as products take them (see matmul.h),
// in 192 bytes: low bytes of vectors 0 and 1, of 2 and 3, and a byte with a code of the former below one of the latter.
// Exceptions: a list to each panel, in order, of (block << 15 | place in the block << 8 | high byte).
#include "matmul.h"

#include <atomic>

namespace octavo {
namespace {

constexpr int64_t BLOCK_K = 8, BLOCK_SIZE = BLOCK_K * LANES, BLOCK_BYTES = BLOCK_SIZE * 3 / 2;
constexpr uint32_t NO_EXCEPTION = 0xffffffff;  // in what is left of a panel's list

struct Compressed {
    const void* codes;
    const uint8_t* table;        // [16]
    const uint32_t* exceptions;  // [panels, max_exceptions]
    int64_t n, k, max_exceptions;
};

struct CompressedMatmulArgs {
    MatmulArgs product;
    Compressed weight;
};

// Entries of a table, repeated in each 16 bytes, at the lower four bits of each index.
inline u8x64 look_up(u8x64 table, u8x64 index) {
#if defined(__AVX512BW__)
    return (u8x64)_mm512_shuffle_epi8((__m512i)table, (__m512i)(index & 15));
#elif defined(__AVX2__)
    union U {
        u8x64 v;
        __m256i h[2];
    } t{table}, i{index & 15};
    for (int half = 0; half < 2; half++) i.h[half] = _mm256_shuffle_epi8(t.h[half], i.h[half]);
    return i.v;
#else
    return __builtin_shuffle(table, index & 15);
#endif
}

namespace Block {

// Bytes of its first or last two vectors; the high ones but for exceptions.
template <int HALF>
inline u8x64 low(const char* block) {
    return load_vec<u8x64>(block + 64 * HALF);
}
template <int HALF>
inline u8x64 high(const char* block, u8x64 table) {
    const u8x64 codes = load_vec<u8x64>(block + 128);
    return look_up(table, HALF ? codes >> 4 : codes);
}

// All of it, packed.
inline void store(const char* block, u8x64 table, bf16* out) {
    const u8x64 first = high<0>(block, table), second = high<1>(block, table);
    const u32x16 all[] = {
        interleave<0>(low<0>(block), first), interleave<1>(low<0>(block), first),
        interleave<0>(low<1>(block), second), interleave<1>(low<1>(block), second)};
    std::memcpy(out, all, sizeof all);
}

}  // namespace Block

// Goes through a panel's exceptions as a product goes through its blocks.
struct Exceptions {
    const uint32_t *at, *end;

    int64_t block() const { return at < end ? *at >> 15 : NO_EXCEPTION; }
    // Puts those of a block in their places, and goes on.
    void apply(int64_t to_block, bf16* numbers) {
        for (; block() == to_block; at++) {
            bf16& number = numbers[*at >> 8 & (BLOCK_SIZE - 1)];
            number = (bf16)((*at & 0xff) << 8 | (number & 0xff));
        }
    }
};

struct CompressedWeights {
    using Element = bf16;
    static constexpr int64_t BLOCK_K = octavo::BLOCK_K, COLUMN_BYTES = BLOCK_BYTES / BLOCK_K, AHEAD = 16;
    static constexpr int64_t MIN_TALL = 6, MAX_TALL = 24;
    static constexpr bool IS_PACKED = false, STAGED = false;
    static constexpr int64_t TOGETHER = 1;

    const Compressed& c;
    u8x64 table;

    explicit CompressedWeights(const Compressed& compressed) : c(compressed) {
        for (int i = 0; i < 64; i += 16) std::memcpy((char*)&table + i, c.table, 16);
    }

    const char* address(int64_t panel, int64_t begin) const {
        return (const char*)c.codes + (panel * c.k + begin) * COLUMN_BYTES;
    }

    Exceptions exceptions(int64_t panel, int64_t first_block) const {
        const uint32_t *begin = c.exceptions + panel * c.max_exceptions, *end = begin + c.max_exceptions;
        Exceptions found{begin, end};
        while (found.block() < first_block) found.at++;  // they are few
        return found;
    }

    int64_t panel_step(int j) const { return j * c.k * COLUMN_BYTES; }
    int64_t block_step(int64_t) const { return BLOCK_BYTES; }

    template <int NP>
    class Blocks {
        const CompressedWeights& weights;
        const char* codes;
        Exceptions rest[NP];
        int64_t block, next_exception = NO_EXCEPTION;  // the block of the first one of all panels

    public:
        Blocks(const CompressedWeights& w, int64_t panel, int64_t begin)
            : weights(w), codes(w.address(panel, begin)), block(begin / BLOCK_K) {
            for (int j = 0; j < NP; j++) {
                rest[j] = w.exceptions(panel + j, block);
                next_exception = std::min(next_exception, rest[j].block());
            }
        }

        template <typename F>
        [[gnu::always_inline]] void next(const F& use) {
            const u8x64 table = weights.table;
            if (block < next_exception) {
                each_step<2>([&]<int HALF>() INLINE {  // two steps, whose high bytes are looked up together
                    u8x64 high[NP];
#pragma GCC unroll 4
                    for (int j = 0; j < NP; j++) high[j] = Block::high<HALF>(codes + weights.panel_step(j), table);
                    each_step<2>([&]<int S>() INLINE {
                        use.template operator()<2 * HALF + S>([&](int j) INLINE {
                            return interleave<S>(Block::low<HALF>(codes + weights.panel_step(j)), high[j]);
                        });
                    });
                });
            } else {
                alignas(64) bf16 numbers[NP][BLOCK_SIZE];
                next_exception = NO_EXCEPTION;
                for (int j = 0; j < NP; j++) {
                    Block::store(codes + weights.panel_step(j), table, numbers[j]);
                    rest[j].apply(block, numbers[j]);
                    next_exception = std::min(next_exception, rest[j].block());
                }
                each_step<4>([&]<int S>() INLINE {
                    use.template operator()<S>([&](int j) INLINE { return load_vec<u32x16>(numbers[j] + S * 2 * LANES); });
                });
            }
            codes += BLOCK_BYTES, block++;
        }
    };
};

struct CompressArgs {
    const void* packed;
    void* codes;
    uint32_t* exceptions;
    int32_t* has_failed;  // set where a panel has more than max_exceptions
    const uint8_t* table;
    int64_t n, k, max_exceptions;
};

// A block's codes; 255 for an exception.
inline void find_codes(const bf16* numbers, const uint8_t* table, uint8_t* codes) {
    uint8_t high[BLOCK_SIZE];
    for (int i = 0; i < BLOCK_SIZE; i++) high[i] = (uint8_t)(numbers[i] >> 8), codes[i] = 255;
    for (int code = 0; code < 16; code++)
        for (int i = 0; i < BLOCK_SIZE; i++) codes[i] = high[i] == table[code] ? (uint8_t)code : codes[i];
}

void compress(const CompressArgs& a) {
    std::atomic<int32_t> has_failed = 0;
    const int64_t num_panels = (a.n + LANES - 1) / LANES;
    parallel_rows(num_panels, a.k * LANES, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; panel++) {
            const bf16* from = (const bf16*)a.packed + panel * a.k * LANES;
            uint8_t* to = (uint8_t*)a.codes + panel * a.k / BLOCK_K * BLOCK_BYTES;
            uint32_t *list = a.exceptions + panel * a.max_exceptions, *const list_end = list + a.max_exceptions;
            for (int64_t block = 0; block < a.k / BLOCK_K; block++, from += BLOCK_SIZE, to += BLOCK_BYTES) {
                uint8_t codes[BLOCK_SIZE], low[BLOCK_SIZE];
                find_codes(from, a.table, codes);
                for (int i = 0; i < BLOCK_SIZE; i++) {
                    low[i] = (uint8_t)from[i];
                    if (codes[i] < 16) [[likely]] continue;
                    if (panel * LANES + i % 32 / 2 < a.n) {  // past n it may become anything
                        if (list < list_end) *list++ = (uint32_t)(block << 15 | i << 8 | from[i] >> 8);
                        else has_failed = 1;
                    }
                    codes[i] = 0;
                }
                for (int i = 0; i < BLOCK_SIZE / 8; i++) {  // eight numbers at a time stay together
                    const int vector = i / 4, place = i % 4 * 16 + vector % 2 * 8;
                    uint64_t eight, lower = 0;
                    std::memcpy(&eight, codes + 8 * i, 8);
                    if (vector >= 2) std::memcpy(&lower, to + 128 + place, 8), eight <<= 4;
                    eight |= lower;
                    std::memcpy(to + 128 + place, &eight, 8);
                    std::memcpy(to + vector / 2 * 64 + place, low + 8 * i, 8);
                }
            }
            std::fill(list, list_end, NO_EXCEPTION);
        }
    });
    *a.has_failed = has_failed;
}

// Rows of a compressed weight.
struct CompressedEmbeddingArgs {
    int64_t count;
    void* out;           // [count, k]
    const int32_t* ids;  // [count]
    int64_t first_id;    // the weight has the rows of ids [first_id, first_id + n); the others' are zeros
    Compressed weight;
};

void rows_of_weight(const CompressedEmbeddingArgs& a) {
    const CompressedWeights weights(a.weight);
    const int64_t k = a.weight.k;
    parallel_rows(a.count, k * LANES, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            bf16* out = (bf16*)a.out + i * k;
            const int64_t n = a.ids[i] - a.first_id;
            if (n < 0 || n >= a.weight.n) {
                std::fill_n(out, k, bf16(0));
                continue;
            }
            const bf16* column = take(weights, n / LANES, 1, 0, k) + n % LANES * STEP<bf16>;
            for (int64_t col = 0; col < k; col++) out[col] = column[col / 2 * 2 * LANES + col % 2];
        }
    });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_matmul_compressed(const void* args) {
    const CompressedMatmulArgs& a = *(const CompressedMatmulArgs*)args;
    matmul(a.product, CompressedWeights(a.weight));
}

extern "C" void octavo_compress(const void* args) { compress(*(const CompressArgs*)args); }

extern "C" void octavo_embedding_compressed(const void* args) {
    rows_of_weight(*(const CompressedEmbeddingArgs*)args);
}
