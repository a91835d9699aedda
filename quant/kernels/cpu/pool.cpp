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
#if defined(__linux__)
#include <sched.h>
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

std::atomic<int> wanted_threads{1};  // survives a fork, unlike the pool

}  // namespace

struct Pool {
    std::mutex job;  // held by the running job

    // phase << 1 | open. A worker goes in by saying so in a cache line of its own, and looks again whether the phase is
    // open; the caller closes it and waits for those that are inside. A worker that the system does not schedule costs
    // its share of the speed, nothing more. No line is written by all threads: that takes longer than a phase of many.
    static constexpr uint64_t kOpen = 1;
    std::atomic<uint64_t> state{0};
    struct Thread {
        alignas(64) std::atomic<bool> inside{false};
        // Low half of the phase << 32 | elements of the thread's range that are taken; in a later phase none are.
        alignas(64) std::atomic<uint64_t> taken{0};
    };
    Thread thread[kMaxThreads];
    PhaseFn fn = nullptr;
    void* context = nullptr;
    int64_t each = 0, rest = 0, grain = 1;  // elements of a range; one more in the first `rest`

    std::mutex sleep;
    std::condition_variable wake, done;
    std::atomic<int> sleeping{0};
    std::atomic<bool> caller_sleeps{false}, stop{false};
    std::vector<std::thread> workers;
#if defined(__linux__)
    cpu_set_t cpus{};  // that workers are bound to; to none if there are none
#endif

    void* buffer[kScratchSlots] = {};
    size_t size[kScratchSlots] = {};

    int threads() const { return int(workers.size()) + 1; }

    void share(int self, uint64_t phase) {
        const int n = threads();
        for (int i = 0; i < n; i++) {
            const int range = self + i < n ? self + i : self + i - n;
            const int64_t size = each + (range < rest), first = each * range + (range < rest ? range : rest);
            uint64_t taken = thread[range].taken.load();
            for (;;) {
                const int64_t begin = uint32_t(taken >> 32) == uint32_t(phase) ? uint32_t(taken) : 0;
                if (begin >= size) break;
                // Half of what is left: long streams, and yet all threads are done at about the same time.
                const int64_t left = size - begin, half = (left + 1) / 2;
                const int64_t end = begin + (half > grain ? half : left < grain ? left : grain);
                const uint64_t more = phase << 32 | uint64_t(end);
                if (!thread[range].taken.compare_exchange_weak(taken, more)) continue;
                fn(context, self, first + begin, first + end);
                taken = more;
            }
        }
    }

    void worker(int self, uint64_t seen) {
        std::fesetenv(FE_DFL_ENV);  // a new thread inherits its maker's, which may flush denormals
#if defined(__linux__)
        if (CPU_COUNT(&cpus)) sched_setaffinity(0, sizeof cpus, &cpus);
#endif
        for (;;) {
            const auto called = [&] {
                const uint64_t s = state.load();
                return stop.load() || ((s & kOpen) && s != seen);
            };
            if (!spin_until(called)) {
                std::unique_lock<std::mutex> lock(sleep);
                sleeping++;
                wake.wait(lock, called);
                sleeping--;
            }
            if (stop.load()) return;
            const uint64_t s = state.load();
            thread[self].inside.exchange(true);  // qemu lets the load below overtake a store to an ARM's memory
            if ((s & kOpen) && state.load() == s) {
                seen = s;
                share(self, s / 2);
            }
            thread[self].inside.exchange(false);  // as above
            if (caller_sleeps.load()) {
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
        uint64_t phase = state.load() / 2 + 1;
        if (uint32_t(phase) == 0) {  // what a range has of a phase long ago would pass for this one's
            for (Thread& t : thread) t.taken.store(0);
            phase++;
        }
        state.store(phase << 1 | kOpen);
        wake_sleepers();
        share(0, phase);
        state.fetch_and(~kOpen);
        int left = 1;  // threads before it are done: none goes in any more
        const auto finished = [&] {
            while (left < threads() && !thread[left].inside.load()) left++;
            return left == threads();
        };
        if (spin_until(finished)) return;
        std::unique_lock<std::mutex> lock(sleep);
        caller_sleeps.exchange(true);  // as above
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
        const uint64_t seen = state.load();
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
    pool_->resize(wanted_threads.load());
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
    pool_->each = count / pool_->threads();
    pool_->rest = count % pool_->threads();
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

void Job::trim(size_t most) {
    for (int slot = 0; slot < kScratchSlots; slot++) {
        if (pool_->size[slot] <= most) continue;
        ::operator delete(pool_->buffer[slot], std::align_val_t(64));
        pool_->buffer[slot] = nullptr;
        pool_->size[slot] = 0;
    }
}

void set_threads(int threads) { wanted_threads.store(threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads); }

int get_threads() { return wanted_threads.load(); }

void set_cpus(const int32_t* cpus, int count) {
#if defined(__linux__)
    Pool* p = pool();
    std::lock_guard<std::mutex> lock(p->job);
    p->resize(1);  // the next job makes new workers
    CPU_ZERO(&p->cpus);
    for (int i = 0; i < count; i++)
        if (cpus[i] < CPU_SETSIZE) CPU_SET(cpus[i], &p->cpus);
#endif
}

}  // namespace slotmoe
