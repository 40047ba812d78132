// Parts of an op under names of their own in torch's profiler.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Not in every torch this library runs with; then profiles have the op as a whole.
extern "C" __attribute__((weak)) AOTITorchError aoti_record_function_start(const char*, IValueMapHandle,
                                                                           const C10IValueHandle*, const uint64_t,
                                                                           AtenRecordFunctionHandle*);
extern "C" __attribute__((weak)) AOTITorchError aoti_record_function_end(AtenRecordFunctionHandle);

namespace mmkd {

class Range {
 public:
  explicit Range(const char* name) {
    if (aoti_record_function_start && aoti_record_function_start(name, nullptr, nullptr, 0, &at_) != 0) at_ = nullptr;
  }
  ~Range() {
    if (at_) aoti_record_function_end(at_);
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  AtenRecordFunctionHandle at_ = nullptr;
};

}  // namespace mmkd
