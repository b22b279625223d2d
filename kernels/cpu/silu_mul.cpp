// out = silu(gate) * up, silu(g) = g / (1 + exp(-g)) (Shazeer, arXiv 2002.05202), in fp32, one rounding.
#include "parallel.h"
#include "vec.h"

namespace octavo {
namespace {

template <typename T>
void silu_mul(T* out, const T* gate_up, int64_t rows, int64_t size) {
    parallel_rows(rows, size, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const T* gate = gate_up + r * 2 * size;
            for (int64_t i = 0; i < size; i += LANES) {
                const f32x16 g = load(gate + i);
                store(out + r * size + i, g / (splat(1.0f) + exp(-g)) * load(gate + size + i));
            }
        }
    });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

// gate_up: [rows, 2 * size], gate first; size is a multiple of 16.
extern "C" void octavo_silu_mul(void* out, const void* gate_up, int64_t rows, int64_t size, int is_bf16) {
    if (is_bf16) silu_mul((bf16*)out, (const bf16*)gate_up, rows, size);
    else silu_mul((float*)out, (const float*)gate_up, rows, size);
}
