// project on the CPU: features times weights, a block of rows forward, a strip of columns back.
#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/project_kernel.h"
#include "cpu/scratch.h"

namespace mmkd {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kRange = 20 * kProjectStrip;  // columns of a table that a thread takes, at most
constexpr int64_t kTasks = 16;                  // at least so many for a table, by parts of its rows
constexpr int64_t kFewest = 1024;               // rows of such a part, at least
constexpr int64_t kParts = 32;                  // of rows, where gradients are masked

int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// What both ways know of their arguments.
struct Problem {
  ScalarType type;  // of weights, scales, design, mask and results
  bool f64;
  int64_t bytes, rows, count, d, dp, e;
};

std::string place(const char* name, size_t m) {
  std::ostringstream out;
  out << name << '[' << m << ']';
  return out.str();
}

void check_rows(const OptTensor& t, const char* name, int64_t rows, ScalarType type) {
  if (!t) return;
  check_dim(*t, name, 2);
  check_type(*t, name, type);
  check_size(*t, name, 0, rows);
  MMKD_CHECK(t->is_contiguous(), name, ": expected a contiguous tensor");
}

void check_one(const Problem& p, const Tensor& table, int64_t weight_rows, const Tensor& scale, size_t m) {
  const std::string at = place("tables", m), times = place("scales", m);
  check_float(table, at.c_str());
  check_dim(table, at.c_str(), 2);
  check_size(table, at.c_str(), 0, p.rows);
  MMKD_CHECK(accumulate_type(table.scalar_type()) == p.type, at, ": expected ",
             p.f64 ? "float64" : "float32, bfloat16 or float16", " with weights of dtype ",
             torch::headeronly::toString(p.type), ", got ", torch::headeronly::toString(table.scalar_type()));
  MMKD_CHECK(weight_rows == table.size(1) || weight_rows == table.size(1) + 1, place("weights", m), ": expected ",
             table.size(1), " rows, or one more, which is added, got ", weight_rows);
  check_type(scale, times.c_str(), p.type);
  check_dim(scale, times.c_str(), 1);
  MMKD_CHECK(scale.size(0) == p.rows || scale.size(0) == 0, times, ": expected ", p.rows,
             " entries or none, got shape ", shape_of(scale));
  MMKD_CHECK(table.is_contiguous() && scale.is_contiguous(), at, ": expected contiguous tensors");
}

// `like` has the weights' type; `weight_rows`: how many each has.
Problem problem(const Tensors& tables, const std::vector<int64_t>& weight_rows, const Tensor& like, int64_t d,
                const Tensors& scales, const OptTensor& design, const OptTensor& mask) {
  MMKD_CHECK(!tables.empty(), "tables: expected at least one");
  MMKD_CHECK(weight_rows.size() == tables.size() && scales.size() == tables.size(), "weights, scales: expected ",
             tables.size(), ", as many as tables, got ", weight_rows.size(), " and ", scales.size());
  Problem p{};
  p.type = like.scalar_type();
  MMKD_CHECK(p.type == ScalarType::Float || p.type == ScalarType::Double,
             "weights[0]: expected float32 or float64, got ", torch::headeronly::toString(p.type));
  check_dim(tables[0], "tables[0]", 2);
  p.f64 = p.type == ScalarType::Double;
  p.bytes = p.f64 ? 8 : 4;
  p.rows = tables[0].size(0);
  p.count = static_cast<int64_t>(tables.size());
  p.d = d;
  p.dp = project_columns(p.d, p.f64);
  for (size_t m = 0; m < tables.size(); ++m) check_one(p, tables[m], weight_rows[m], scales[m], m);
  check_rows(design, "design", p.rows, p.type);
  check_rows(mask, "mask", p.rows, p.type);
  if (mask) check_size(*mask, "mask", 1, p.count * p.d);
  p.e = design ? design->size(1) : 0;
  return p;
}

// Of the weights, which only the way forward reads.
std::vector<int64_t> rows_of(const Tensors& weights) {
  std::vector<int64_t> rows;
  for (size_t m = 0; m < weights.size(); ++m) {
    const std::string by = place("weights", m);
    check_dim(weights[m], by.c_str(), 2);
    check_type(weights[m], by.c_str(), weights[0].scalar_type());
    check_size(weights[m], by.c_str(), 1, weights[0].size(1));
    MMKD_CHECK(weights[m].is_contiguous(), by, ": expected a contiguous tensor");
    rows.push_back(weights[m].size(0));
  }
  return rows;
}

const void* or_null(const OptTensor& t) { return t ? t->const_data_ptr() : nullptr; }
const void* or_null(const Tensor& t) { return t.numel() ? t.const_data_ptr() : nullptr; }

// `inner` rows of `ld` numbers, d of each, packed.
template <class A>
void pack(const Problem& p, const A* from, int64_t inner, int64_t ld, A* to) {
  const int64_t panel = project_panel(p.f64);
  for (int64_t c0 = 0; c0 < p.dp; c0 += panel) {
    const int64_t width = std::min(panel, p.dp - c0), there = std::clamp<int64_t>(p.d - c0, 0, width);
    for (int64_t k = 0; k < inner; ++k) {
      A* row = to + c0 * inner + k * width;
      std::copy_n(from + k * ld + c0, there, row);
      std::fill(row + there, row + width, A(0));
    }
  }
}

Tensor packed(const Problem& p, const Tensor& from, int64_t inner, int64_t column) {
  Tensor to = empty({p.dp, inner}, from);
  const int64_t ld = from.size(1);
  p.f64 ? pack(p, data<double>(from) + column, inner, ld, mutable_data<double>(to))
        : pack(p, data<float>(from) + column, inner, ld, mutable_data<float>(to));
  return to;
}

Tensor project(Tensors tables, Tensors weights, Tensors scales, OptTensor design, OptTensor added, OptTensor mask) {
  MMKD_CHECK(!weights.empty(), "weights: expected at least one");
  const std::vector<int64_t> weight_rows = rows_of(weights);
  const Problem p = problem(tables, weight_rows, weights[0], weights[0].size(1), scales, design, mask);
  MMKD_CHECK(design.has_value() == added.has_value(), "design, added: expected both or neither");
  check_rows(added, "added", p.e, p.type);
  if (added) check_size(*added, "added", 1, p.count * p.d);
  Tensor out = empty({p.rows, p.count * p.d}, weights[0]);
  Tensors kept;  // packed weights
  std::vector<ProjectRows> parts;
  for (int64_t m = 0; m < p.count; ++m) {
    ProjectRows a{};
    a.dtype = dtype_of(tables[m]);
    a.x = tables[m].const_data_ptr();
    a.k = tables[m].size(1);
    kept.push_back(packed(p, weights[m], a.k, 0));
    a.weight = kept.back().const_data_ptr();
    if (weights[m].size(0) > a.k) {
      const OptTensor row = torch::stable::narrow(weights[m], 0, a.k, 1);
      kept.push_back(packed(p, *row, 1, 0));  // panels of one row are that row
      a.shift = kept.back().const_data_ptr();
    }
    a.scale = or_null(scales[m]);
    a.design = or_null(design);
    a.e = p.e;
    if (added) {
      kept.push_back(packed(p, *added, p.e, m * p.d));
      a.added = kept.back().const_data_ptr();
    }
    a.mask = or_null(mask);
    a.out = out.mutable_data_ptr();
    a.width = p.count * p.d;
    a.column = m * p.d;
    a.d = p.d;
    a.dp = p.dp;
    parts.push_back(a);
  }
  std::atomic<bool> failed{false};
  // the beginnings of a block of rows, in the table that a thread comes to next
  const auto beginnings = [&](size_t m, int64_t c) {
    const int64_t one = tables[m].element_size(), first = std::min(p.rows, c * kProjectRows);
    return ProjectNext{static_cast<const char*>(parts[m].x) + first * parts[m].k * one, parts[m].k * one,
                       std::min(parts[m].k, kProjectInner) * one, std::min(p.rows - first, kProjectRows)};
  };
  for_chunks_ahead(up(p.rows, kProjectRows), [&](int64_t c, int64_t after) {
    const Scratch scratch(project_rows_scratch(p.dp) * p.bytes, failed);
    if (!scratch) return;
    for (size_t m = 0; m < parts.size(); ++m) {
      const ProjectNext next = m + 1 < parts.size() ? beginnings(m + 1, c) : beginnings(0, after);
      MMKD_ON_ISA(
          project_rows(parts[m], c * kProjectRows, std::min(p.rows, (c + 1) * kProjectRows), next, scratch.get()));
    }
  });
  check_memory(failed, "project");
  return out;
}

// out[row, c] = the sum over parts, in order, of their rows of `ld` numbers from `column` on; rows of d numbers.
template <class A>
void add_parts(const A* parts, int64_t count, int64_t rows, int64_t ld, int64_t column, int64_t d, A* out,
               int64_t out_ld) {
  for_range(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      std::fill_n(out + r * out_ld, d, A(0));
      for (int64_t i = 0; i < count; ++i) {
        const A* from = parts + (i * rows + r) * ld + column;
        for (int64_t c = 0; c < d; ++c) out[r * out_ld + c] += from[c];
      }
    }
  });
}

