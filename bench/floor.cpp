// What no kernel can be quicker than whose rows lie where the op's do: reading them, in the op's order and by as many
// threads, and making next to nothing of them. Compiled by bench/floor.py; no part of the package.
#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace {

typedef uint32_t Line __attribute__((vector_size(64), aligned(4), may_alias));

// Threads that wait for the next call.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int t = 1; t < threads; ++t) std::thread([this, t] { serve(t); }).detach();
    others_ = threads - 1;
  }

  void run(const std::function<void(int)>& job) {
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      job_ = &job;
      left_ = others_;
      ++turn_;
    }
    start_.notify_all();
    job(0);
    std::unique_lock<std::mutex> hold(mutex_);
    done_.wait(hold, [this] { return left_ == 0; });
  }

 private:
  void serve(int thread) {
    for (uint64_t seen = 0;;) {
      const std::function<void(int)>* job;
      {
        std::unique_lock<std::mutex> hold(mutex_);
        start_.wait(hold, [&] { return turn_ != seen; });
        seen = turn_;
        job = job_;
      }
      (*job)(thread);
      const std::lock_guard<std::mutex> hold(mutex_);
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int)>* job_ = nullptr;
  uint64_t turn_ = 0;
  int left_ = 0, others_ = 0;
};

Pool& pool(int threads) {
  static std::vector<Pool*> pools;
  if (static_cast<int>(pools.size()) <= threads) pools.resize(threads + 1);
  if (!pools[threads]) pools[threads] = new Pool(threads);
  return *pools[threads];
}

enum Ahead { kNothing, kBeginnings, kRows, kRowsTwice };  // what is prefetched

template <int kLines, Ahead kAhead>
uint32_t read(const char* table, const int32_t* index, int64_t begin, int64_t end, int64_t n) {
  constexpr int64_t kRow = 64 * kLines;
  Line sum[kLines] = {};
  for (int64_t j = begin; j < end; ++j) {
    const auto at = [&](int64_t ahead) {
      return table + static_cast<int64_t>(index[j + ahead < n ? j + ahead : j]) * kRow;
    };
    if constexpr (kAhead == kBeginnings) __builtin_prefetch(at(24));
    if constexpr (kAhead == kRows || kAhead == kRowsTwice) {
      for (int v = 0; v < kLines; ++v) __builtin_prefetch(at(16) + 64 * v);
    }
    if constexpr (kAhead == kRowsTwice) {
      for (int v = 0; v < kLines; ++v) __builtin_prefetch(at(48) + 64 * v, 0, 2);
    }
    const Line* row = reinterpret_cast<const Line*>(table + static_cast<int64_t>(index[j]) * kRow);
    for (int v = 0; v < kLines; ++v) sum[v] += row[v];
  }
  uint32_t total = 0;
  for (int v = 0; v < kLines; ++v) total += sum[v][0] + sum[v][15];
  return total;
}

template <int kLines>
uint32_t read_by(int ahead, const char* table, const int32_t* index, int64_t begin, int64_t end, int64_t n) {
  switch (ahead) {
    case kNothing:
      return read<kLines, kNothing>(table, index, begin, end, n);
    case kBeginnings:
      return read<kLines, kBeginnings>(table, index, begin, end, n);
    case kRows:
      return read<kLines, kRows>(table, index, begin, end, n);
    default:
      return read<kLines, kRowsTwice>(table, index, begin, end, n);
  }
}

volatile uint32_t kept;  // so that nothing is left out

}  // namespace

// Reads rows index[0 .. n) of `lines` lines of 64 bytes each (2, 4).
extern "C" void floor_read(const char* table, const int32_t* index, int64_t n, int lines, int ahead, int threads) {
  constexpr int64_t kPieces = 64;  // whoever is free takes the next, as in the ops
  std::vector<uint32_t> totals(16 * threads);
  std::atomic<int64_t> next{0};
  pool(threads).run([&](int t) {
    for (int64_t p; (p = next.fetch_add(1)) < kPieces;) {
      const int64_t begin = n * p / kPieces, end = n * (p + 1) / kPieces;
      totals[16 * t] +=
          lines == 2 ? read_by<2>(ahead, table, index, begin, end, n) : read_by<4>(ahead, table, index, begin, end, n);
    }
  });
  kept = totals[0];
}

// Reads and writes three tables of n floats, as a step of AdamW does.
extern "C" void floor_step(float* weight, float* first, float* second, int64_t n, int threads) {
  pool(threads).run([&](int t) {
    for (int64_t i = n * t / threads, end = n * (t + 1) / threads; i < end; ++i) {
      first[i] = 0.9f * first[i];
      second[i] = 0.999f * second[i];
      weight[i] -= 1e-9f * first[i] * second[i];
    }
  });
}
