#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace slotmoe {
namespace {

constexpr int kSmallestPieces = 32;  // of a thread's share
// longer than the Python between two kernels of a busy decode step
constexpr auto kSpin = std::chrono::microseconds(40);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True as soon as `ready()`; false after kSpin.
template <class Ready>
bool spin_until(Ready ready) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 64; i++) {
            if (ready()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return ready();
}

int default_threads() {
    const int n = int(std::thread::hardware_concurrency());
    return n < 1 ? 1 : n > kMaxThreads ? kMaxThreads : n;
}

std::atomic<int> wanted_threads{0};  // survives a fork, unlike the pool

}  // namespace

struct Pool {
    std::mutex job;  // held by the running job

    // generation << 17 | open << 16 | workers inside. A worker enters only while the phase is open and the caller waits
    // only for those inside: a worker that the system does not schedule costs its share of the speed, nothing more.
    static constexpr uint64_t kInside = 0xffff, kOpen = 1 << 16, kGeneration = 1 << 17;
    std::atomic<uint64_t> state{0};
    struct alignas(64) Next {
        std::atomic<int64_t> value{0};
    };
    Next next[kMaxThreads];  // of each thread's range
    PhaseFn fn = nullptr;
    void* context = nullptr;
    int64_t count = 0, grain = 1;

    std::mutex sleep;
    std::condition_variable wake, done;
    std::atomic<int> sleeping{0};
    std::atomic<bool> caller_sleeps{false}, stop{false};
    std::vector<std::thread> workers;

    void* buffer[kScratchSlots] = {};
    size_t size[kScratchSlots] = {};

    int threads() const { return int(workers.size()) + 1; }

    void share(int thread) {
        const int n = threads();
        for (int i = 0; i < n; i++) {
            const int range = (thread + i) % n;
            const int64_t end = count * (range + 1) / n;
            int64_t begin = next[range].value.load();
            while (begin < end) {
                // Half of what is left: long streams, and yet all threads are done at about the same time.
                const int64_t half = (end - begin + 1) / 2, piece = half > grain          ? half
                                                                    : end - begin < grain ? end - begin
                                                                                          : grain;
                if (!next[range].value.compare_exchange_weak(begin, begin + piece)) continue;
                fn(context, thread, begin, begin + piece);
                begin = next[range].value.load();
            }
        }
    }

    void worker(int thread, uint64_t seen) {
        std::fesetenv(FE_DFL_ENV);  // a new thread inherits its maker's, which may flush denormals
        for (;;) {
            const auto called = [&] {
                const uint64_t s = state.load();
                return stop.load() || ((s & kOpen) && s / kGeneration != seen);
            };
            if (!spin_until(called)) {
                std::unique_lock<std::mutex> lock(sleep);
                sleeping++;
                wake.wait(lock, called);
                sleeping--;
            }
            if (stop.load()) return;
            uint64_t s = state.load();
            while ((s & kOpen) && !state.compare_exchange_weak(s, s + 1)) {
            }
            if (!(s & kOpen)) continue;
            seen = s / kGeneration;
            share(thread);
            if ((state.fetch_sub(1) & kInside) == 1 && caller_sleeps.load()) {
                std::lock_guard<std::mutex> lock(sleep);
                done.notify_one();
            }
        }
    }

    void wake_sleepers() {
        if (sleeping.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep);
            wake.notify_all();
        }
    }

    void run() {
        for (int i = 0; i < threads(); i++) next[i].value.store(count * i / threads());
        state.store((state.load() / kGeneration + 1) * kGeneration | kOpen);
        wake_sleepers();
        share(0);
        state.fetch_and(~kOpen);
        const auto finished = [&] { return (state.load() & kInside) == 0; };
        if (spin_until(finished)) return;
        std::unique_lock<std::mutex> lock(sleep);
        caller_sleeps.exchange(true);  // qemu lets the load below overtake a store to an ARM's memory
        done.wait(lock, finished);
        caller_sleeps.store(false);
    }

    // The job mutex is held.
    void resize(int threads) {
        if (threads == this->threads()) return;
        stop.exchange(true);  // as above
        wake_sleepers();
        for (auto& w : workers) w.join();
        workers.clear();
        stop.store(false);
        const uint64_t seen = state.load() / kGeneration;
        try {
            for (int i = 1; i < threads; i++) workers.emplace_back([this, i, seen] { worker(i, seen); });
        } catch (...) {  // the system gives no more threads: work with what there is
        }
    }
};

namespace {

std::atomic<Pool*> current{nullptr};
std::mutex* making = new std::mutex;

// In a forked child the workers are gone and any mutex may be held by a thread that no longer exists:
// leave the old pool where it is and make a new one at the next call.
void after_fork() {
    current.store(nullptr);
    making = new std::mutex;
}

Pool* pool() {
    if (Pool* p = current.load()) return p;
    std::lock_guard<std::mutex> lock(*making);
    if (Pool* p = current.load()) return p;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
    (void)registered;
#endif
    Pool* p = new Pool;  // never deleted: its threads may outlive static destructors
    current.store(p);
    return p;
}

}  // namespace

Job::Job() : pool_(pool()) {
    pool_->job.lock();
    std::fegetenv(&environment_);
    std::fesetenv(FE_DFL_ENV);
    const int wanted = wanted_threads.load();
    pool_->resize(wanted > 0 ? wanted : default_threads());
}

Job::~Job() {
    std::fesetenv(&environment_);
    pool_->job.unlock();
}

int Job::threads() const { return pool_->threads(); }

void Job::run(PhaseFn fn, void* context, int64_t count) {
    if (pool_->workers.empty() || count < 2) {
        if (count > 0) fn(context, 0, 0, count);
        return;
    }
    pool_->fn = fn;
    pool_->context = context;
    pool_->count = count;
    const int64_t pieces = int64_t(pool_->threads()) * kSmallestPieces;
    pool_->grain = (count + pieces - 1) / pieces;
    pool_->run();
}

void* Job::scratch_bytes(int slot, size_t bytes) {
    if (bytes > pool_->size[slot]) {
        const size_t size = (bytes + 4095) / 4096 * 4096;
        ::operator delete(pool_->buffer[slot], std::align_val_t(64));
        pool_->buffer[slot] = nullptr;
        pool_->size[slot] = 0;
        pool_->buffer[slot] = ::operator new(size, std::align_val_t(64));
        pool_->size[slot] = size;
    }
    return pool_->buffer[slot];
}

void set_threads(int threads) { wanted_threads.store(threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads); }

int get_threads() {
    const int wanted = wanted_threads.load();
    return wanted > 0 ? wanted : default_threads();
}

}  // namespace slotmoe
