#include "cpu/frozen_teacher_kernel.h"

#include "cpu/small_products.h"
#include "cpu/vmath.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

constexpr double kNormEps = 1e-12;  // as torch.nn.functional.normalize
constexpr int64_t kIdsAhead = 4;    // samples

// out = sum_l w[l] * table[index[l]], one row of `width` columns; `next` (or null): rows that come after.
template <int NV, class A>
MMKD_INLINE void weighted_tile(const A* w, const int64_t* index, int64_t n, const A* table, int64_t width, A* out,
                               int64_t c0) {
  using W = Vec<A>;
  typename W::V s[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) s[v] = typename W::V{};
  for (int64_t l = 0; l < n; ++l) {
    const A* row = table + index[l] * width + c0;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) s[v] += w[l] * W::load(row + v * W::size);
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) W::store(out + c0 + v * W::size, s[v]);
}

template <class A>
void weighted_rows(const A* w, const int64_t* index, int64_t n, const A* table, int64_t width, A* out) {
  constexpr int64_t lanes = Vec<A>::size;
  int64_t c = 0;
  for (; c + 4 * lanes <= width; c += 4 * lanes) weighted_tile<4>(w, index, n, table, width, out, c);
  for (; c + lanes <= width; c += lanes) weighted_tile<1>(w, index, n, table, width, out, c);
  for (; c < width; ++c) {
    A s = 0;
    for (int64_t l = 0; l < n; ++l) s += w[l] * table[index[l] * width + c];
    out[c] = s;
  }
}

// y += w x
template <class A>
MMKD_INLINE void add_scaled(A* y, A w, const A* x, int64_t d) {
  int64_t c = 0;
  for (; c + Vec<A>::size <= d; c += Vec<A>::size) Vec<A>::store(y + c, Vec<A>::load(y + c) + w * Vec<A>::load(x + c));
  for (; c < d; ++c) y[c] += w * x[c];
}

MMKD_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

template <class A>
struct Batch {
  const FrozenArgs& a;
  int64_t begin, n;

  const A* content(int64_t m) const { return static_cast<const A*>(a.content) + m * a.num_nodes * a.d; }
  const A* items(int64_t m) const { return content(m) + a.first_item * a.d; }
  const A* design() const { return static_cast<const A*>(a.design); }
  const A* item_design() const { return design() + a.first_item * a.e; }
  const A* state(int64_t m) const { return static_cast<const A*>(a.state) + m * a.e * a.d; }
  const A* state_t(int64_t m) const { return static_cast<const A*>(a.state_t) + m * a.d * a.ep; }
  const int64_t* asked(int part) const { return a.nodes + part * a.batch + begin; }
  const int64_t* list(int64_t i) const { return a.candidates + (begin + i) * a.list; }
  // part 0: users, 1: observed items, 2: negatives
  A* head(int64_t m, int part) const {
    return static_cast<A*>(a.heads) + ((m * 3 + part) * a.head_rows + begin - a.first_head) * a.d;
  }
  A* logits(int64_t m, int64_t i) const { return static_cast<A*>(a.logits) + (m * a.batch + begin + i) * a.list; }
  const A* grad_logits(int64_t m, int64_t i) const {
    return static_cast<const A*>(a.grad_logits) + (m * a.batch + begin + i) * a.list;
  }
  // omega / max(|F|, eps) of a head's row, and 1 / |F|^2 where the norm is what divides (else 0).
  void norms(int64_t m, const A* row, A& scale, A& inverse_square) const {
    const A square = dot(row, row, a.d), norm = Num<A>::sqrt(square), least = static_cast<A>(kNormEps);
    const A omega = static_cast<const A*>(a.omega)[m];
    scale = omega / (norm > least ? norm : least);
    inverse_square = norm > least ? 1 / square : A(0);
  }
  // E^T of the users, and of observed items less negatives: [n, d] each.
  void joint(A* users, A* difference) const {
    const A* ids = static_cast<const A*>(a.ids);
    A scale, unused;
    for (int64_t i = 0; i < n; ++i) {
      if (i + kIdsAhead < n) {
        for (int part = 0; part < 3; ++part) prefetch_row(ids + asked(part)[i + kIdsAhead] * a.d, a.d);
      }
      A *u = users + i * a.d, *v = difference + i * a.d;
      for (int64_t c = 0; c < a.d; ++c) {
        u[c] = ids[asked(0)[i] * a.d + c];
        v[c] = ids[asked(1)[i] * a.d + c] - ids[asked(2)[i] * a.d + c];
      }
      for (int64_t m = 0; m < a.modalities; ++m) {
        for (int part = 0; part < 3; ++part) {
          const A* row = head(m, part) + i * a.d;
          norms(m, row, scale, unused);
          add_scaled(part ? v : u, part == 2 ? -scale : scale, row, a.d);
        }
      }
    }
  }
  // Asks for the next `count` candidates' rows of all samples, for the second-level cache: `listed` of them have been.
  void list_ahead(int64_t count, int64_t& listed) const {
    const int64_t* item = list(0);
    for (const int64_t stop = least(listed + count, n * a.list); listed < stop; ++listed) {
      for (int64_t m = 0; m < a.modalities; ++m) prefetch_row<2>(items(m) + item[listed] * a.d, a.d);
      prefetch_row<2>(item_design() + item[listed] * a.e, a.e);
    }
  }
  void prefetch_lists(int64_t m, int64_t i) const {
    if (i >= n) return;
    for (int64_t l = 0; l < a.list; ++l) {
      prefetch_row(items(m) + list(i)[l] * a.d, a.d);
      if (m == 0) prefetch_row(item_design() + list(i)[l] * a.e, a.e);
    }
  }
};

