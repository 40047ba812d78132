// Argument checks of the host module. A message names the argument, what was expected, what came.
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace mmkd::host {

// Raises ValueError in Python.
template <class... Args>
[[noreturn]] inline void refuse(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  throw std::invalid_argument(out.str());
}

inline void check_ids(const char* name, const int64_t* ids, int64_t n, int64_t bound) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(bound);
  for (int64_t i = 0; bad && i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= bound) refuse(name, ": entry ", i, " is ", ids[i], ", expected [0, ", bound, ")");
  }
}

}  // namespace mmkd::host
