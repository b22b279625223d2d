#include "parallel.h"

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

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

// How long to spin before sleeping (a worker without a loop) or yielding (the caller, for the last iterations): longer
// than the gaps between the ops of a step, shorter than anybody would notice.
constexpr int SPINS = 2000;

class Pool {
public:
    ~Pool() { resize(1); }

    int size() const { return size_; }

    // Not while a loop runs.
    void resize(int size) {
        std::lock_guard<std::mutex> guard(in_use_);
        stop_ = true;
        wake();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
        stop_ = false;
        size_ = size;
        for (int i = 1; i < size; i++) workers_.emplace_back([this] { work(); });
    }

    void run(int64_t count, LoopBody body, const void* context) {
        std::unique_lock<std::mutex> guard(in_use_, std::try_to_lock);
        if (!guard.owns_lock()) {  // another thread's loop has the workers
            for (int64_t i = 0; i < count; i++) body(context, i);
            return;
        }
        count_.store((uint32_t)count, std::memory_order_relaxed);
        body_.store(body, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        ticket_.store(epoch << 32 | (uint32_t)count);
        if (num_asleep_.load() > 0) wake();
        take_part();
        for (int spins = 0; done_.load(std::memory_order_acquire) != (uint32_t)count;)
            if (++spins < SPINS) pause();
            else std::this_thread::yield();
    }

private:
    // Runs iterations of the current loop until none is left to begin.
    void take_part() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        for (;;) {
            const uint32_t num_left = (uint32_t)ticket;
            if (num_left == 0) return;
            // A loop's fields do not change while its ticket has iterations left, since the caller waits for all of them.
            // Where they were read as the next loop was set up, the ticket is another one, and the exchange fails.
            const LoopBody body = body_.load(std::memory_order_relaxed);
            const void* context = context_.load(std::memory_order_relaxed);
            const uint32_t index = count_.load(std::memory_order_relaxed) - num_left;
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire))
                continue;
            body(context, index);
            done_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void work() {
        uint64_t seen = 0;
        while (!stop_.load()) {
            const uint64_t epoch = ticket_.load(std::memory_order_acquire) >> 32;
            if (epoch != seen) {
                take_part();
                seen = epoch;
                continue;
            }
            int spins = 0;
            while (ticket_.load(std::memory_order_relaxed) >> 32 == seen && ++spins < SPINS) pause();
            if (spins < SPINS) continue;
            const uint32_t calls = calls_.load();
            num_asleep_.fetch_add(1);
            if (ticket_.load() >> 32 == seen && !stop_.load()) calls_.wait(calls);
            num_asleep_.fetch_sub(1);
        }
    }

    void wake() {
        calls_.fetch_add(1);
        calls_.notify_all();
    }

    // (number of the loop) << 32 | iterations that nobody has begun
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<uint32_t> done_{0};  // iterations that have ended
    alignas(64) std::atomic<uint32_t> count_{0};
    std::atomic<LoopBody> body_{nullptr};
    std::atomic<const void*> context_{nullptr};
    alignas(64) std::atomic<uint32_t> calls_{0};  // what sleeping workers wait on
    std::atomic<int> num_asleep_{0};
    std::atomic<bool> stop_{false};
    std::mutex in_use_;
    std::vector<std::thread> workers_;
    int size_ = 1;
};

Pool& pool() {
    static Pool instance;
    return instance;
}

}  // namespace

int num_threads() { return pool().size(); }

void run_loop(int64_t count, LoopBody body, const void* context) { pool().run(count, body, context); }

}  // namespace octavo

// How many threads the ops use, the caller included; 1 at first. Not while an op runs.
extern "C" void octavo_set_num_threads(int count) { octavo::pool().resize(count < 1 ? 1 : count); }
