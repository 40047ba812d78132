#include "simt/simt.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the callee's registers on this stack and goes on with another: 20 times faster than swapcontext, which makes
// two system calls for the signal mask.
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif

namespace simt {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kMaxThreads = 1024, kWarp = 32;

// A stack of its own, above a page that may not be touched.
class Fiber {
 public:
  Fiber() = default;
  void prepare(void (*entry)()) {
    if (!base_) {
      void* m =
          mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (m == MAP_FAILED) throw std::runtime_error("simt: no memory for a thread's stack");
      mprotect(m, 4096, PROT_NONE);
      base_ = static_cast<char*>(m) + 4096;
    }
    shadow_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(base_, kStack);  // a launch that failed left its frames behind
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(base_ + kStack) - 2;
    *top = reinterpret_cast<void*>(entry);  // where `ret` goes; above it a slot that keeps the stack aligned
    at_ = top - 6;
    for (int i = 0; i < 6; ++i) static_cast<void**>(at_)[i] = nullptr;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = base_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }
  // Leaves this fiber for another. `over`: this one never comes back.
  void go(Fiber& to, bool over = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(over ? nullptr : &shadow_, to.bottom(), to.size());
#endif
#if defined(__x86_64__)
    simt_switch(&at_, to.at_);
#else
    swapcontext(&context_, &to.context_);
#endif
    arrived();
  }
  // To be called first thing on a new stack; remembers where the launching thread's own stack is.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(shadow_, &bottom, &size);
    if (main && !main->bottom_) {
      main->bottom_ = bottom;
      main->size_ = size;
    }
#endif
  }
  static inline Fiber* main = nullptr;

 private:
  const void* bottom() const { return base_ ? base_ : bottom_; }
  size_t size() const { return base_ ? kStack : size_; }

  char* base_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* shadow_ = nullptr;
#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t context_{};
#endif
};

enum class State { ready, barrier, exchange, done };

struct Thread {
  int id = 0;
  State state = State::ready;
  Site site;
  Exchange kind = Exchange::sync;
  unsigned mask = 0, answer = 0;
  int lane = 0, bytes = 0;
  alignas(16) char value[16];
  Fiber fiber;
};

struct Free {
  void operator()(char* p) const { free(p); }
};
using Memory = std::unique_ptr<char[], Free>;

struct SharedArray {
  const void* key;
  int64_t bytes;
  Memory data;
};

Memory poisoned(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes)) throw std::runtime_error("simt: no memory for a shared array");
  Memory data(static_cast<char*>(p));
  memset(data.get(), 0xff, bytes);  // NaN in every floating-point type
  return data;
}

