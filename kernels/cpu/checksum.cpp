// Checksums of memory, as fast as it can be read. A stripe of 4 KiB is a sum of its 32-bit words, each times an odd number
// of its own, in 64 bits: no flip of one or two bits in it leaves that sum as it was. Sums are mixed with where their stripe
// lies and added up, so stripes may be taken in any order.
#include "parallel.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

namespace octavo {
namespace {

constexpr int64_t STRIPE_BYTES = 4096, WORDS = STRIPE_BYTES / 4;
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;

struct Args {
    int64_t rows;
    const char* const* parts;  // [num_parts]: each rows of row_bytes, row_stride bytes apart
    int64_t num_parts, row_bytes, row_stride;
    const int64_t* index;  // [rows]: which rows, or null: the first ones
    uint64_t* out;         // [rows], or with `together` one
    int64_t together;
};

// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): one to one.
constexpr uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return x ^ (x >> 31);
}

constexpr std::array<uint64_t, WORDS> make_factors() {
    std::array<uint64_t, WORDS> factors{};
    for (int64_t i = 0; i < WORDS; i++) factors[i] = (mix((i + 1) * GOLDEN) & 0xFFFFFFFF) | 1;
    return factors;
}

constexpr std::array<uint64_t, WORDS> FACTORS = make_factors();

// The weighted words of a stripe. What comes next is fetched meanwhile: rows are pieces here and there, which the
// machine's own prefetching does not see coming.
uint64_t sum_of(const char* bytes, int64_t num_bytes, const char* next) {
    constexpr int64_t GROUP = 64, LINE_BYTES = 64;  // words
    alignas(64) uint32_t words[WORDS];
    const uint32_t* from = (const uint32_t*)bytes;
    if (num_bytes % 4 || (uintptr_t)bytes % 4) {  // the last word is filled up with zeros
        if (num_bytes % 4) words[num_bytes / 4] = 0;
        std::memcpy(words, bytes, num_bytes);
        from = words;
    }
    const int64_t count = (num_bytes + 3) / 4;
    uint64_t sum = 0;
    int64_t begin = 0;
    for (; begin + GROUP <= count; begin += GROUP) {
        for (int64_t i = 0; i < GROUP * 4; i += LINE_BYTES) __builtin_prefetch(next + begin * 4 + i);
        for (int64_t i = begin; i < begin + GROUP; i++) sum += from[i] * FACTORS[i];
    }
    for (int64_t i = begin; i < count; i++) sum += from[i] * FACTORS[i];
    return sum;
}

struct Checksum : Args {
    explicit Checksum(const Args& args) : Args(args) {}

    const int64_t part_stripes = (row_bytes + STRIPE_BYTES - 1) / STRIPE_BYTES, row_stripes = num_parts * part_stripes;

    const char* at(int64_t row, int64_t stripe) const {
        return parts[stripe / part_stripes] + (index ? index[row] : row) * row_stride + stripe % part_stripes * STRIPE_BYTES;
    }

    // Of stripes [begin, end) of a row: sums of several such ranges add up.
    uint64_t of_stripes(int64_t row, int64_t begin, int64_t end) const {
        uint64_t sum = 0;
        for (int64_t stripe = begin; stripe < end; stripe++) {
            const int64_t num_bytes = std::min(STRIPE_BYTES, row_bytes - stripe % part_stripes * STRIPE_BYTES);
            const char* next = at(row, std::min(stripe + 1, row_stripes - 1));
            sum += mix(sum_of(at(row, stripe), num_bytes, next) + (stripe + 1) * GOLDEN);
        }
        return sum;
    }

    void run() const {
        if (together) {
            std::atomic<uint64_t> all{0};
            parallel_rows(rows, row_stripes * WORDS, [&](int64_t begin, int64_t end) {
                for (int64_t row = begin; row < end; row++) all += mix(of_stripes(row, 0, row_stripes) + (row + 1) * GOLDEN);
            });
            out[0] = all;
            return;
        }
        std::fill_n(out, rows, 0);
        parallel_rows(rows * row_stripes, WORDS, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin / row_stripes; row * row_stripes < end; row++) {
                const int64_t first = std::max(begin - row * row_stripes, (int64_t)0);
                const uint64_t sum = of_stripes(row, first, std::min(end - row * row_stripes, row_stripes));
                std::atomic_ref<uint64_t>(out[row]) += sum;
            }
        });
    }
};

}  // namespace
}  // namespace octavo

extern "C" void octavo_checksum(const void* args) { octavo::Checksum(*(const octavo::Args*)args).run(); }
