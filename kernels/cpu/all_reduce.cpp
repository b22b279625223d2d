// The sum over ranks of partial results, with what is added to it once: each rank adds up a slice of it and hands it to
// all. Parts are added in a tree that depends on their number alone, so an element's bits depend neither on its place
// nor on the number of rows, nor, where parts are as many whatever the ranks, on how ranks divide them.
#include "parallel.h"
#include "ranks.h"
#include "vec.h"

#include <algorithm>

namespace octavo {
namespace {

constexpr int MAX_PARTS = 8;

struct Args {
    int64_t rows;
    Ranks ranks;
    int64_t parts_offset, part_bytes, num_parts;  // of each rank: [num_parts], part_bytes apart, each [rows, width]
    int64_t sums_offset;                          // [rows, width] as out, of which a rank fills its slice
    const float* bias;                            // [width] or null
    const void* residual;                         // as out, or null; may be out itself
    void* out;                                    // [rows, width]
    int64_t width;                                // a multiple of 16
    int32_t is_bf16, parts_are_float;
};

template <typename P, int COUNT>
inline f32x16 tree(const P* const* parts, int64_t i) {
    if constexpr (COUNT == 1) return load(parts[0] + i);
    else return tree<P, COUNT / 2>(parts, i) + tree<P, COUNT - COUNT / 2>(parts + COUNT / 2, i);
}

template <typename T, typename P>
struct AllReduce : Args {
    explicit AllReduce(const Args& args) : Args(args) {}

    // Elements [begin, end) of out, multiples of 16.
    template <int COUNT>
    void add_up(T* to, const P* const* parts, int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; i += LANES) {
            f32x16 sum = tree<P, COUNT>(parts, i);
            if (bias) sum = sum + load(bias + i % width);
            if (residual) sum = sum + load((const T*)residual + i);
            store(to + i, sum);
        }
    }

    void add_up(T* to, int64_t begin, int64_t end) const {
        const P* parts[MAX_PARTS];
        const int count = (int)(ranks.num_ranks * num_parts);
        for (int i = 0; i < count; i++)
            parts[i] = ranks.at<P>(i / num_parts, parts_offset + i % num_parts * part_bytes);
        switch (count) {
            case 1: return add_up<1>(to, parts, begin, end);
            case 2: return add_up<2>(to, parts, begin, end);
            case 3: return add_up<3>(to, parts, begin, end);
            case 4: return add_up<4>(to, parts, begin, end);
            case 5: return add_up<5>(to, parts, begin, end);
            case 6: return add_up<6>(to, parts, begin, end);
            case 7: return add_up<7>(to, parts, begin, end);
            case 8: return add_up<8>(to, parts, begin, end);
        }
    }

    // Slices begin at cache lines.
    int64_t slice_begin(int64_t rank) const { return std::min(rows * width, (rank * rows * width / ranks.num_ranks + 63) / 64 * 64); }

    void run() const {
        const Stopwatch stopwatch(ranks.nanoseconds);
        if (ranks.header == nullptr) {
            parallel_rows(rows, width, [&](int64_t begin, int64_t end) { add_up((T*)out, begin * width, end * width); });
            return;
        }
        barrier(ranks);
        const int64_t begin = slice_begin(ranks.rank), num_vectors = (slice_begin(ranks.rank + 1) - begin) / LANES;
        T* sums = ranks.at<T>(ranks.rank, sums_offset);
        parallel_rows(num_vectors, LANES, [&](int64_t first, int64_t last) {
            add_up(sums, begin + first * LANES, begin + last * LANES);
        });
        barrier(ranks);
        for (int64_t rank = 0; rank < ranks.num_ranks; rank++) {
            const int64_t from = slice_begin(rank), to = slice_begin(rank + 1);
            std::copy(ranks.at<T>(rank, sums_offset) + from, ranks.at<T>(rank, sums_offset) + to, (T*)out + from);
        }
    }
};

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_all_reduce(const void* args) {
    const Args& a = *(const Args*)args;
    if (!a.is_bf16) AllReduce<float, float>(a).run();
    else if (a.parts_are_float) AllReduce<bf16, float>(a).run();
    else AllReduce<bf16, bf16>(a).run();
}
