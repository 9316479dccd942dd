#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <thread>

namespace torchinfer {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kSpins = 4096;  // about as long
constexpr int64_t kLargePage = 2 << 20;
constexpr uint64_t kNoItem = 0xffffffff;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline uint32_t epoch_of(uint64_t state) { return static_cast<uint32_t>(state >> 32); }
inline uint64_t state_of(uint32_t epoch, uint64_t item) { return static_cast<uint64_t>(epoch) << 32 | item; }

void pin_to_cpu(int index) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
    index %= CPU_COUNT(&allowed);
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &allowed) && index-- == 0) CPU_SET(cpu, &one);
    }
    pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
#else
    (void)index;
#endif
}

std::mutex instance_mutex;
std::atomic<Pool*> instance{nullptr};
// What configure_pool was told, for the pools of forked children; guarded by instance_mutex.
int configured_threads = 0;
bool is_configured_pinned = false;

// Threads do not survive a fork: the child forgets the pool, whose memory it must not touch.
void forget_pool() {
    instance.store(nullptr);
    new (&instance_mutex) std::mutex;
}

int num_usable_cpus() {
    int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) count = CPU_COUNT(&allowed);
#endif
    return std::min(std::max(1, count), kMostThreads);
}

Pool* make_pool() {
    static const bool is_registered = pthread_atfork(nullptr, nullptr, forget_pool) == 0;
    (void)is_registered;
    return new Pool(configured_threads > 0 ? configured_threads : num_usable_cpus(), is_configured_pinned);
}

}  // namespace

Pool& pool() {
    Pool* current = instance.load(std::memory_order_acquire);
    if (current == nullptr) {
        std::lock_guard<std::mutex> guard(instance_mutex);
        current = instance.load();
        if (current == nullptr) instance.store(current = make_pool());
    }
    return *current;
}

void configure_pool(int num_threads, bool is_pinned) {
    std::lock_guard<std::mutex> guard(instance_mutex);
    configured_threads = num_threads, is_configured_pinned = is_pinned;
    if (Pool* const old = instance.exchange(nullptr)) {
        { std::lock_guard<std::mutex> end_of_op(old->use); }
        delete old;  // before its successor is made: the system may limit threads
    }
    instance.store(make_pool());
}

Pool::Pool(int num_threads, bool is_pinned) : wanted_threads_(num_threads), is_pinned_(is_pinned) {
    workers_.reserve(static_cast<size_t>(num_threads));  // threads have pointers to them
    for (int thread = 1; thread < num_threads; ++thread) {
        workers_.push_back({this, thread, {}});
        // Not std::thread, which throws where the system has no more threads.
        if (pthread_create(&workers_.back().handle, nullptr, enter, &workers_.back()) == 0) continue;
        workers_.pop_back();
        break;
    }
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> guard(sleep_mutex_);
        is_ending_.store(true);
    }
    wake_.notify_all();
    for (const Worker& worker : workers_) pthread_join(worker.handle, nullptr);
    std::free(scratch_.bytes);
    std::free(activations_.bytes);
}

int Pool::num_threads() const { return static_cast<int>(workers_.size()) + 1; }

void Pool::run(Work work, void* context, int64_t num_items) {
    if (num_items <= 0) return;
    if (workers_.empty() || num_items == 1) {
        for (int64_t item = 0; item < num_items; ++item) work(context, item, 0);
        return;
    }
    const uint32_t epoch = epoch_of(state_.load(std::memory_order_relaxed)) + 2;
    state_.store(state_of(epoch - 1, kNoItem), std::memory_order_seq_cst);
    work_.store(work, std::memory_order_release);
    context_.store(context, std::memory_order_release);
    num_items_.store(num_items, std::memory_order_release);
    num_done_.store(0, std::memory_order_release);
    state_.store(state_of(epoch, 0), std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> guard(sleep_mutex_); }
        wake_.notify_all();
    }
    work_on(epoch, 0);
    for (int spin = 0; num_done_.load(std::memory_order_acquire) < num_items; ++spin) {
        if (spin < kSpins) {
            relax();
        } else {  // who has the last item may wait for this processor, where other threads compute too
            std::this_thread::yield();
        }
    }
}

void* Pool::grown(Memory& memory, int64_t num_bytes) {
    if (num_bytes > memory.size) {
        std::free(memory.bytes);
        memory.size = (num_bytes + num_bytes / 2 + kLargePage - 1) / kLargePage * kLargePage;
        memory.bytes = std::aligned_alloc(kLargePage, static_cast<size_t>(memory.size));
        if (memory.bytes == nullptr) memory.size = 0;
#if defined(__linux__)
        if (memory.bytes != nullptr) madvise(memory.bytes, static_cast<size_t>(memory.size), MADV_HUGEPAGE);
#endif
    }
    return memory.bytes;
}

void Pool::work_on(uint32_t epoch, int thread) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while (epoch_of(state) == epoch) {
        const int64_t item = static_cast<int64_t>(state & kNoItem);
        const Work work = work_.load(std::memory_order_acquire);
        void* const context = context_.load(std::memory_order_acquire);
        if (item >= num_items_.load(std::memory_order_acquire)) return;
        // Success means that the job is still the one that was just read: it cannot end before this item is done.
        if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_seq_cst)) continue;
        work(context, item, thread);
        num_done_.fetch_add(1, std::memory_order_acq_rel);
        state = state_.load(std::memory_order_acquire);
    }
}

void* Pool::enter(void* worker) {
    const Worker& self = *static_cast<Worker*>(worker);
    self.pool->loop(self.thread);
    return nullptr;
}

void Pool::loop(int thread) {
    if (is_pinned_) pin_to_cpu(thread);
    uint32_t seen = 0;
    while (!is_ending_.load(std::memory_order_relaxed)) {
        seen = wait_for_job(seen);
        work_on(seen, thread);
    }
}

// The number of a job that is not `seen`, or any when the pool ends.
uint32_t Pool::wait_for_job(uint32_t seen) {
    const auto is_new = [&] {
        const uint32_t epoch = epoch_of(state_.load(std::memory_order_seq_cst));
        return epoch != seen && epoch % 2 == 0;
    };
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    while (std::chrono::steady_clock::now() < end) {
        for (int spin = 0; spin < 32; ++spin) {
            if (is_new()) return epoch_of(state_.load(std::memory_order_acquire));
            relax();
        }
    }
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return is_new() || is_ending_.load(); });
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    return epoch_of(state_.load(std::memory_order_acquire));
}

}  // namespace torchinfer
