// Rotary embedding (Su et al., arXiv 2104.09864; halves rotated, as Llama checkpoints expect) of queries and keys, fused
// with writing keys and values to their cache slots.
//
// Cache of a layer: [num_blocks, 2, num_kv_heads, block_size, head_size]. Inside a tile this CPU backend has an order of
// its own, in which 16 keys' scores, or 16 outputs, are one vector of paired elements (STEP in vec.h): K tiles are
// [head_size / STEP][block_size][STEP], V tiles are [block_size / STEP][head_size][STEP].
#include "parallel.h"
#include "vec.h"

namespace octavo {
namespace {

struct Args {
    int64_t tokens;
    void* qkv;                 // [tokens, (heads + 2 * kv_heads) * head_size], row stride qkv_stride
    const float* cos_sin;      // [max positions, rotary_size]: cosines, then sines
    const int32_t* positions;  // [tokens]
    const int64_t* slots;      // [tokens]: block * block_size + offset
    void* cache;
    int64_t qkv_stride, heads, kv_heads, head_size, rotary_size, block_size, is_bf16;
};

template <typename T>
struct Rotary : Args {
    explicit Rotary(const Args& args) : Args(args) {}

    // The head rotated in place.
    void rotate(T* head, const float* table) const {
        const int64_t half = rotary_size / 2;
        int64_t i = 0;
        for (; i + LANES <= half; i += LANES) {
            const f32x16 a = load(head + i), b = load(head + i + half);
            const f32x16 c = load(table + i), s = load(table + i + half);
            store(head + i, fma(a, c, -(b * s)));
            store(head + i + half, fma(b, c, a * s));
        }
        for (; i < half; i++) {
            const float a = to_float(head[i]), b = to_float(head[i + half]);
            const float c = table[i], s = table[i + half];
            store_one(head + i, __builtin_fmaf(a, c, -(b * s)));
            store_one(head + i + half, __builtin_fmaf(b, c, a * s));
        }
    }

    void token(int64_t t) const {
        T* row = (T*)qkv + t * qkv_stride;
        const float* table = cos_sin + positions[t] * rotary_size;
        for (int64_t h = 0; h < heads + kv_heads; h++) rotate(row + h * head_size, table);
        const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
        const int64_t tile = block_size * head_size;
        T* k_tiles = (T*)cache + block * 2 * kv_heads * tile;
        T* v_tiles = k_tiles + kv_heads * tile;
        constexpr int S = STEP<T>;
        for (int64_t h = 0; h < kv_heads; h++) {
            const T* k = row + (heads + h) * head_size;
            const T* v = row + (heads + kv_heads + h) * head_size;
            T* k_slot = k_tiles + h * tile + offset * S;
            T* v_slot = v_tiles + h * tile + offset / S * S * head_size + offset % S;
            for (int64_t i = 0; i < head_size; i += S)
                for (int j = 0; j < S; j++) k_slot[i * block_size + j] = k[i + j];
            for (int64_t i = 0; i < head_size; i++) v_slot[i * S] = v[i];
        }
    }

    void run() const {
        parallel_rows(tokens, (heads + 2 * kv_heads) * head_size, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) token(t);
        });
    }
};

}  // namespace
}  // namespace octavo

using namespace octavo;

extern "C" void octavo_rotary_kv_write(const void* args) {
    const Args& a = *(const Args*)args;
    if (a.is_bf16) Rotary<bf16>(a).run();
    else Rotary<float>(a).run();
}
