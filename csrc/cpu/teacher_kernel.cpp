#include "cpu/teacher_kernel.h"

#include "cpu/vmath.h"

namespace mmkd {
namespace MMKD_ISA {
namespace {

constexpr double kEps = 1e-12;  // the least length a row is divided by
constexpr int64_t kRowsAhead = 8;

template <class A>
MMKD_INLINE const A* row_of(const void* base, int64_t row, int64_t stride) {
  return static_cast<const A*>(base) + row * stride;
}

template <class A>
MMKD_INLINE const A* features_of(const TeacherArgs& a, int64_t row) {
  const int64_t wide = a.modalities * a.d;
  return row < a.num_users ? row_of<A>(a.user_features, row, wide)
                           : row_of<A>(a.item_features, row - a.num_users, wide);
}

template <class A>
void rows_typed(const TeacherArgs& a, int64_t begin, int64_t end) {
  const A* omega = static_cast<const A*>(a.omega);
  for (int64_t row = begin; row < end; ++row) {
    const A* features = features_of<A>(a, row);
    A *joint = static_cast<A*>(a.joint) + row * a.d, *inverse = static_cast<A*>(a.inverse) + row * a.modalities;
    const A* ids = row_of<A>(a.ids, row, a.d);
    for (int64_t c = 0; c < a.d; ++c) joint[c] = ids[c];
    for (int64_t m = 0; m < a.modalities; ++m) {
      const A* f = features + m * a.d;
      const A length = Num<A>::sqrt(dot(f, f, a.d)), least = static_cast<A>(kEps);
      const A by = A(1) / (length < least ? least : length), weight = omega[m] * by;  // NaN goes on
      inverse[m] = length < least ? -by : by;
      for (int64_t c = 0; c < a.d; ++c) joint[c] += weight * f[c];
    }
  }
}

// u . (p - n)
template <class A>
MMKD_INLINE A margin_of(const A* u, const A* p, const A* n, int64_t d) {
  using W = Vec<A>;
  typename W::V s{};
  int64_t c = 0;
  for (; c + W::size <= d; c += W::size) s += W::load(u + c) * (W::load(p + c) - W::load(n + c));
  A sum = lane_sum<A>(s);
  for (; c < d; ++c) sum += u[c] * (p[c] - n[c]);
  return sum;
}

template <class A>
bool margins_typed(const TeacherArgs& a, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  if (!in_range(a.users + begin, n, a.num_users) || !in_range(a.pos + begin, n, a.num_items) ||
      !in_range(a.neg + begin, n, a.num_items))
    return false;
  for (int64_t h = 0; h < a.count; ++h) {
    const Head& head = a.heads[h];
    if (!head.ranked) continue;
    const auto user = [&](int64_t b) { return row_of<A>(head.users, a.users[b], head.user_stride); };
    const auto item = [&](const int64_t* of, int64_t b) { return row_of<A>(head.items, of[b], head.item_stride); };
    for (int64_t b = begin; b < end; ++b) {
      if (const int64_t next = b + kRowsAhead; next < end) {
        prefetch_row(user(next), a.d);
        prefetch_row(item(a.pos, next), a.d);
        prefetch_row(item(a.neg, next), a.d);
      }
      static_cast<A*>(head.margin)[b] = margin_of(user(b), item(a.pos, b), item(a.neg, b), a.d);
    }
  }
  return true;
}

// What the positions [from, to) give NV vectors of their row from column c on, in one head.
template <int NV, class A>
MMKD_INLINE void sum_columns(const TeacherArgs& a, const Head& head, const RowPositions& of, int64_t from, int64_t to,
                             int64_t c, A* out) {
  using W = Vec<A>;
  typename W::V s[NV] = {};
  const A* coefficient = static_cast<const A*>(head.coefficient);
  for (int64_t i = from; i < to; ++i) {
    const int64_t q = static_cast<int64_t>(of.order[i] & UINT32_MAX), b = of.items ? q / 2 : q;
    const A by = of.items && q % 2 ? -coefficient[b] : coefficient[b];
    if (of.items) {
      const A* u = row_of<A>(head.users, a.users[b], head.user_stride) + c;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) s[v] += by * W::load(u + v * W::size);
    } else {
      const A* p = row_of<A>(head.items, a.pos[b], head.item_stride) + c;
      const A* n = row_of<A>(head.items, a.neg[b], head.item_stride) + c;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) s[v] += by * (W::load(p + v * W::size) - W::load(n + v * W::size));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) W::store(out + c + v * W::size, s[v]);
}

template <class A>
void sum_row(const TeacherArgs& a, const Head& head, const RowPositions& of, int64_t from, int64_t to, A* out) {
  constexpr int64_t w = Vec<A>::size;
  int64_t c = 0;
  for (; c + 4 * w <= a.d; c += 4 * w) sum_columns<4>(a, head, of, from, to, c, out);
  for (; c + w <= a.d; c += w) sum_columns<1>(a, head, of, from, to, c, out);
  for (; c < a.d; ++c) {
    A sum = 0;
    for (int64_t i = from; i < to; ++i) {
      const int64_t q = static_cast<int64_t>(of.order[i] & UINT32_MAX), b = of.items ? q / 2 : q;
      const A coefficient = static_cast<const A*>(head.coefficient)[b];
      if (of.items) {
        sum += (q % 2 ? -coefficient : coefficient) * row_of<A>(head.users, a.users[b], head.user_stride)[c];
      } else {
        sum += coefficient * (row_of<A>(head.items, a.pos[b], head.item_stride)[c] -
                              row_of<A>(head.items, a.neg[b], head.item_stride)[c]);
      }
    }
    out[c] = sum;
  }
}

// What a gradient of E^T gives f through f / max(||f||, eps), added to `out`.
template <class A>
MMKD_INLINE void add_normalized(const A* f, const A* grad, A inverse, A omega, int64_t d, A* out) {
  const bool clamped = inverse < 0;
  const A by = clamped ? -inverse : inverse, along = clamped ? A(0) : by * by * dot(f, grad, d), weight = omega * by;
  for (int64_t c = 0; c < d; ++c) out[c] += weight * (grad[c] - along * f[c]);
}

template <class A>
void grads_typed(const TeacherArgs& a, const RowPositions& of, int64_t begin, int64_t end, A* scratch) {
  const int64_t wide = a.modalities * a.d, first = of.items ? a.num_users : 0, prompt = a.modalities + 1;
  const A *omega = static_cast<const A*>(a.omega),
          *features = static_cast<const A*>(of.items ? a.item_features : a.user_features);
  A* by_features = static_cast<A*>(of.items ? a.grad_items : a.grad_users);
  int64_t group = 0;
  for (int64_t above = of.groups; group < above;) {  // the first group at or behind `begin`
    const int64_t middle = (group + above) / 2;
    if (of.rows[middle] < begin)
      group = middle + 1;
    else
      above = middle;
  }
  const auto fill = [](A* to, int64_t n) {
    for (int64_t c = 0; c < n; ++c) to[c] = 0;
  };
  for (int64_t row = begin; row < end; ++row) {
    const bool named = group < of.groups && of.rows[group] == row;
    const int64_t from = named ? of.starts[group] : 0, to = named ? of.starts[group + 1] : 0;
    group += named;
    A* joint = a.grad_ids ? static_cast<A*>(a.grad_ids) + (first + row) * a.d : scratch;
    A* own = by_features ? by_features + row * wide : nullptr;
    A* by_prompt = a.grad_prompt ? static_cast<A*>(a.grad_prompt) + (first + row) * a.d : nullptr;
    if (!named) {
      if (a.grad_ids) fill(joint, a.d);
      if (own) fill(own, wide);
      if (by_prompt) fill(by_prompt, a.d);
      continue;
    }
    if (a.heads[0].ranked)
      sum_row(a, a.heads[0], of, from, to, joint);
    else
      fill(joint, a.d);
    for (int64_t m = 0; own && m < a.modalities; ++m) {
      A* out = own + m * a.d;
      if (a.heads[1 + m].ranked)
        sum_row(a, a.heads[1 + m], of, from, to, out);
      else
        fill(out, a.d);
      if (!a.heads[0].ranked) continue;
      const A inverse = static_cast<const A*>(a.inverse)[(first + row) * a.modalities + m];
      add_normalized(features + row * wide + m * a.d, joint, inverse, omega[m], a.d, out);
    }
    if (by_prompt && a.heads[prompt].ranked)
      sum_row(a, a.heads[prompt], of, from, to, by_prompt);
    else if (by_prompt)
      fill(by_prompt, a.d);
  }
}

}  // namespace

void teacher_rows(const TeacherArgs& a, int64_t begin, int64_t end) {
  a.f64 ? rows_typed<double>(a, begin, end) : rows_typed<float>(a, begin, end);
}

bool teacher_margins(const TeacherArgs& a, int64_t begin, int64_t end) {
  return a.f64 ? margins_typed<double>(a, begin, end) : margins_typed<float>(a, begin, end);
}

void teacher_grads(const TeacherArgs& a, const RowPositions& of, int64_t begin, int64_t end, void* scratch) {
  a.f64 ? grads_typed<double>(a, of, begin, end, static_cast<double*>(scratch))
        : grads_typed<float>(a, of, begin, end, static_cast<float*>(scratch));
}

}  // namespace MMKD_ISA
}  // namespace mmkd
