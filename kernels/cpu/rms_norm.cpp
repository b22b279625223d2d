// Root mean square norm (Zhang and Sennrich, arXiv 1910.07467): out = x / sqrt(mean(x^2) + eps) * weight, in fp32, one
// rounding. Where there is a residual, x is first added to it, and the norm is of the sum. A row is reduced by one thread
// in one order, so its bits do not depend on the number of rows.
#include "parallel.h"
#include "vec.h"

#include <cmath>

namespace octavo {
namespace {

template <typename T>
void norm_row(T* out, const T* x, const float* weight, int64_t size, float eps) {
    f32x16 squares = splat(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
        const f32x16 v = load(x + i);
        squares = fma(v, v, squares);
    }
    const float scale = 1.0f / std::sqrt(sum_lanes(squares) / (float)size + eps);
    for (int64_t i = 0; i < size; i += LANES) store(out + i, load(x + i) * splat(scale) * load(weight + i));
}

template <typename T>
void add_row(T* residual, const T* x, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) store(residual + i, load(residual + i) + load(x + i));
}

struct Args {
    int64_t outer;  // rows, `stride` elements apart
    void* out;      // may be x
    const void* x;
    void* residual;               // laid out as x, or null
    const float* weight;          // [size]
    int64_t inner, stride, size;  // vectors in a row, each normed by itself; their size is a multiple of 16
    float eps;
    int32_t is_bf16;
};

template <typename T>
void norm(const Args& a) {
    parallel_rows(a.outer * a.inner, a.size, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const int64_t at = r / a.inner * a.stride + r % a.inner * a.size;
            const T* x = (const T*)a.x + at;
            if (a.residual) {
                add_row((T*)a.residual + at, x, a.size);
                x = (const T*)a.residual + at;
            }
            norm_row((T*)a.out + at, x, a.weight, a.size, a.eps);
        }
    });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_rms_norm(const void* args) {
    const Args& a = *(const Args*)args;
    if (a.is_bf16) norm<bf16>(a);
    else norm<float>(a);
}
