// Processes that compute one model together, over memory that they share: how they wait for each other.
#pragma once

#include <atomic>
#include <cstdint>

namespace octavo {

// The beginning of the shared memory, which is all zeros at first.
struct alignas(64) SharedHeader {
    alignas(64) std::atomic<uint32_t> num_arrived;
    alignas(64) std::atomic<uint32_t> round;  // of barriers; what sleeping ranks wait on
    std::atomic<uint32_t> num_asleep;
};

// The arguments of every op over ranks begin, after the rows, with these. Without a header there is one rank.
struct Ranks {
    SharedHeader* header;
    char* regions;  // one for each rank, region_bytes apart; buffers lie at the same place in each
    int64_t region_bytes, rank, num_ranks;
    int64_t spins;         // how often to look before sleeping: never, where the others need this core
    int64_t* nanoseconds;  // added to: the time in these ops, waiting included

    template <typename T>
    T* at(int64_t of_rank, int64_t offset) const {
        return (T*)(regions + of_rank * region_bytes + offset);
    }
};

// Returns once every rank has called it; what they wrote before is seen. With a rank that has died it never returns.
void barrier(const Ranks& ranks);

// Adds the time of its own life.
class Stopwatch {
public:
    explicit Stopwatch(int64_t* nanoseconds);
    ~Stopwatch();

private:
    int64_t* nanoseconds_;
    int64_t begin_;
};

}  // namespace octavo
