// out[r, i] = x[r, order[i]]: values are moved, whatever they are.
#include "parallel.h"

namespace octavo {
namespace {

struct Args {
    int64_t rows;
    const void* x;
    const int32_t* order;  // [k]
    void* out;
    int64_t k, x_stride, out_stride, item_bytes;
};

template <typename T>
void gather(const Args& a) {
    parallel_rows(a.rows, a.k, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const T* x = (const T*)a.x + r * a.x_stride;
            T* out = (T*)a.out + r * a.out_stride;
            for (int64_t i = 0; i < a.k; i++) out[i] = x[a.order[i]];
        }
    });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_gather_columns(const void* args) {
    const Args& a = *(const Args*)args;
    if (a.item_bytes == 2) gather<int16_t>(a);
    else gather<int32_t>(a);
}
