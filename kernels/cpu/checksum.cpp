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

uint64_t sum_of(const char* bytes, int64_t num_bytes) {
    alignas(64) uint32_t words[WORDS];
    const uint32_t* from = (const uint32_t*)bytes;
    if (num_bytes % 4 || (uintptr_t)bytes % 4) {  // the last word is filled up with zeros
        if (num_bytes % 4) words[num_bytes / 4] = 0;
        std::memcpy(words, bytes, num_bytes);
        from = words;
    }
    const int64_t count = (num_bytes + 3) / 4;
    uint64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += from[i] * FACTORS[i];
    return sum;
}

uint64_t checksum(const Args& a, int64_t row) {
    uint64_t sum = 0, stripe = 0;
    for (int64_t part = 0; part < a.num_parts; part++) {
        const char* bytes = a.parts[part] + row * a.row_stride;
        for (int64_t begin = 0; begin < a.row_bytes; begin += STRIPE_BYTES)
            sum += mix(sum_of(bytes + begin, std::min(STRIPE_BYTES, a.row_bytes - begin)) + ++stripe * GOLDEN);
    }
    return sum;
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_checksum(const void* args) {
    const Args& a = *(const Args*)args;
    std::atomic<uint64_t> all{0};
    parallel_rows(a.rows, (a.num_parts * a.row_bytes + 3) / 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const uint64_t sum = checksum(a, a.index ? a.index[i] : i);
            if (a.together) all += mix(sum + (i + 1) * GOLDEN);
            else a.out[i] = sum;
        }
    });
    if (a.together) a.out[0] = all;
}
