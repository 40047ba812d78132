#include <float.h>

#include "cuda/device.cuh"
#include "cuda/topk_kernel.h"

namespace mmkd::cuda {
namespace {

// A block scores 64 users against all items of a range, 32 * J at a time: 8 warps of 8 users, a lane has J items.
constexpr int kBlock = 256, kWarps = kBlock / kWarp, kEach = 8, kUsers = kWarps * kEach;
constexpr int kDepth = 16;  // columns of the tables in shared memory at a time
constexpr int64_t kListBytes = 30 * 1024;
constexpr int64_t kFew = 128;  // the longest list that is merged; 93 KB of shared memory
constexpr int kMergeBlock = 128;

template <class A>
constexpr int kItemsPerLane = sizeof(A) == 4 ? 4 : 2;

template <class A>
__device__ __forceinline__ bool better(A score, int64_t id, A other, int64_t other_id) {
  return score > other || (score == other && id < other_id);  // false for NaN
}

// Puts an entry into a list of k, best first; all lanes of a warp call it with the same arguments.
template <class A>
__device__ __forceinline__ void insert(A* scores, int32_t* ids, int64_t k, A score, int32_t id, int lane) {
  int64_t at = 0;  // entries that stay before it
  for (int64_t base = 0; base < k; base += kWarp) {
    const bool before = base + lane < k && better<A>(scores[base + lane], ids[base + lane], score, id);
    at += __popc(__ballot_sync(kFull, before));
  }
  for (int64_t base = (k - 1) / kWarp * kWarp; base + kWarp > at && base >= 0; base -= kWarp) {
    const int64_t i = base + lane;
    const bool moves = i < k && i > at;
    const A moved = moves ? scores[i - 1] : A(0);
    const int32_t moved_id = moves ? ids[i - 1] : 0;
    __syncwarp();
    if (moves || i == at) {
      scores[i] = moves ? moved : score;
      ids[i] = moves ? moved_id : id;
    }
    __syncwarp();
  }
}

__device__ __forceinline__ bool excluded(const TopkArgs& a, int64_t user, int32_t item, int lane) {
  if (!a.rowptr) return false;
  const int64_t end = a.rowptr[user + 1];
  for (int64_t base = a.rowptr[user]; base < end; base += kWarp) {
    bool here = false;
    if (base + lane < end) {
      here = (a.col64 ? static_cast<const int64_t*>(a.col)[base + lane]
                      : static_cast<int64_t>(static_cast<const int32_t*>(a.col)[base + lane])) == item;
    }
    if (__ballot_sync(kFull, here)) return true;
  }
  return false;
}

// A piece of a table, Rows x kDepth elements: read early, put into shared memory when the piece before it is done with.
template <class T, int V, int Rows, int Stride>
struct Piece {
  static constexpr int kPacks = kDepth / V, kCount = (Rows * kPacks + kBlock - 1) / kBlock;
  Pack<T, V> at[kCount];

  // row_of(n, r): the table's row for the n-th that I read, the r-th of the piece; -1 for zeros.
  template <class RowOf>
  __device__ __forceinline__ void fetch(const T* table, int64_t d, int64_t c0, RowOf row_of) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int p = static_cast<int>(threadIdx.x) + n * kBlock, r = p / kPacks;
      const int64_t c = c0 + p % kPacks * V, row = r < Rows ? row_of(n, r) : -1;
      at[n] = row >= 0 && c < d ? load<V>(table + row * d + c) : zeros<V, T>();
    }
  }
  // tile[c][r]
  __device__ __forceinline__ void put(Acc<T>* tile) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int p = static_cast<int>(threadIdx.x) + n * kBlock, r = p / kPacks, c = p % kPacks * V;
      if (r >= Rows) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) tile[(c + v) * Stride + r] = widen(at[n].at[v]);
    }
  }
};

// What the warps of a block share of a launch.
struct Place {
  int64_t first_user, end;  // end: of the block's items
  int warp, lane, live;     // live: users of my warp

