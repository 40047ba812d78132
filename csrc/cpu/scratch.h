// Memory of a thread's own, for what it has in hand.
#pragma once
#include <atomic>
#include <memory>
#include <new>

#include "check.h"

namespace mmkd {

// Scratch of a thread's, from the beginning of a cache line on; without memory its work is left out and the op raises
// when all threads are back, for nothing may be thrown in one of them.
class Scratch {
 public:
  Scratch(int64_t bytes, std::atomic<bool>& failed)
      : at_(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kLine, std::nothrow))) {
    if (!at_) failed.store(true);
  }
  explicit operator bool() const { return at_ != nullptr; }
  char* get() const { return at_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<char, Free> at_;
};

inline void check_memory(const std::atomic<bool>& failed, const char* op) {
  MMKD_CHECK(!failed.load(), op, ": out of memory for the scratch of a chunk of rows");
}

}  // namespace mmkd
