// A small thread pool. Not OpenMP: torch brings its own OpenMP runtime, and a second one beside it spins against the
// first.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace pf {

inline int process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<int>(getpid());
#else
  return 0;
#endif
}

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#endif
}

// Workers sleep between jobs after a short spin; the caller is worker 0. One job at a time, from one thread.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), owner_(process_id()) {
    for (int worker = 1; worker < threads; worker++) std::thread([this, worker] { serve(worker); }).detach();
  }
  int threads() const { return threads_; }
  int owner() const { return owner_; }

  // Calls body(worker) once on each worker and returns when all are done.
  void run(const std::function<void(int)> &body) {
    if (threads_ == 1) return body(0);
    body_ = &body;
    pending_.store(threads_ - 1, std::memory_order_relaxed);
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
    body(0);
    wait_while(pending_, [](int pending) { return pending != 0; });
  }

 private:
  static constexpr int kSpins = 2000;  // about 20 us

  template <class Keep>
  static void wait_while(std::atomic<int> &value, Keep keep) {
    for (int spin = 0; spin < kSpins; spin++) {
      if (!keep(value.load(std::memory_order_acquire))) return;
      relax();
    }
    for (int now = value.load(std::memory_order_acquire); keep(now); now = value.load(std::memory_order_acquire))
      value.wait(now, std::memory_order_acquire);
  }

  void serve(int worker) {
    for (int seen = 0;;) {
      wait_while(job_, [seen](int job) { return job == seen; });
      seen = job_.load(std::memory_order_acquire);
      if (retired_.load(std::memory_order_acquire)) return release();
      (*body_)(worker);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
    }
  }

  void release() {
    if (alive_.fetch_sub(1) == 1) delete this;
  }

  const int threads_, owner_;
  const std::function<void(int)> *body_ = nullptr;
  std::atomic<int> job_{0}, pending_{0}, alive_{threads_ - 1};
  std::atomic<bool> retired_{false};

 public:
  // The last worker to wake frees the pool. A pool inherited through fork has no workers and is left alone.
  void retire() {
    if (owner_ != process_id()) return;
    if (threads_ == 1) return void(delete this);
    retired_.store(true, std::memory_order_release);
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
  }
};

inline int &wanted_threads() {
  static int threads = std::max(1u, std::thread::hardware_concurrency());
  return threads;
}

inline Pool &pool() {
  static Pool *current = nullptr;
  if (!current || current->threads() != wanted_threads() || current->owner() != process_id()) {
    if (current) current->retire();
    current = new Pool(wanted_threads());
  }
  return *current;
}

inline int num_threads() { return wanted_threads(); }
inline void set_num_threads(int threads) { wanted_threads() = threads < 1 ? 1 : threads; }

// body(worker, workers) on every thread of the pool.
template <class Body>
void parallel(Body &&body) {
  Pool &p = pool();
  const int workers = p.threads();
  p.run([&](int worker) { body(worker, workers); });
}

// body(begin, end) over [0, count) in chunks of `grain`, handed out as threads come free.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body &&body) {
  if (count <= grain || num_threads() == 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel([&](int, int) {
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < count;)
      body(begin, std::min(begin + grain, count));
  });
}

// The part of [0, count) that belongs to `worker` when every worker takes one contiguous share.
inline std::pair<int64_t, int64_t> share(int64_t count, int worker, int workers) {
  return {count * worker / workers, count * (worker + 1) / workers};
}

}  // namespace pf
