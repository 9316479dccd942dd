// Threads of our own: one a CPU that this process may use, the caller included. They spin for a moment between two
// jobs, because the next kernel of a step comes soon, and then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include <pthread.h>

namespace torchinfer {

// Computes one item. `thread` is below num_threads(); no two calls of a job at the same time have the same.
using Work = void (*)(void* context, int64_t item, int thread);

class Pool {
  public:
    Pool(int num_threads, bool is_pinned);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Not inline: level.cpp must not hold code of the standard library.
    int num_threads() const;
    int wanted_threads() const { return wanted_threads_; }  // more where the system did not let all start

    // Calls work for items 0 .. num_items - 1, in any order; returns when all are done. The caller holds `use`.
    void run(Work work, void* context, int64_t num_items);

    // At least this many bytes, aligned to a cache line, for the holder of `use`. Contents do not last. Grows only.
    void* scratch(int64_t num_bytes) { return grown(scratch_, num_bytes); }
    // The same for what goes from one kernel to the next, where a call runs several.
    void* activations(int64_t num_bytes) { return grown(activations_, num_bytes); }

    // Held while an op runs: jobs of several Python threads come one after the other.
    std::mutex use;

  private:
    struct Worker {
        Pool* pool;
        int thread;
        pthread_t handle;
    };
    static void* enter(void* worker);
    void work_on(uint32_t epoch, int thread);
    void loop(int thread);
    uint32_t wait_for_job(uint32_t seen);

    struct Memory {
        void* bytes = nullptr;
        int64_t size = 0;
    };
    void* grown(Memory& memory, int64_t num_bytes);

    // Number of the job in the upper half, the next item in the lower one: an item is claimed only of the job that
    // the claimer looked at, however late it comes. An odd number: a job that is being written.
    std::atomic<uint64_t> state_{0};
    std::atomic<Work> work_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int64_t> num_items_{0};
    alignas(64) std::atomic<int64_t> num_done_{0};

    std::atomic<int> num_sleeping_{0};
    std::atomic<bool> is_ending_{false};
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    const int wanted_threads_;
    const bool is_pinned_;
    std::vector<Worker> workers_;

    Memory scratch_, activations_;
};

constexpr int kMostThreads = 1024;

// The process's pool, made at the first call; a forked child makes its own, configured alike.
Pool& pool();
// Replaces it; no op may run or begin meanwhile, nor anyone count threads, but others may configure it too.
// num_threads 0: one for each CPU that the process's affinity has; kernels/cpu/cpus.py knows of quotas. Pinned: each
// thread to one of these CPUs, but for the caller, whose threads and processes to come would all be on that CPU: the
// first one is left to it.
void configure_pool(int num_threads, bool is_pinned);

// pool().run with a lambda: body(item, thread).
template <class Body>
void parallel_for(Pool& threads, int64_t num_items, const Body& body) {
    auto call = [](void* context, int64_t item, int thread) { (*static_cast<const Body*>(context))(item, thread); };
    threads.run(call, const_cast<Body*>(&body), num_items);
}

// Items of at most `at_once` things of `count`: body(first, end).
template <class Body>
void parallel_ranges(Pool& threads, int64_t count, int64_t at_once, const Body& body) {
    parallel_for(threads, (count + at_once - 1) / at_once, [&](int64_t item, int) {
        const int64_t first = item * at_once;
        body(first, count - first < at_once ? count : first + at_once);
    });
}

constexpr int64_t kItemValues = 16384;  // fewer numbers are not worth waking another thread

// Rows of `columns` numbers: body(row).
template <class Body>
void parallel_rows(Pool& threads, int64_t rows, int64_t columns, const Body& body) {
    parallel_ranges(threads, rows, 1 + kItemValues / columns, [&](int64_t row, int64_t end) {
        for (; row < end; ++row) body(row);
    });
}

}  // namespace torchinfer