  __device__ __forceinline__ int64_t user_at(const TopkArgs& a, int64_t r) const {
    const int64_t i = first_user + r;
    return i >= a.n ? -1 : a.users ? checked(a.users[i], a.num_users) : i;
  }
  // Where the list of my warp's u-th user begins in list_scores and list_ids.
  __device__ __forceinline__ int64_t list_at(const TopkArgs& a, int u) const {
    return ((first_user + warp * kEach + u) * a.splits + blockIdx.y) * a.k;
  }
};

// Sorted lists, an entry put in its place at once. For longer lists, and for float64.
template <class A, int J>
struct Lists {
  const TopkArgs& a;
  const Place& at;
  A* lists;  // null: the lists are kept in list_scores and list_ids

  __device__ __forceinline__ A* scores_of(int u) const {
    return lists ? lists + (at.warp * kEach + u) * a.k : static_cast<A*>(a.list_scores) + at.list_at(a, u);
  }
  __device__ __forceinline__ int32_t* ids_of(int u) const {
    return lists ? reinterpret_cast<int32_t*>(lists + kUsers * a.k) + (at.warp * kEach + u) * a.k
                 : a.list_ids + at.list_at(a, u);
  }
  __device__ __forceinline__ void clear() {
    for (int u = 0; u < at.live; ++u) {
      for (int64_t i = at.lane; i < a.k; i += kWarp) {
        scores_of(u)[i] = -INFINITY;
        ids_of(u)[i] = -1;
      }
    }
    __syncwarp();
  }
  // Items i0 + lane * J + j.
  __device__ __forceinline__ void take(const A (&sum)[kEach][J], int64_t i0) {
    // Which of my warp's users have an item here that may belong in their list: rarely any, once the lists are full.
    unsigned waiting = 0;
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      if (u >= at.live) continue;
      const A worst = scores_of(u)[a.k - 1];
      bool any = false;
#pragma unroll
      for (int j = 0; j < J; ++j) any = any || (sum[u][j] >= worst && i0 + at.lane * J + j < at.end);
      waiting |= __ballot_sync(kFull, any) ? 1u << u : 0u;
    }
#pragma unroll 1
    for (; waiting; waiting &= waiting - 1) {
      const int u = __ffs(static_cast<int>(waiting)) - 1;
      const int64_t user = at.user_at(a, at.warp * kEach + u);
      A* scores = scores_of(u);
      int32_t* ids = ids_of(u);
#pragma unroll 1
      for (int j = 0; j < J; ++j) {
        const int64_t mine = i0 + at.lane * J + j;
        A score = 0;
#pragma unroll
        for (int s = 0; s < kEach * J; ++s) score = s == u * J + j ? sum[s / J][s % J] : score;
        unsigned wanted = __ballot_sync(kFull, mine < at.end && better<A>(score, mine, scores[a.k - 1], ids[a.k - 1]));
#pragma unroll 1
        for (; wanted; wanted &= wanted - 1) {
          const int from = __ffs(static_cast<int>(wanted)) - 1;
          const A best = __shfl_sync(kFull, score, from);
          const int32_t id = static_cast<int32_t>(i0 + from * J + j);
          if (!better<A>(best, id, scores[a.k - 1], ids[a.k - 1])) continue;  // the list has moved on
          if (!excluded(a, user, id, at.lane)) insert(scores, ids, a.k, best, id, at.lane);
        }
      }
    }
  }
  __device__ __forceinline__ void finish() {
    if (!lists) return;
    for (int u = 0; u < at.live; ++u) {
      for (int64_t i = at.lane; i < a.k; i += kWarp) {
        static_cast<A*>(a.list_scores)[at.list_at(a, u) + i] = scores_of(u)[i];
        a.list_ids[at.list_at(a, u) + i] = ids_of(u)[i];
      }
    }
  }
};

// Score and id in one number, larger is better: the higher score, then the lower id. 0: none.
__device__ __forceinline__ uint64_t key_of(float score, uint32_t id) {
  const uint32_t bits = __float_as_uint(score == 0 ? 0.0f : score);  // -0 ties with 0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - id);
}
__device__ __forceinline__ float score_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int32_t id_of(uint64_t key) {
  return key ? static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)) : -1;
}

