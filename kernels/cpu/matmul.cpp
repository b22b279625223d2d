// Linear layers, the packing of their weights, and rows of a packed weight. See matmul.h.
#include "matmul.h"

namespace octavo {
namespace {

// Rows of the weight to panels panel_begin, + panel_step, + ...; row_begin: place of the first row among their rows.
struct PackArgs {
    int64_t rows;
    void* out;
    const void* weight;  // [rows, k]
    int64_t row_begin, panel_begin, panel_step, k, is_bf16;
};

template <typename T>
void pack(const PackArgs& a) {
    constexpr int KS = STEP<T>;
    parallel_rows(a.rows, a.k, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            const int64_t n = a.row_begin + r;
            const T* row = (const T*)a.weight + r * a.k;
            T* panel = (T*)a.out + (a.panel_begin + n / LANES * a.panel_step) * LANES * a.k + n % LANES * KS;
            for (int64_t c = 0; c < a.k; c += KS)
                for (int s = 0; s < KS; s++) panel[c * LANES + s] = row[c + s];
        }
    });
}

struct EmbeddingArgs {
    int64_t count;
    void* out;           // [count, k]
    const void* packed;  // [n, k], the rows of ids [first_id, first_id + n); the others' are zeros
    const int32_t* ids;  // [count]
    int64_t first_id, n, k, is_bf16;
};

template <typename T>
void unpack_rows(const EmbeddingArgs& a) {
    constexpr int KS = STEP<T>;
    const int64_t k = a.k;
    T* out = (T*)a.out;
    const T* packed = (const T*)a.packed;
    for (int64_t i = 0; i < a.count; i++) {
        const int64_t n = a.ids[i] - a.first_id;
        if (n < 0 || n >= a.n) {
            std::fill_n(out + i * k, k, T(0));
            continue;
        }
        const T* panel = packed + (n / LANES) * LANES * k + (n % LANES) * KS;
        for (int64_t c = 0; c < k; c += KS)
            for (int s = 0; s < KS; s++) out[i * k + c + s] = panel[c * LANES + s];
    }
}

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_matmul(const void* args) {
    const MatmulArgs& a = *(const MatmulArgs*)args;
    if (a.is_bf16) matmul(a, PackedWeights<bf16>{a.weight, a.k});
    else matmul(a, PackedWeights<float>{a.weight, a.k});
}

extern "C" void octavo_pack_weight(const void* args) {
    const PackArgs& a = *(const PackArgs*)args;
    if (a.is_bf16) pack<bf16>(a);
    else pack<float>(a);
}

// Rows of a packed weight.
extern "C" void octavo_embedding(const void* args) {
    const EmbeddingArgs& a = *(const EmbeddingArgs*)args;
    if (a.is_bf16) unpack_rows<bf16>(a);
    else unpack_rows<float>(a);
}
