// Threads and dtype dispatch for the CPU ops; everything runs in torch's own thread pool.
#pragma once
#include <atomic>

#include "check.h"
#include "cpu/blocks.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/processor.h"

namespace mmkd {

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      return DType::f16;
  }
}

// Runs f(chunk) for chunk in [0, chunks). Threads take the next free chunk, so a slow one holds nobody up; what a
// chunk computes must not depend on who takes it. f must not throw: an exception may not cross torch's C interface.
// `small`: the whole is not worth waking a thread for.
template <class F>
inline void for_chunks(int64_t chunks, const F& f, bool small = false) {
  const int64_t threads = small ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), chunks);
  if (threads <= 1) {
    for (int64_t c = 0; c < chunks; ++c) f(c);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) f(c);
    }
  });
}

// The same with f(chunk, next): `next` is what the thread takes after it, so that f can ask for its memory meanwhile;
// `chunks` where that is open: the last ones, one for each thread, go to whoever is free.
template <class F>
inline void for_chunks_ahead(int64_t chunks, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), chunks);
  std::atomic<int64_t> next{0};
  const auto take = [&] { return std::min(chunks, next.fetch_add(1, std::memory_order_relaxed)); };
  for_chunks(threads, [&](int64_t) {
    for (int64_t c = take(); c < chunks;) {
      const bool many = next.load(std::memory_order_relaxed) + threads <= chunks;
      const int64_t after = many ? take() : chunks;
      f(c, after);
      c = many ? after : take();
    }
  });
}

// Whether a table is to be written past the caches, so that its lines are not read first and push nothing out: from
// `share` of the last-level cache on, which the caller takes to be more than is kept until the table is read.
inline bool past_caches(const void* at, int64_t rows, int64_t row_bytes, double share) {
  return row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(at) % 64 == 0 &&
         static_cast<double>(rows * row_bytes) >= share * static_cast<double>(last_level_cache());
}

// Runs f(begin, end) over [0, n) in pieces of at least `grain`.
template <class F>
inline void for_range(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t pieces =
      std::max<int64_t>(1, std::min<int64_t>((n + grain - 1) / grain, 8 * torch::stable::get_num_threads()));
  for_chunks(pieces, [&](int64_t p) { f(n * p / pieces, n * (p + 1) / pieces); });
}

}  // namespace mmkd