// Lanes compare with those `step` away: the larger key goes to the lower lane if `down`.
__device__ __forceinline__ uint64_t exchange(uint64_t key, int step, bool down, int lane) {
  const uint64_t other = __shfl_xor_sync(kFull, key, step);
  return (key > other) == (((lane & step) == 0) == down) ? key : other;
}
// A warp's keys that rise and then fall, or the like, best first.
__device__ __forceinline__ uint64_t merge_keys(uint64_t key, int lane) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) key = exchange(key, step, true, lane);
  return key;
}
__device__ __forceinline__ uint64_t sort_keys(uint64_t key, int lane) {
#pragma unroll
  for (int size = 2; size <= kWarp; size *= 2) {
#pragma unroll
    for (int step = size / 2; step > 0; step /= 2) key = exchange(key, step, (lane & size) == 0, lane);
  }
  return key;
}

// Lists of at most kFew keys. What may belong in one waits, unsorted, until 32 are there; then they are sorted and
// merged, a key a lane.
template <int J>
struct Waiting {
  const TopkArgs& a;
  const Place& at;
  uint64_t* lists;  // [kUsers, k], then [kUsers, 32] that wait
  // Of user u, in lane u: how many wait, and the k-th best score so far.
  int count = 0;
  float worst = -FLT_MAX;

  __device__ __forceinline__ uint64_t* list(int u) const { return lists + (at.warp * kEach + u) * a.k; }
  __device__ __forceinline__ uint64_t* waiting(int u) const {
    return lists + kUsers * a.k + (at.warp * kEach + u) * kWarp;
  }
  __device__ __forceinline__ void clear() {
    for (int u = 0; u < at.live; ++u) {
      for (int64_t i = at.lane; i < a.k; i += kWarp) list(u)[i] = 0;
    }
    __syncwarp();
  }
  // The key of my lane, or 0 if its item is never to be returned to the user.
  __device__ __forceinline__ uint64_t without_excluded(uint64_t key, int u) const {
    if (!a.rowptr) return key;
    const int64_t user = at.user_at(a, at.warp * kEach + u), end = a.rowptr[user + 1];
    const int32_t id = id_of(key);
    for (int64_t base = a.rowptr[user]; base < end; base += kWarp) {
      const int64_t e = base + at.lane;
      const int64_t item = e >= end  ? -1
                           : a.col64 ? static_cast<const int64_t*>(a.col)[e]
                                     : static_cast<int64_t>(static_cast<const int32_t*>(a.col)[e]);
      const int in_range = item >= 0 && item < a.num_items ? static_cast<int>(item) : -2;
      const int many = end - base < kWarp ? static_cast<int>(end - base) : kWarp;
      for (int q = 0; q < many; ++q) {
        if (__shfl_sync(kFull, in_range, q) == id) key = 0;
      }
    }
    return key;
  }
  // Puts what waits for user u into its list.
  __device__ __forceinline__ void merge(int u) {
    const int n = __shfl_sync(kFull, count, u);
    uint64_t key = at.lane < n ? waiting(u)[at.lane] : 0;
    key = sort_keys(without_excluded(key, u), at.lane);
    const int k = static_cast<int>(a.k), lane = at.lane;
    uint64_t* kept = list(u);
    // 32 entries of the list at a time, the last first: the better half goes up, the rest is where it stays.
#pragma unroll 1
    for (int i = (k - 1) / kWarp * kWarp + lane; i >= 0; i -= kWarp) {
      const uint64_t here = i < k ? kept[i] : 0, mirrored = __shfl_sync(kFull, key, kWarp - 1 - lane);
      key = merge_keys(here > mirrored ? here : mirrored, lane);
      const uint64_t rest = merge_keys(here > mirrored ? mirrored : here, lane);
      if (i + kWarp < k) kept[i + kWarp] = rest;
    }
    if (lane < k) kept[lane] = key;
    __syncwarp();
    const uint64_t last = kept[k - 1];
    if (lane == u) {
      count = 0;
      worst = last ? score_of(last) : -FLT_MAX;
    }
  }
  // Items i0 + lane * J + j.
  __device__ __forceinline__ void take(const float (&sum)[kEach][J], int64_t i0) {
    unsigned todo = (1u << at.live) - 1;
    int from = 0;  // of user u, in lane u: the first j that has not been taken
#pragma unroll 1
    while (todo) {
      unsigned full = 0;
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        if (!(todo >> u & 1)) continue;
        const float bar = __shfl_sync(kFull, worst, u);  // -FLT_MAX keeps -inf and NaN out
        bool any = false;
#pragma unroll
        for (int j = 0; j < J; ++j) any = any || sum[u][j] >= bar;
        if (!__ballot_sync(kFull, any)) continue;
        const int first = __shfl_sync(kFull, from, u);
        int n = __shfl_sync(kFull, count, u), next = J;
#pragma unroll
        for (int j = 0; j < J; ++j) {
          const int64_t mine = i0 + at.lane * J + j;
          const bool wanted = j >= first && next == J && sum[u][j] >= bar && mine < at.end;
          const unsigned all = __ballot_sync(kFull, wanted);
          const int more = __popc(all);
          if (n + more > kWarp) {
            next = j;
          } else if (more) {
            if (wanted) {
              waiting(u)[n + __popc(all & ((1u << at.lane) - 1))] = key_of(sum[u][j], static_cast<uint32_t>(mine));
            }
            n += more;
          }
        }
        if (next < J) full |= 1u << u;
        if (at.lane == u) {
          count = n;
          from = next;
        }
      }
      __syncwarp();
      todo = full;
#pragma unroll 1
      for (; full; full &= full - 1) merge(__ffs(static_cast<int>(full)) - 1);
    }
  }
  __device__ __forceinline__ void finish() {
    for (int u = 0; u < at.live; ++u) {
      merge(u);
      for (int64_t i = at.lane; i < a.k; i += kWarp) {
        const uint64_t key = list(u)[i];
        static_cast<float*>(a.list_scores)[at.list_at(a, u) + i] = key ? score_of(key) : -INFINITY;
        a.list_ids[at.list_at(a, u) + i] = id_of(key);
      }
    }
  }
};