// s[r] += x . table[index[r]], the whole vectors of the rows; what is left of them is returned in tail[r].
template <int R, class A>
MMKD_INLINE void add_products(const A* x, const A* table, int64_t width, const int64_t* index, typename Vec<A>::V* s,
                              A* tail) {
  using W = Vec<A>;
  const A* row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) row[r] = table + index[r] * width;
  int64_t c = 0;
  for (; c + W::size <= width; c += W::size) {
    const typename W::V v = W::load(x + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) s[r] += v * W::load(row[r] + c);
  }
  for (; c < width; ++c) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) tail[r] += x[c] * row[r][c];
  }
}

// out[l] = own . content[index[l]] + through . design[index[l]] of R candidates: independent sums hide each other's
// waits.
template <int R, class A>
MMKD_INLINE void logits_tile(const A* own, const A* through, const A* content, const A* design, int64_t d, int64_t e,
                             const int64_t* index, A* out) {
  typename Vec<A>::V s[R];
  A tail[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    s[r] = typename Vec<A>::V{};
    tail[r] = 0;
  }
  add_products<R>(own, content, d, index, s, tail);
  add_products<R>(through, design, e, index, s, tail);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) out[r] = lane_sum<A>(s[r]) + tail[r];
}

template <class A>
void logits_of(const A* own, const A* through, const A* content, const A* design, int64_t d, int64_t e,
               const int64_t* index, int64_t n, A* out) {
  int64_t l = 0;
  for (; l + 4 <= n; l += 4) logits_tile<4>(own, through, content, design, d, e, index + l, out + l);
  for (; l < n; ++l) logits_tile<1>(own, through, content, design, d, e, index + l, out + l);
}

template <class A>
void samples_typed(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch) {
  const Batch<A> b{a, begin, end - begin};
  A *users = static_cast<A*>(scratch), *difference = users + b.n * a.d, *through = difference + b.n * a.d;
  // Candidates' rows come from far away, and products wait for little: four a modality.
  const int64_t tiles = 4 * a.modalities * (b.n / kTile);
  int64_t listed = 0;
  const auto ahead = [&, each = b.n * a.list / (tiles + 1) + 1] { b.list_ahead(each, listed); };
  for (int64_t m = 0; m < a.modalities; ++m) {
    for (int part = 0; part < 3; ++part) {
      const Rows<A> start{b.content(m), a.d, b.asked(part)};
      product(Rows<A>{b.design(), a.e, b.asked(part)}, b.n, a.e, b.state(m), a.d, &start, b.head(m, part), a.d, a.d,
              ahead);
    }
    // G = F_u Z^T, [n, ep] of each modality
    product(Rows<A>{b.head(m, 0), a.d, nullptr}, b.n, a.d, b.state_t(m), a.ep, static_cast<const Rows<A>*>(nullptr),
            through + m * b.n * a.ep, a.ep, a.ep, ahead);
  }
  b.joint(users, difference);
  A* margin = static_cast<A*>(a.margin) + begin;
  for (int64_t i = 0; i < b.n; ++i) margin[i] = dot(users + i * a.d, difference + i * a.d, a.d);
  for (int64_t i = 0; i < b.n; ++i) {
    for (int64_t m = 0; m < a.modalities; ++m) {
      b.prefetch_lists(m, i + 1);
      logits_of(b.head(m, 0) + i * a.d, through + (m * b.n + i) * a.ep, b.items(m), b.item_design(), a.d, a.e,
                b.list(i), a.list, b.logits(m, i));
    }
  }
}

template <class A>
void targets_typed(const FrozenArgs& a, int64_t begin, int64_t end) {
  const int64_t* index = a.nodes + 3 * a.batch + begin;
  for (int64_t m = 0; m < a.modalities; ++m) {
    const Rows<A> start{static_cast<const A*>(a.content) + m * a.num_nodes * a.d, a.d, index};
    A* out = static_cast<A*>(a.targets) + (m * a.target_rows + begin - a.first_target) * a.d;
    product(Rows<A>{static_cast<const A*>(a.design), a.e, index}, end - begin, a.e,
            static_cast<const A*>(a.state) + m * a.e * a.d, a.d, &start, out, a.d, a.d);
  }
}