class Executor {
 public:
  void run(const char* name, const void* kernel, int64_t grid_x, int64_t grid_y, int block, int64_t shared_bytes,
           const std::function<void()>& body) {
    if (block < 1 || block > kMaxThreads || block % kWarp) {
      throw std::runtime_error("simt: blocks of 32 to 1024 threads, whole warps, got " + std::to_string(block));
    }
    std::lock_guard<std::mutex> one(mutex_);
    kernel_ = name;
    remember(kernel);
    body_ = &body;
    size_ = block;
    grid_ = {static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1};
    error_.clear();
    Fiber::main = &main_;
    main_ = Fiber();
    while (static_cast<int>(threads_.size()) < block) threads_.push_back(std::make_unique<Thread>());
    std::vector<int64_t> order(grid_x * grid_y);
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = static_cast<int64_t>(i);
      std::swap(order[i], order[below(i + 1)]);
    }
    ++launches_;
    for (int64_t b : order) {
      block_ = {static_cast<unsigned>(b % grid_x), static_cast<unsigned>(b / grid_x), 0};
      run_block(shared_bytes);
    }
  }

  void seed(uint64_t s) { random_ = s * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du; }
  Index thread() const { return {static_cast<unsigned>(now_->id), 0, 0}; }
  Index block() const { return block_; }
  Index grid() const { return grid_; }
  Index size() const { return {static_cast<unsigned>(size_), 1, 1}; }
  int64_t launches() const { return launches_; }

  [[noreturn]] void fail(const std::string& what, const Site& site) {
    error_ = std::string("simt: ") + kernel_ + ", block (" + std::to_string(block_.x) + ", " +
             std::to_string(block_.y) + "), thread " + std::to_string(now_->id) + ": " + what + " at " + where(site);
    now_->fiber.go(main_, true);
    __builtin_unreachable();
  }

  void barrier(const Site& site) {
    now_->state = State::barrier;
    now_->site = site;
    if (++waiting_ == size_) {
      for (int t = 0; t < size_; ++t) {
        if (!same(threads_[t]->site, site)) {
          fail("divergent barrier: thread " + std::to_string(t) + " waits at " + where(threads_[t]->site), site);
        }
      }
      waiting_ = 0;
      for (int t = 0; t < size_; ++t) make_ready(*threads_[t]);
    }
    next();
  }

  unsigned exchange(Exchange kind, unsigned mask, void* value, int bytes, int lane, const Site& site) {
    Thread& me = *now_;
    const int first = me.id / kWarp * kWarp;
    if (!(mask >> (me.id - first) & 1u)) fail("a lane calls a warp exchange that its mask leaves out", site);
    if (kind == Exchange::shuffle && !(mask >> (lane & 31) & 1u)) {
      fail("a shuffle reads lane " + std::to_string(lane) + ", which its mask leaves out", site);
    }
    me.kind = kind;
    me.mask = mask;
    me.site = site;
    me.lane = lane;
    me.bytes = bytes;
    if (bytes) memcpy(me.value, value, bytes);
    me.state = State::exchange;
    bool all = true;
    for (int l = 0; l < kWarp; ++l) {
      if (!(mask >> l & 1u)) continue;
      const Thread& t = *threads_[first + l];
      if (t.state == State::done) {
        fail("divergent warp exchange: lane " + std::to_string(l) + " of its mask has left the kernel", site);
      }
      if (t.state != State::exchange) {
        all = false;
      } else if (t.mask != mask || t.kind != kind || !same(t.site, site)) {
        if (t.mask >> (me.id - first) & 1u) {
          fail("divergent warp exchange: lane " + std::to_string(l) + " waits at " + where(t.site), site);
        }
        all = false;
      }
    }
    if (all) complete(first, mask, kind);
    next();
    if (kind == Exchange::shuffle) memcpy(value, me.value, bytes);
    return me.answer;
  }

  void maybe_switch() {
    if (below(2)) return;
    make_ready(*now_);
    next();
  }

  void* shared(const void* key, int64_t bytes) {
    for (SharedArray& a : shared_) {
      if (a.key == key && a.bytes == bytes) return a.data.get();
    }
    shared_.push_back({key, bytes, poisoned(bytes)});
    return shared_.back().data.get();
  }
  void* dynamic_shared() { return dynamic_.get(); }

 private:
  void remember(const void* kernel) {
    const char* path = getenv("MMKD_SIMT_LAUNCHED");
    Dl_info library;
    if (!path || !seen_.insert(kernel).second || !dladdr(kernel, &library)) return;
    FILE* file = fopen(path, "a");
    if (!file) throw std::runtime_error(std::string("simt: cannot write ") + path);
    fprintf(file, "%zx\n",
            static_cast<size_t>(static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase)));
    fclose(file);
  }

  static std::string where(const Site& s) {
    const std::string file = s.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(s.line());
  }
  static bool same(const Site& a, const Site& b) { return a.line() == b.line() && a.file_name() == b.file_name(); }

  uint64_t below(uint64_t n) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ % n;
  }

  void make_ready(Thread& t) {
    t.state = State::ready;
    ready_.push_back(t.id);
  }

  void complete(int first, unsigned mask, Exchange kind) {
    char values[kWarp][16];
    unsigned bits = 0;
    for (int l = 0; l < kWarp; ++l) {
      if (!(mask >> l & 1u)) continue;
      const Thread& t = *threads_[first + l];
      memcpy(values[l], t.value, sizeof t.value);
      int on = 0;
      if (kind == Exchange::ballot) memcpy(&on, t.value, sizeof on);
      bits |= on ? 1u << l : 0u;
    }
    for (int l = 0; l < kWarp; ++l) {
      if (!(mask >> l & 1u)) continue;
      Thread& t = *threads_[first + l];
      if (kind == Exchange::shuffle) memcpy(t.value, values[t.lane & 31], t.bytes);
      t.answer = bits;
      make_ready(t);
    }
  }

  // Goes on with a thread picked at random.
  void next(bool over = false) {
    Thread& from = *now_;
    if (ready_.empty()) {
      if (unfinished_ > 0) deadlock(from);
      from.fiber.go(main_, over);
      return;
    }
    const size_t i = below(ready_.size());
    Thread& to = *threads_[ready_[i]];
    ready_[i] = ready_.back();
    ready_.pop_back();
    if (&to == &from) return;
    now_ = &to;
    from.fiber.go(to.fiber, over);
  }

  [[noreturn]] void deadlock(Thread& from) {
    for (int t = 0; t < size_; ++t) {
      const Thread& waits = *threads_[t];
      if (waits.state == State::done) continue;
      const bool at_barrier = waits.state == State::barrier;
      error_ = std::string("simt: ") + kernel_ + ", block (" + std::to_string(block_.x) + ", " +
               std::to_string(block_.y) + "): divergent " + (at_barrier ? "barrier" : "warp exchange") + ": thread " +
               std::to_string(t) + " waits at " + where(waits.site) + ", and the others never come";
      break;
    }
    from.fiber.go(main_, true);
    __builtin_unreachable();
  }

  static void entry();

  void run_block(int64_t shared_bytes) {
    shared_.clear();
    dynamic_ = poisoned(shared_bytes);
    ready_.clear();
    waiting_ = 0;
    unfinished_ = size_;
    for (int t = 0; t < size_; ++t) {
      threads_[t]->id = t;
      threads_[t]->fiber.prepare(entry);
      make_ready(*threads_[t]);
    }
    const size_t i = below(ready_.size());
    now_ = threads_[ready_[i]].get();
    ready_[i] = ready_.back();
    ready_.pop_back();
    main_.go(now_->fiber);
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  std::mutex mutex_;
  std::set<const void*> seen_;
  const char* kernel_ = "";
  const std::function<void()>* body_ = nullptr;
  Index block_{}, grid_{};
  int size_ = 0, waiting_ = 0, unfinished_ = 0;
  uint64_t random_ = 0x2545f4914f6cdd1du;
  int64_t launches_ = 0;
  std::string error_;
  Thread* now_ = nullptr;
  Fiber main_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<int> ready_;
  std::vector<SharedArray> shared_;
  Memory dynamic_;
};

