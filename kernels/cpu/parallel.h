// The ops' thread pool: a loop whose iterations run on any thread, in any order, each once.
//
// The caller works, too, and waits for iterations, not for threads: a worker that the system has taken off its core holds
// up nobody unless it is in the middle of an iteration. With as many threads as cores and a busy process beside, that is
// what keeps a step from waiting a scheduler's time slice at each of its hundreds of loops.
#pragma once

#include <cstdint>

namespace octavo {

using LoopBody = void (*)(const void* context, int64_t index);

int num_threads();
void run_loop(int64_t count, LoopBody body, const void* context);

// body(i) for i in [0, count). Iterations should take microseconds at least; one loop runs at a time in a process.
template <typename F>
void parallel_for(int64_t count, const F& body) {
    if (count <= 1 || num_threads() == 1) {
        for (int64_t i = 0; i < count; i++) body(i);
        return;
    }
    run_loop(count, [](const void* context, int64_t index) { (*(const F*)context)(index); }, &body);
}

// body(begin, end) over ranges of rows that are worth a thread's while, at `row_size` elements each.
template <typename F>
void parallel_rows(int64_t rows, int64_t row_size, const F& body) {
    constexpr int64_t MIN_ELEMENTS = 16384;
    int64_t chunk = (MIN_ELEMENTS + row_size - 1) / row_size;
    const int64_t fair = (rows + 4 * num_threads() - 1) / (4 * num_threads());
    if (chunk < fair) chunk = fair;
    parallel_for((rows + chunk - 1) / chunk, [&](int64_t i) {
        const int64_t end = (i + 1) * chunk;
        body(i * chunk, end < rows ? end : rows);
    });
}

}  // namespace octavo