template <class A>
void copy_rows(const Rows<A>& rows, int64_t n, int64_t width, A* out) {
  for (int64_t i = 0; i < n; ++i) memcpy(out + i * width, rows.at(i), width * sizeof(A));
}

// The gradient of a head's row where that of `scale * row` is `weight * along`: out = scale (g - F (F.g) / |F|^2).
template <class A>
MMKD_INLINE void through_norm(A* out, A scale, A inverse_square, A weight, const A* along, const A* row, int64_t d) {
  const A radial = inverse_square * dot(row, along, d);
  for (int64_t c = 0; c < d; ++c) out[c] = scale * weight * (along[c] - radial * row[c]);
}

template <class A>
void sample_grads_typed(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch, void* sum) {
  const Batch<A> b{a, begin, end - begin};
  const int64_t n = b.n, d = a.d;
  A *users = static_cast<A*>(scratch), *difference = users + n * d, *design = difference + n * d;
  A *grad = design + 3 * n * a.e, *through = grad + a.modalities * 3 * n * d;  // dF [M, 3, n, d], dG [M, n, ep]
  A* whole = through + a.modalities * n * a.ep;                                // [n, d] a modality
  for (int part = 0; part < 3; ++part) {
    copy_rows(Rows<A>{b.design(), a.e, b.asked(part)}, n, a.e, design + part * n * a.e);
  }
  if (a.grad_margin && !a.joint_kept) b.joint(users, difference);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t m = 0; m < a.modalities; ++m) {
      A* rows = grad + (m * 3 * n + i) * d;
      A* g = through + (m * n + i) * a.ep;
      if (a.grad_logits) {
        b.prefetch_lists(m, i + 1);
        weighted_rows(b.grad_logits(m, i), b.list(i), a.list, b.items(m), d, rows);
        weighted_rows(b.grad_logits(m, i), b.list(i), a.list, b.item_design(), a.e, g);
      } else {
        memset(rows, 0, d * sizeof(A));
        memset(g, 0, a.e * sizeof(A));
      }
      for (int64_t c = a.e; c < a.ep; ++c) g[c] = 0;
      for (int part = 0; part < 3; ++part) {
        A* out = rows + part * n * d;
        if (!a.grad_margin) {
          if (part) memset(out, 0, d * sizeof(A));
          continue;
        }
        const A* row = b.head(m, part) + i * d;
        const A weight = static_cast<const A*>(a.grad_margin)[begin + i];
        A scale, inverse_square;
        b.norms(m, row, scale, inverse_square);
        A* fresh = part ? out : whole + i * d;
        through_norm(fresh, scale, inverse_square, part == 2 ? -weight : weight, (part ? users : difference) + i * d,
                     row, d);
        if (!part) add_scaled(out, A(1), fresh, d);
      }
    }
  }
  for (int64_t m = 0; m < a.modalities; ++m) {
    A *rows = grad + m * 3 * n * d, *g = through + m * n * a.ep, *to = static_cast<A*>(sum) + m * a.e * d;
    if (a.grad_logits) {  // G = F_u Z^T
      add_outer(g, a.ep, a.e, b.head(m, 0), d, d, n, to);
      const Rows<A> start{rows, d, nullptr};
      product(Rows<A>{g, a.ep, nullptr}, n, a.e, b.state(m), d, &start, rows, d, d);
    }
    add_outer(design, a.e, a.e, rows, d, d, 3 * n, to);
  }
}

template <class A>
void target_grads_typed(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch, void* sum) {
  const int64_t n = end - begin;
  A* design = static_cast<A*>(scratch);
  copy_rows(Rows<A>{static_cast<const A*>(a.design), a.e, a.nodes + 3 * a.batch + begin}, n, a.e, design);
  for (int64_t m = 0; m < a.modalities; ++m) {
    const A* grad = static_cast<const A*>(a.grad_targets) + (m * a.target_rows + begin - a.first_target) * a.d;
    add_outer(design, a.e, a.e, grad, a.d, a.d, n, static_cast<A*>(sum) + m * a.e * a.d);
  }
}

}  // namespace

#define MMKD_BY_TYPE(function, ...) a.dtype == DType::f64 ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__)

void frozen_samples(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch) {
  MMKD_BY_TYPE(samples_typed, a, begin, end, scratch);
}

void frozen_targets(const FrozenArgs& a, int64_t begin, int64_t end) { MMKD_BY_TYPE(targets_typed, a, begin, end); }

void frozen_sample_grads(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch, void* sum) {
  MMKD_BY_TYPE(sample_grads_typed, a, begin, end, scratch, sum);
}

void frozen_target_grads(const FrozenArgs& a, int64_t begin, int64_t end, void* scratch, void* sum) {
  MMKD_BY_TYPE(target_grads_typed, a, begin, end, scratch, sum);
}

}  // namespace MMKD_ISA
}  // namespace mmkd
