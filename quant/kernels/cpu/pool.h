// A persistent thread pool that never spins when idle, and the scratch memory that goes with it.
//
// One job at a time: a C ABI entry holds `Job` for its whole length, so calls from several Python threads queue. A job
// is a few `parallel` phases. Each thread goes through its own contiguous share piece by piece (long streams read
// fastest), then takes what others have left: a thread that the system holds up or has not woken yet does not hold up
// the rest. No result depends on who took what: each output element is computed by one thread in a fixed order.
#pragma once
#include <cfenv>
#include <cstddef>
#include <cstdint>

namespace slotmoe {

constexpr int kMaxThreads = 256;
constexpr int kScratchSlots = 40;

using PhaseFn = void (*)(void* context, int thread, int64_t begin, int64_t end);

struct Pool;

class Job {
public:
    Job();   // waits for its turn; sets this thread's floating-point environment to the default (restored at the end)
    ~Job();
    Job(const Job&) = delete;
    Job& operator=(const Job&) = delete;

    int threads() const;

    // Calls body(thread, begin, end) for pieces that make up [0, count), perhaps several times on a thread and never on
    // some; returns when all are done.
    template <class Body>
    void parallel(int64_t count, Body body) {
        run([](void* context, int thread, int64_t begin,
               int64_t end) { (*static_cast<Body*>(context))(thread, begin, end); },
            &body, count);
    }

    // body(thread, i) for each i below `count`.
    template <class Body>
    void each(int64_t count, Body body) {
        parallel(count, [&](int thread, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) body(thread, i);
        });
    }

    // body(thread, part, begin, end) for pieces that make up [0, size) of each of so many parts.
    template <class Body>
    void each_part(int64_t parts, int64_t size, Body body) {
        parallel(parts * size, [&](int thread, int64_t begin, int64_t end) {
            for (int64_t part = begin / size, first = part * size; first < end; part++, first += size)
                body(thread, part, begin > first ? begin - first : 0, end < first + size ? end - first : size);
        });
    }

    // A 64-byte-aligned buffer, kept between jobs and grown as needed. `slot` tells buffers of one job apart.
    // Throws std::bad_alloc.
    template <class T>
    T* scratch(int slot, int64_t count) {
        return static_cast<T*>(scratch_bytes(slot, size_t(count) * sizeof(T)));
    }

    // Gives back the buffers that are larger than `most` bytes; others stay for the next job.
    void trim(size_t most);

private:
    void run(PhaseFn fn, void* context, int64_t count);
    void* scratch_bytes(int slot, size_t bytes);
    Pool* pool_;
    std::fenv_t environment_;
};

void set_threads(int threads);
int get_threads();
// The caller excepted, threads run on these from the next job on; for none of them, and elsewhere than on Linux, where
// the system puts them.
void set_cpus(const int32_t* cpus, int count);

}  // namespace slotmoe