void add_parts(const Problem& p, const Tensor& parts, int64_t rows, int64_t column, Tensor& out, int64_t row,
               int64_t out_column) {
  const int64_t count = parts.size(0), ld = parts.size(2), out_ld = out.size(1), at = row * out_ld + out_column;
  p.f64 ? add_parts(data<double>(parts), count, rows, ld, column, p.d, mutable_data<double>(out) + at, out_ld)
        : add_parts(data<float>(parts), count, rows, ld, column, p.d, mutable_data<float>(out) + at, out_ld);
}

// What every table's gradient starts from.
struct Masked {
  Tensor ready, sums, by_design;
};

Masked masked(const Problem& p, const Tensor& grad, const Tensors& scales, const OptTensor& design,
              const OptTensor& mask, bool need_ready, std::atomic<bool>& failed) {
  const int64_t blocks = up(p.rows, kProjectItems), parts = std::clamp<int64_t>(blocks / 2, 1, kParts);
  const int64_t wide = p.count * p.dp;
  std::vector<const void*> scale;
  bool any = mask.has_value() || p.d != p.dp;
  for (const Tensor& s : scales) {
    scale.push_back(or_null(s));
    any = any || scale.back();
  }
  any = any && need_ready;
  Masked out{any ? empty({p.count, p.rows, p.dp}, grad) : grad, empty({parts, 1, wide}, grad),
             empty({parts, p.e, wide}, grad)};
  ProjectMasked a{p.f64, grad.const_data_ptr(), or_null(mask),   p.count, p.d,
                  p.dp,  scale.data(),          or_null(design), p.e,     any ? out.ready.mutable_data_ptr() : nullptr,
                  p.rows};
  char *sums = static_cast<char*>(out.sums.mutable_data_ptr()),
       *by_design = static_cast<char*>(out.by_design.mutable_data_ptr());
  for_chunks(parts, [&](int64_t i) {
    const Scratch scratch(project_masked_scratch(p.dp) * p.bytes, failed);
    if (!scratch) return;
    const int64_t begin = blocks * i / parts * kProjectItems, end = blocks * (i + 1) / parts * kProjectItems;
    MMKD_ON_ISA(project_masked(a, begin, std::min(p.rows, end), sums + i * wide * p.bytes,
                               by_design + i * p.e * wide * p.bytes, scratch.get()));
  });
  return out;
}