// Few: lists of at most kFew scores in float32.
template <class T, int V, bool Few>
__global__ void __launch_bounds__(kBlock, 2) topk_kernel(TopkArgs a, bool on_chip) {
  using A = Acc<T>;
  constexpr int J = kItemsPerLane<A>, kItems = kWarp * J, kItemStride = kItems + 4, kUserStride = kUsers + 8;
  MMKD_SHARED(A, item_tile, kDepth * kItemStride);
  MMKD_SHARED(A, user_tile, kDepth * kUserStride);
  MMKD_DYNAMIC_SHARED(A, dynamic);
  const int64_t range = (a.num_items + a.splits - 1) / a.splits, begin = blockIdx.y * range;
  Place at;
  at.warp = threadIdx.x / kWarp;
  at.lane = threadIdx.x % kWarp;
  at.first_user = static_cast<int64_t>(blockIdx.x) * kUsers;
  at.end = begin + range < a.num_items ? begin + range : a.num_items;
  const int64_t left = a.n - at.first_user - at.warp * kEach;
  at.live = left <= 0 ? 0 : left < kEach ? static_cast<int>(left) : kEach;

  Piece<T, V, kItems, kItemStride> items;
  Piece<T, V, kUsers, kUserStride> users;
  int64_t user_row[decltype(users)::kCount];  // of the rows I read
#pragma unroll
  for (int n = 0; n < decltype(users)::kCount; ++n) {
    const int r = (static_cast<int>(threadIdx.x) + n * kBlock) / decltype(users)::kPacks;
    user_row[n] = r < kUsers ? at.user_at(a, r) : -1;
  }
  const auto fetch = [&](int64_t i0, int64_t c0) {
    items.fetch(static_cast<const T*>(a.item_emb), a.d, c0,
                [&](int, int r) { return i0 + r < at.end ? i0 + r : int64_t{-1}; });
    users.fetch(static_cast<const T*>(a.user_emb), a.d, c0, [&](int n, int) { return user_row[n]; });
  };

  const auto scan = [&](auto& best) {
    best.clear();
    if (begin < at.end) fetch(begin, 0);
    for (int64_t i0 = begin; i0 < at.end; i0 += kItems) {
      A sum[kEach][J] = {};
      for (int64_t c0 = 0; c0 < a.d; c0 += kDepth) {
        __syncthreads();
        items.put(item_tile);
        users.put(user_tile);
        __syncthreads();
        // The next piece is on its way while this one is multiplied.
        if (c0 + kDepth < a.d) {
          fetch(i0, c0 + kDepth);
        } else if (i0 + kItems < at.end) {
          fetch(i0 + kItems, 0);
        }
#pragma unroll
        for (int c = 0; c < kDepth; ++c) {
          const Pack<A, J> item = load<J>(item_tile + c * kItemStride + at.lane * J);
          const Pack<A, kEach> user = load<kEach>(user_tile + c * kUserStride + at.warp * kEach);
#pragma unroll
          for (int u = 0; u < kEach; ++u) {
#pragma unroll
            for (int j = 0; j < J; ++j) sum[u][j] += user.at[u] * item.at[j];
          }
        }
      }
      best.take(sum, i0);
    }
    best.finish();
  };
  if constexpr (Few) {
    Waiting<J> best{a, at, reinterpret_cast<uint64_t*>(dynamic)};
    scan(best);
  } else {
    Lists<A, J> best{a, at, on_chip ? dynamic : nullptr};
    scan(best);
  }
}

