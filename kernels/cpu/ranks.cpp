#include "ranks.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace octavo {
namespace {

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
    return syscall(SYS_futex, word, operation, value, nullptr, nullptr, 0);
}

int64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

}  // namespace

void barrier(const Ranks& ranks) {
    if (ranks.header == nullptr) return;
    SharedHeader& shared = *ranks.header;
    const uint32_t round = shared.round.load();
    if (shared.num_arrived.fetch_add(1) + 1 == ranks.num_ranks) {
        shared.num_arrived.store(0);
        shared.round.store(round + 1);
        if (shared.num_asleep.load() > 0) futex(&shared.round, FUTEX_WAKE, INT_MAX);
        return;
    }
    for (int64_t i = 0; i < ranks.spins; i++) {
        if (shared.round.load(std::memory_order_acquire) != round) return;
        pause();
    }
    shared.num_asleep.fetch_add(1);
    while (shared.round.load() == round) futex(&shared.round, FUTEX_WAIT, round);
    shared.num_asleep.fetch_sub(1);
}

Stopwatch::Stopwatch(int64_t* nanoseconds) : nanoseconds_(nanoseconds), begin_(now()) {}
Stopwatch::~Stopwatch() {
    if (nanoseconds_) *nanoseconds_ += now() - begin_;
}

}  // namespace octavo

struct BarrierArgs {
    int64_t rows;
    octavo::Ranks ranks;
};

extern "C" void octavo_barrier(const void* args) {
    const octavo::Ranks& ranks = ((const BarrierArgs*)args)->ranks;
    const octavo::Stopwatch stopwatch(ranks.nanoseconds);
    octavo::barrier(ranks);
}