// The gradient of one weight: its columns in ranges, its rows in parts that are added in order.
Tensor weight_grad(const Problem& p, const Tensor& table, int64_t weight_rows, const Masked& from, int64_t m,
                   std::atomic<bool>& failed) {
  const int64_t k = table.size(1), ranges = std::max<int64_t>(1, up(k, kRange)), unit = kProjectStrip / 2;
  const int64_t range = std::max<int64_t>(1, up(up(k, unit), ranges)) * unit;
  const int64_t parts = std::clamp<int64_t>(up(kTasks, ranges), 1, std::max<int64_t>(1, p.rows / kFewest));
  const Tensor& like = from.ready;
  Tensor sums = empty({parts, k, p.dp}, like), out = empty({weight_rows, p.d}, like);
  const bool own = from.ready.dim() == 3;
  ProjectGrad a{dtype_of(table), table.const_data_ptr(), k, nullptr, own ? p.dp : p.count * p.d, p.dp, nullptr};
  a.g = static_cast<const char*>(from.ready.const_data_ptr()) + m * (own ? p.rows * p.dp : p.d) * p.bytes;
  char* at = static_cast<char*>(sums.mutable_data_ptr());
  if (p.rows == 0) std::fill_n(at, parts * k * p.dp * p.bytes, 0);
  for_chunks(p.rows ? ranges * parts : 0, [&](int64_t c) {
    const int64_t part = c / ranges, first = c % ranges * range;
    ProjectGrad one = a;
    one.out = at + part * k * p.dp * p.bytes;
    const Scratch scratch(project_grad_scratch() * p.bytes, failed);
    if (!scratch || first >= k) return;
    MMKD_ON_ISA(project_grad(one, p.rows * part / parts, p.rows * (part + 1) / parts, first, std::min(k, first + range),
                             scratch.get()));
  });
  add_parts(p, sums, k, 0, out, 0, 0);
  if (weight_rows > k) add_parts(p, from.sums, 1, m * p.dp, out, k, 0);
  return out;
}

Tensors project_backward(Tensor grad, Tensors tables, std::vector<int64_t> weight_rows, Tensors scales,
                         OptTensor design, OptTensor mask, bool need_weights) {
  check_dim(grad, "grad", 2);
  const auto count = static_cast<int64_t>(tables.size());
  MMKD_CHECK(count && grad.size(1) % count == 0, "grad: expected as many columns for each of ", count,
             " tables, got shape ", shape_of(grad));
  const Problem p = problem(tables, weight_rows, grad, grad.size(1) / count, scales, design, mask);
  check_rows(grad, "grad", p.rows, p.type);
  std::atomic<bool> failed{false};
  const Masked from = masked(p, grad, scales, design, mask, need_weights, failed);
  Tensors out;
  for (int64_t m = 0; m < p.count; ++m) {
    out.push_back(need_weights ? weight_grad(p, tables[m], weight_rows[m], from, m, failed) : empty({0}, grad));
  }
  Tensor added = empty({p.e, p.count * p.d}, grad);
  for (int64_t m = 0; m < p.count; ++m) add_parts(p, from.by_design, p.e, m * p.dp, added, 0, m * p.d);
  out.push_back(added);
  check_memory(failed, "project");
  return out;
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) {
  m.impl("project", TORCH_BOX(&mmkd::project));
  m.impl("project_backward", TORCH_BOX(&mmkd::project_backward));
}
