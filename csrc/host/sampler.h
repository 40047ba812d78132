// Training batches as a pure function of (seed, epoch, step); the stream is the one mmkd/reference/sampling.py writes
// down.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "host/csr.h"
#include "host/sampler_kernel.h"

namespace mmkd::host {

// Where in the stream a batch stands.
struct Place {
  uint64_t seed;
  uint32_t epoch, step;
};

class Sampler {
 public:
  // Copies the matrix: nothing that happens to the arrays afterwards can reach it. Refuses a malformed or unsorted one,
  // one without entries, and a user who has every item. `rounds`: draws before the exact fallback.
  // `by_pair`: every interaction is equally likely; otherwise every user is, and then every one of his items.
  template <class Col>
  Sampler(const CsrView<Col>& train, int rounds, bool by_pair);

  // users [size], candidates [size, num_negatives + 1] with the positive first: the same for any number of threads.
  void batch(const Place& place, int64_t size, int64_t num_negatives, int64_t* users, int64_t* candidates,
             int threads) const;

 private:
  struct Free {
    void operator()(uint32_t* p) const;
  };

  uint32_t num_items_;
  uint32_t rounds_;
  std::vector<UserRow> rows_;
  std::unique_ptr<uint32_t[], Free> item_;
};

}  // namespace mmkd::host
