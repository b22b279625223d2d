// Root mean square norm (Zhang and Sennrich, arXiv 1910.07467): out = x / sqrt(mean(x^2) + eps) * weight, in fp32, one
// rounding. A row is reduced by one thread in one order, so its bits do not depend on the number of rows.
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
void norm(T* out, const T* x, const float* weight, int64_t outer, int64_t inner, int64_t stride,
          int64_t size, float eps) {
    parallel_rows(outer * inner, size, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const int64_t i = r / inner, j = r % inner;
            norm_row(out + i * stride + j * size, x + i * stride + j * size, weight, size, eps);
        }
    });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

// x and out: `outer` rows `stride` elements apart, each of `inner` vectors of `size` elements that are normed by
// themselves; size is a multiple of 16. out may be x.
extern "C" void octavo_rms_norm(void* out, const void* x, const float* weight, int64_t outer, int64_t inner,
                                int64_t stride, int64_t size, float eps, int is_bf16) {
    if (is_bf16) norm((bf16*)out, (const bf16*)x, weight, outer, inner, stride, size, eps);
    else norm((float*)out, (const float*)x, weight, outer, inner, stride, size, eps);
}
