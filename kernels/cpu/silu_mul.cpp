// out = silu(gate) * up, silu(g) = g / (1 + exp(-g)) (Shazeer, arXiv 2002.05202), in fp32, one rounding.
#include "parallel.h"
#include "vec.h"

namespace octavo {
namespace {

struct Args {
    int64_t rows;
    void* out;            // [rows, size]
    const void* gate_up;  // [rows, 2 * size], gate first
    int64_t size;         // a multiple of 16
    int64_t is_bf16;
};

template <typename T>
void silu_mul(const Args& a) {
    parallel_rows(a.rows, a.size, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const T* gate = (const T*)a.gate_up + r * 2 * a.size;
            T* out = (T*)a.out + r * a.size;
            for (int64_t i = 0; i < a.size; i += LANES) {
                const f32x16 g = load(gate + i);
                store(out + i, g / (splat(1.0f) + exp(-g)) * load(gate + a.size + i));
            }
        }
    });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_silu_mul(const void* args) {
    const Args& a = *(const Args*)args;
    if (a.is_bf16) silu_mul<bf16>(a);
    else silu_mul<float>(a);
}