Executor& executor() {
  static Executor e;
  return e;
}

void Executor::entry() {
  Executor& e = executor();
  e.now_->fiber.arrived();
  (*e.body_)();
  e.now_->state = State::done;
  --e.unfinished_;
  e.next(true);
  __builtin_unreachable();
}

}  // namespace

Index thread_index() { return executor().thread(); }
Index block_index() { return executor().block(); }
Index block_size() { return executor().size(); }
Index grid_size() { return executor().grid(); }
int64_t launches() { return executor().launches(); }
void run(const char* name, const void* kernel, int64_t grid_x, int64_t grid_y, int block, int64_t shared_bytes,
         const std::function<void()>& body) {
  executor().run(name, kernel, grid_x, grid_y, block, shared_bytes, body);
}
void set_schedule(uint64_t seed) { executor().seed(seed); }
void fail(const std::string& what, const Site& site) { executor().fail(what, site); }
void barrier(const Site& site) { executor().barrier(site); }
void maybe_switch() { executor().maybe_switch(); }
void* shared(const void* key, int64_t bytes) { return executor().shared(key, bytes); }
void* dynamic_shared() { return executor().dynamic_shared(); }
unsigned exchange(Exchange kind, unsigned mask, void* value, int bytes, int lane, const Site& site) {
  return executor().exchange(kind, mask, value, bytes, lane, site);
}

}  // namespace simt
