#include "cuda/device.cuh"
#include "cuda/topk_kernel.h"

namespace mmkd::cuda {
namespace {

// A block scores 64 users against all items of a range, 32 * J at a time: 8 warps of 8 users, a lane has J items.
constexpr int kBlock = 256, kWarps = kBlock / kWarp, kEach = 8, kUsers = kWarps * kEach;
constexpr int kDepth = 16;  // columns of the tables in shared memory at a time
constexpr int64_t kListBytes = 30 * 1024;
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

// tile[c][r] = row r of the table, column c0 + c, zero outside. row_of(r): the table's row, or -1.
template <class T, int V, int Rows, int Stride, class RowOf>
__device__ __forceinline__ void load_tile(const T* table, int64_t d, int64_t c0, Acc<T>* tile, RowOf row_of) {
  constexpr int kPacks = kDepth / V;
  for (int p = threadIdx.x; p < Rows * kPacks; p += kBlock) {
    const int r = p / kPacks, c = p % kPacks * V;
    const int64_t row = row_of(r);
    const Pack<T, V> x = row >= 0 && c0 + c < d ? load<V>(table + row * d + c0 + c) : zeros<V, T>();
#pragma unroll
    for (int v = 0; v < V; ++v) tile[(c + v) * Stride + r] = widen(x.at[v]);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kBlock, 2) topk_kernel(TopkArgs a, bool on_chip) {
  using A = Acc<T>;
  constexpr int J = kItemsPerLane<A>, kItems = kWarp * J, kItemStride = kItems + 4, kUserStride = kUsers + 8;
  MMKD_SHARED(A, item_tile, kDepth * kItemStride);
  MMKD_SHARED(A, user_tile, kDepth * kUserStride);
  MMKD_DYNAMIC_SHARED(A, lists);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_user = static_cast<int64_t>(blockIdx.x) * kUsers;
  const int64_t range = (a.num_items + a.splits - 1) / a.splits;
  const int64_t begin = blockIdx.y * range, end = begin + range < a.num_items ? begin + range : a.num_items;
  const auto user_at = [&](int64_t r) -> int64_t {
    const int64_t i = first_user + r;
    return i >= a.n ? -1 : a.users ? checked(a.users[i], a.num_users) : i;
  };
  // The list of my warp's u-th user.
  const auto scores_of = [&](int u) {
    const int64_t r = warp * kEach + u;
    return on_chip ? lists + r * a.k
                   : static_cast<A*>(a.list_scores) + ((first_user + r) * a.splits + blockIdx.y) * a.k;
  };
  const auto ids_of = [&](int u) {
    const int64_t r = warp * kEach + u;
    return on_chip ? reinterpret_cast<int32_t*>(lists + kUsers * a.k) + r * a.k
                   : a.list_ids + ((first_user + r) * a.splits + blockIdx.y) * a.k;
  };
  const int live = first_user + warp * kEach >= a.n ? 0
                   : first_user + (warp + 1) * kEach <= a.n
                       ? kEach
                       : static_cast<int>(a.n - first_user - warp * kEach);  // users of my warp
  for (int u = 0; u < live; ++u) {
    for (int64_t i = lane; i < a.k; i += kWarp) {
      scores_of(u)[i] = -INFINITY;
      ids_of(u)[i] = -1;
    }
  }
  __syncwarp();

  for (int64_t i0 = begin; i0 < end; i0 += kItems) {
    A sum[kEach][J] = {};
    for (int64_t c0 = 0; c0 < a.d; c0 += kDepth) {
      __syncthreads();
      load_tile<T, V, kItems, kItemStride>(static_cast<const T*>(a.item_emb), a.d, c0, item_tile,
                                           [&](int r) { return i0 + r < end ? i0 + r : int64_t{-1}; });
      load_tile<T, V, kUsers, kUserStride>(static_cast<const T*>(a.user_emb), a.d, c0, user_tile, user_at);
      __syncthreads();
#pragma unroll
      for (int c = 0; c < kDepth; ++c) {
        const Pack<A, J> items = load<J>(item_tile + c * kItemStride + lane * J);
        const Pack<A, kEach> users = load<kEach>(user_tile + c * kUserStride + warp * kEach);
#pragma unroll
        for (int u = 0; u < kEach; ++u) {
#pragma unroll
          for (int j = 0; j < J; ++j) sum[u][j] += users.at[u] * items.at[j];
        }
      }
    }
    // Which of my warp's users have an item here that may belong in their list: rarely any, once the lists are full.
    unsigned waiting = 0;
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      if (u >= live) continue;
      const A worst = scores_of(u)[a.k - 1];
      bool any = false;
#pragma unroll
      for (int j = 0; j < J; ++j) any = any || (sum[u][j] >= worst && i0 + lane * J + j < end);
      waiting |= __ballot_sync(kFull, any) ? 1u << u : 0u;
    }
#pragma unroll 1
    for (; waiting; waiting &= waiting - 1) {
      const int u = __ffs(static_cast<int>(waiting)) - 1;
      const int64_t user = user_at(warp * kEach + u);
      A* scores = scores_of(u);
      int32_t* ids = ids_of(u);
#pragma unroll 1
      for (int j = 0; j < J; ++j) {
        const int64_t mine = i0 + lane * J + j;
        A score = 0;
#pragma unroll
        for (int s = 0; s < kEach * J; ++s) score = s == u * J + j ? sum[s / J][s % J] : score;
        unsigned wanted = __ballot_sync(kFull, mine < end && better<A>(score, mine, scores[a.k - 1], ids[a.k - 1]));
#pragma unroll 1
        for (; wanted; wanted &= wanted - 1) {
          const int from = __ffs(static_cast<int>(wanted)) - 1;
          const A best = __shfl_sync(kFull, score, from);
          const int32_t id = static_cast<int32_t>(i0 + from * J + j);
          if (!better<A>(best, id, scores[a.k - 1], ids[a.k - 1])) continue;  // the list has moved on
          if (!excluded(a, user, id, lane)) insert(scores, ids, a.k, best, id, lane);
        }
      }
    }
  }

  if (!on_chip) return;
  for (int u = 0; u < live; ++u) {
    const int64_t at = ((first_user + warp * kEach + u) * a.splits + blockIdx.y) * a.k;
    for (int64_t i = lane; i < a.k; i += kWarp) {
      static_cast<A*>(a.list_scores)[at + i] = scores_of(u)[i];
      a.list_ids[at + i] = ids_of(u)[i];
    }
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
  const bool on_chip = list_bytes <= kListBytes;
  dispatch(a.dtype, a.wide, [&](auto tag) {
    using T = typename decltype(tag)::T;
    launch("topk", topk_kernel<T, decltype(tag)::V>,
           Grid{ceil_div(a.n, kUsers), kBlock, stream, on_chip ? list_bytes : 0, a.splits}, a, on_chip);
  });
  const Grid merge{a.n, kMergeBlock, stream};
  if (a.dtype == DType::f64) {
    launch("topk merge", merge_kernel<double>, merge, a);
  } else {
    launch("topk merge", merge_kernel<float>, merge, a);
  }
}

}  // namespace mmkd::cuda
