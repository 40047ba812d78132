// What differs between processors of one instruction set: how far to prefetch, and what stays in the caches. It decides
// times only: results have the same bits. A variable with another value than is said here raises std::runtime_error, so
// these are not to be asked first in a thread.
#pragma once
#include <cstdint>

namespace mmkd {

// Whether gathers prefetch rows whole, and into the second-level cache as well. On AMD's Zen such a prefetch leaves the
// slots of the first level free and products are 1.1 to 1.5 times faster; on Intel's it takes one and they are 1.1 to
// 1.2 times slower. There the beginning of a row is enough: the processor fetches what lies beside it by itself.
// MMKD_FAR_PREFETCH (0 or 1) overrides.
bool prefetches_far();

// Bytes of the last-level cache, as far as the processor says so, and never less than what the thresholds of
// `past_caches` were found with: 32 MB. MMKD_CACHE_MB overrides.
int64_t last_level_cache();

}  // namespace mmkd