// A block per user. An entry's place is the number of entries before it over all lists, each of which is sorted.
template <class A>
__global__ void __launch_bounds__(kMergeBlock) merge_kernel(TopkArgs a) {
  const int64_t i = blockIdx.x;
  const A* scores = static_cast<const A*>(a.list_scores) + i * a.splits * a.k;
  const int32_t* ids = a.list_ids + i * a.splits * a.k;
  A* out = static_cast<A*>(a.scores) + i * a.k;
  for (int64_t e = threadIdx.x; e < a.k; e += kMergeBlock) {
    out[e] = -INFINITY;
    a.ids[i * a.k + e] = -1;
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < a.splits * a.k; e += kMergeBlock) {
    const A score = scores[e];
    const int32_t id = ids[e];
    if (id < 0) continue;
    int64_t place = 0;
    for (int64_t s = 0; s < a.splits && place < a.k; ++s) {
      int64_t lo = 0, hi = a.k;  // entries of list s that come before mine
      while (lo < hi) {
        const int64_t mid = (lo + hi) / 2;
        if (ids[s * a.k + mid] >= 0 && better<A>(scores[s * a.k + mid], ids[s * a.k + mid], score, id)) {
          lo = mid + 1;
        } else {
          hi = mid;
        }
      }
      place += lo;
    }
    if (place < a.k) {
      out[place] = score;
      a.ids[i * a.k + place] = id;
    }
  }
}

}  // namespace

int64_t topk_splits(int64_t n, int64_t num_items, int64_t k) {
  const int64_t tiles = ceil_div(n > 0 ? n : 1, kUsers), most = num_items / (4 * (k > 128 ? k : 128));
  const int64_t wanted = ceil_div(512, tiles);
  return wanted < most ? wanted : most > 1 ? most : 1;
}

void topk(const TopkArgs& a, void* stream) {
  const int64_t list_bytes = kUsers * a.k * (a.dtype == DType::f64 ? 12 : 8);
  const bool few = a.k <= kFew && a.dtype != DType::f64, on_chip = list_bytes <= kListBytes;
  const int64_t shared = few ? kUsers * (a.k + kWarp) * 8 : on_chip ? list_bytes : 0;
  const Grid grid{ceil_div(a.n, kUsers), kBlock, stream, shared, a.splits, few ? kUsers * (kFew + kWarp) * 8 : 0};
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    constexpr int V = decltype(tag)::V;
    if constexpr (sizeof(T) < 8) {
      if (few) return launch("topk", topk_kernel<T, V, true>, grid, a, on_chip);
    }
    launch("topk", topk_kernel<T, V, false>, grid, a, on_chip);
  });
  const Grid merge{a.n, kMergeBlock, stream};
  if (a.dtype == DType::f64) {
    launch("topk merge", merge_kernel<double>, merge, a);
  } else {
    launch("topk merge", merge_kernel<float>, merge, a);
  }
}

}  // namespace mmkd::cuda
