// spmm, sddmm, csr_transpose and LightGCN propagation on the CPU (spec section 2).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/propagate.h"
#include "cpu/spmm_kernel.h"

namespace mmkd {
namespace {

// A CSR matrix as the ops take it. Its numbers are checked row by row, before a row's entries are used.
struct Csr {
  const int64_t* rowptr;
  const void* col;
  bool col64;
  int64_t num_rows, nnz;

  int64_t at(int64_t j) const {
    return col64 ? static_cast<const int64_t*>(col)[j] : static_cast<const int32_t*>(col)[j];
  }
};

Csr csr_of(const Tensor& rowptr, const Tensor& col) {
  check_dim(rowptr, "rowptr", 1);
  check_dim(col, "col", 1);
  check_type(rowptr, "rowptr", ScalarType::Long);
  const bool col64 = col.scalar_type() == ScalarType::Long;
  MMKD_CHECK(col64 || col.scalar_type() == ScalarType::Int, "col: expected dtype int32 or int64, got ",
             torch::headeronly::toString(col.scalar_type()));
  MMKD_CHECK(rowptr.is_contiguous() && col.is_contiguous(), "rowptr, col: expected contiguous tensors");
  MMKD_CHECK(rowptr.numel() >= 1, "rowptr: expected num_rows + 1 entries, got none");
  const Csr m{data<int64_t>(rowptr), col.const_data_ptr(), col64, rowptr.numel() - 1, col.numel()};
  MMKD_CHECK(m.rowptr[0] == 0 && m.rowptr[m.num_rows] == m.nnz,
             "rowptr: expected to start at 0 and end at len(col) = ", m.nnz, ", got ", m.rowptr[0], " and ",
             m.rowptr[m.num_rows]);
  return m;
}

[[noreturn]] void fail_row(const Csr& m, int64_t row, int64_t num_cols) {
  const int64_t lo = m.rowptr[row], hi = m.rowptr[row + 1];
  MMKD_CHECK(lo >= 0 && lo <= hi && hi <= m.nnz, "rowptr: row ", row, " spans [", lo, ", ", hi,
             "), expected a non-decreasing range within [0, ", m.nnz, "]");
  for (int64_t j = lo; j < hi; ++j) {
    MMKD_CHECK(m.at(j) >= 0 && m.at(j) < num_cols, "col: entry ", j, " (row ", row, ") is ", m.at(j), ", expected [0, ",
               num_cols, ")");
  }
  fail("rowptr, col: changed while they were being read");
}

void check_row(const Csr& m, int64_t row, int64_t num_cols) {
  const int64_t lo = m.rowptr[row], hi = m.rowptr[row + 1];
  bool good = lo >= 0 && lo <= hi && hi <= m.nnz;
  for (int64_t j = lo; good && j < hi; ++j) good = m.at(j) >= 0 && m.at(j) < num_cols;
  if (!good) fail_row(m, row, num_cols);
}

const void* scale_of(const OptTensor& t, const char* name, int64_t size, ScalarType type) {
  if (!t) return nullptr;
  check_dim(*t, name, 1);
  check_size(*t, name, 0, size);
  check_type(*t, name, type);
  MMKD_CHECK(t->is_contiguous(), name, ": expected a contiguous tensor");
  return t->const_data_ptr();
}

void check_table(const Tensor& t, const char* name) {
  check_float(t, name);
  check_dim(t, name, 2);
  MMKD_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor");
}

// Boundaries that cut positions [begin, end) into pieces of about equal work, where a row costs its non-zeros and one
// more. `rows` null: a position is a row, and the boundaries come from binary searches in rowptr.
std::vector<int64_t> cut_evenly(const Csr& m, const int64_t* rows, int64_t begin, int64_t end) {
  const int64_t pieces = std::min<int64_t>(end - begin, 16 * torch::stable::get_num_threads());
  std::vector<int64_t> bounds{begin};
  if (!rows) {
    // Of rows that nobody has checked yet.
    const auto entries_before = [&](int64_t row) { return std::clamp<int64_t>(m.rowptr[row], 0, m.nnz); };
    const int64_t before = entries_before(begin) + begin;
    const double work = static_cast<double>(entries_before(end) + end - before);
    for (int64_t p = 1; p < pieces; ++p) {
      const int64_t goal = before + static_cast<int64_t>(work * p / pieces);
      int64_t lo = bounds.back(), hi = end;
      while (lo < hi) {
        const int64_t mid = lo + (hi - lo) / 2;
        if (m.rowptr[mid] + mid < goal) {
          lo = mid + 1;
        } else {
          hi = mid;
        }
      }
      bounds.push_back(lo);
    }
  } else {
    int64_t work = 0, done = 0;
    for (int64_t i = begin; i < end; ++i) work += m.rowptr[rows[i] + 1] - m.rowptr[rows[i]] + 1;
    const int64_t step = work / std::max<int64_t>(1, pieces) + 1;
    for (int64_t i = begin; i < end; ++i) {
      done += m.rowptr[rows[i] + 1] - m.rowptr[rows[i]] + 1;
      if (done >= step * static_cast<int64_t>(bounds.size())) bounds.push_back(i + 1);
    }
  }
  bounds.push_back(end);
  return bounds;
}

// Positions [begin, end): rows of a.rows, or rows. Returns one whose rowptr or col is out of range, or -1.
int64_t try_run(const Csr& m, SpmmArgs a, int64_t begin, int64_t end, bool read_again) {
  a.stream = (a.dtype == DType::f32 || a.out_f32) && !a.compact &&
             past_caches(a.out, end - begin, 4 * a.d, read_again ? 0.25 : 0.125);
  const std::vector<int64_t> bounds = cut_evenly(m, a.rows, begin, end);
  std::atomic<int64_t> bad{-1};
  for_chunks(static_cast<int64_t>(bounds.size()) - 1, [&](int64_t c) {
    const int64_t row = MMKD_ON_ISA(spmm(a, bounds[c], bounds[c + 1]));
    if (row >= 0) bad.store(row);
  });
  return bad.load();
}

void run(const Csr& m, const SpmmArgs& a, int64_t n, bool read_again = false) {
  const int64_t bad = try_run(m, a, 0, n, read_again);
  if (bad >= 0) fail_row(m, bad, a.num_cols);
}

SpmmArgs args_of(const Csr& m, const Tensor& x) {
  SpmmArgs a{};
  a.dtype = dtype_of(x);
  a.col64 = m.col64;
  a.rowptr = m.rowptr;
  a.col = m.col;
  a.x = x.const_data_ptr();
  a.num_rows = m.num_rows;
  a.num_cols = x.size(0);
  a.nnz = m.nnz;
  a.d = x.size(1);
  a.far = prefetches_far();
  a.alpha = 1.0;
  return a;
}

Tensor spmm(Tensor rowptr, Tensor col, Tensor x, OptTensor value, OptTensor row_scale, OptTensor col_scale,
            OptTensor /*t_rowptr*/, OptTensor /*t_col*/,  // the transpose is there for the backward pass
            OptTensor /*plan*/, OptTensor /*t_plan*/) {   // a GPU's
  const Csr m = csr_of(rowptr, col);
  check_table(x, "x");
  const ScalarType acc = accumulate_type(x.scalar_type());
  Tensor out = empty({m.num_rows, x.size(1)}, x);
  SpmmArgs a = args_of(m, x);
  a.value = scale_of(value, "value", m.nnz, acc);
  a.row_scale = scale_of(row_scale, "row_scale", m.num_rows, acc);
  a.col_scale = scale_of(col_scale, "col_scale", x.size(0), acc);
  a.out = out.mutable_data_ptr();
  run(m, a, m.num_rows);
  return out;
}

Tensor sddmm(Tensor rowptr, Tensor col, Tensor a, Tensor b, OptTensor row_scale, OptTensor col_scale) {
  const Csr m = csr_of(rowptr, col);
  check_table(a, "a");
  check_table(b, "b");
  check_type(b, "b", a.scalar_type());
  check_size(a, "a", 0, m.num_rows);
  check_size(b, "b", 1, a.size(1));
  const ScalarType acc = accumulate_type(a.scalar_type());
  Tensor out = empty({m.nnz}, a, acc);
  const SddmmArgs args{dtype_of(a),
                       m.col64,
                       m.rowptr,
                       m.col,
                       a.const_data_ptr(),
                       b.const_data_ptr(),
                       scale_of(row_scale, "row_scale", m.num_rows, acc),
                       scale_of(col_scale, "col_scale", b.size(0), acc),
                       out.mutable_data_ptr(),
                       m.num_rows,
                       b.size(0),
                       m.nnz,
                       a.size(1)};
  const std::vector<int64_t> bounds = cut_evenly(m, nullptr, 0, m.num_rows);
  std::atomic<int64_t> bad{-1};
  for_chunks(static_cast<int64_t>(bounds.size()) - 1, [&](int64_t c) {
    const int64_t row = MMKD_ON_ISA(sddmm(args, bounds[c], bounds[c + 1]));
    if (row >= 0) bad.store(row);
  });
  if (bad.load() >= 0) fail_row(m, bad.load(), b.size(0));
  return out;
}

template <class I>
void transpose_into(const Csr& m, int64_t num_cols, int64_t* rowptr, I* col, int64_t* perm) {
  std::fill(rowptr, rowptr + num_cols + 1, 0);
  for (int64_t j = 0; j < m.nnz; ++j) ++rowptr[m.at(j) + 1];
  for (int64_t c = 0; c < num_cols; ++c) rowptr[c + 1] += rowptr[c];
  std::vector<int64_t> next(rowptr, rowptr + num_cols);
  for (int64_t r = 0; r < m.num_rows; ++r) {
    for (int64_t j = m.rowptr[r]; j < m.rowptr[r + 1]; ++j) {
      const int64_t k = next[m.at(j)]++;
      col[k] = static_cast<I>(r);
      perm[k] = j;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> csr_transpose(Tensor rowptr, Tensor col, int64_t num_cols) {
  const Csr m = csr_of(rowptr, col);
  MMKD_CHECK(num_cols >= 0, "num_cols: expected >= 0, got ", num_cols);
  MMKD_CHECK(m.col64 || m.num_rows <= INT32_MAX, "col: int32 cannot hold the ", m.num_rows, " row ids; pass int64");
  for (int64_t r = 0; r < m.num_rows; ++r) check_row(m, r, num_cols);
  Tensor out_rowptr = empty({num_cols + 1}, rowptr), out_col = empty({m.nnz}, col), perm = empty({m.nnz}, rowptr);
  if (m.col64) {
    transpose_into(m, num_cols, mutable_data<int64_t>(out_rowptr), mutable_data<int64_t>(out_col),
                   mutable_data<int64_t>(perm));
  } else {
    transpose_into(m, num_cols, mutable_data<int64_t>(out_rowptr), mutable_data<int32_t>(out_col),
                   mutable_data<int64_t>(perm));
  }
  return {out_rowptr, out_col, perm};
}

// What propagation needs besides x: a square symmetric adjacency and s = D^-1/2.
struct Graph {
  Csr m;
  const void* scale;
};

Graph graph_of(const Tensor& rowptr, const Tensor& col, const Tensor& scale, ScalarType type) {
  const Csr m = csr_of(rowptr, col);
  return {m, scale_of(scale, "scale", m.num_rows, accumulate_type(type))};
}

const int64_t* rows_of(const Tensor& rows, int64_t num_nodes) {
  check_dim(rows, "rows", 1);
  check_type(rows, "rows", ScalarType::Long);
  MMKD_CHECK(rows.is_contiguous(), "rows: expected a contiguous tensor");
  const int64_t* r = data<int64_t>(rows);
  const int64_t n = rows.numel();
  for (int64_t i = all_below(r, n, num_nodes) ? n : 0; i < n; ++i) {
    MMKD_CHECK(r[i] >= 0 && r[i] < num_nodes, "rows: entry ", i, " is ", r[i], ", expected [0, ", num_nodes, ")");
  }
  return r;
}

// Flags N(rows).
std::vector<uint8_t> neighbourhood(const Csr& m, const int64_t* rows, int64_t n) {
  std::vector<uint8_t> flags(m.num_rows, 0);
  std::atomic<int64_t> bad{-1};
  for_range(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t lo = m.rowptr[rows[i]], hi = m.rowptr[rows[i] + 1];
      bool good = lo >= 0 && lo <= hi && hi <= m.nnz;
      for (int64_t j = lo; good && j < hi; ++j) {
        const int64_t c = m.at(j);
        good = static_cast<uint64_t>(c) < static_cast<uint64_t>(m.num_rows);
        // Whoever writes it writes 1; one that is set is left alone, or the threads fight over its cache line.
        if (good && !__atomic_load_n(&flags[c], __ATOMIC_RELAXED))
          __atomic_store_n(&flags[c], uint8_t{1}, __ATOMIC_RELAXED);
      }
      if (!good) return bad.store(rows[i]);
    }
  });
  if (bad.load() >= 0) fail_row(m, bad.load(), m.num_rows);
  return flags;
}

// Those of [begin, end).
std::vector<int64_t> flagged(const std::vector<uint8_t>& flags, int64_t begin, int64_t end) {
  std::vector<int64_t> list(end - begin);
  int64_t n = 0;
  for (int64_t v = begin; v < end; ++v) {
    list[n] = v;
    n += flags[v];
  }
  list.resize(n);
  return list;
}

int64_t entries_of(const Csr& m, const int64_t* rows, int64_t n) {
  int64_t entries = 0;
  for (int64_t i = 0; i < n; ++i) entries += m.rowptr[rows[i] + 1] - m.rowptr[rows[i]];
  return entries;
}

// Whether the layer before the last is computed for all nodes. With three entries for every four nodes the rows'
// neighbours have about two thirds of the non-zeros (74 % with 0.9 at Netflix and Amazon-Book size, 63 % with 0.54 at
// Electronics size), and rows in order take less time an entry than rows of a list.
bool nearly_all(const Csr& m, const int64_t* rows, int64_t n) { return 4 * entries_of(m, rows, n) > 3 * m.num_rows; }

// Rows of a layer, of each side of the graph; none: all of that side.
struct Needed {
  std::optional<std::vector<int64_t>> first, second;
};

// What the last layer gathers where it is computed for `rows`, of which the first `middle` lie before `split`, in a
// graph of two sides. A side is computed as a whole where the rows have an entry or more for each of its nodes: that
// needs most of it, and rows in order take less time an entry.
Needed needed_of(const Csr& m, const int64_t* rows, int64_t n, int64_t middle, int64_t split) {
  Needed needed;
  if (entries_of(m, rows, middle) < m.num_rows - split) {
    needed.second = flagged(neighbourhood(m, rows, middle), split, m.num_rows);
  }
  if (entries_of(m, rows + middle, n - middle) < split) {
    needed.first = flagged(neighbourhood(m, rows + middle, n - middle), 0, split);
  }
  return needed;
}

Tensor identity_layers(const Tensor& x, const int64_t* rows, int64_t n) {
  if (!rows) return torch::stable::clone(x);
  Tensor out = empty({n, x.size(1)}, x);
  const int64_t bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(data<char>(x) + rows[i] * bytes, bytes, mutable_data<char>(out) + i * bytes);
  }
  return out;
}

// A float32 table in bfloat16.
Tensor narrowed(const Tensor& x) {
  Tensor out = empty({x.size(0), x.size(1)}, x, ScalarType::BFloat16);
  const float* from = data<float>(x);
  void* to = out.mutable_data_ptr();
  for_range(x.numel(), 1 << 14, [&](int64_t begin, int64_t end) { MMKD_ON_ISA(to_bf16(from, to, begin, end)); });
  return out;
}

// The products of propagation over layers of a table x. mixed: layers are bfloat16, for they are gathered, x and the
// last layer are float32.
SpmmArgs layer_args(const Graph& g, const Tensor& x, bool mixed) {
  SpmmArgs a = args_of(g.m, x);
  a.row_scale = a.col_scale = g.scale;
  a.add = x.const_data_ptr();
  a.add_f32 = mixed;
  if (mixed) a.dtype = DType::bf16;
  return a;
}

// Where a product's rows go.
Tensor layer_out(SpmmArgs& a, int64_t rows, const Tensor& x, bool last) {
  a.out_f32 = a.add_f32 && last;
  Tensor out = empty({rows, x.size(1)}, x, a.add_f32 && !last ? ScalarType::BFloat16 : x.scalar_type());
  a.out = out.mutable_data_ptr();
  return out;
}

// Where the second side of a graph of two sides begins, if this is one: no edge joins nodes of the same side, so
// columns of the first one's rows lie behind that place, and those of the second one's before it. Whoever relies on it
// checks every row he takes. Columns ascend within a row, or the place is wrong, which is found then.
int64_t split_of(const Csr& m) {
  const auto first_of = [&](int64_t row) {
    const int64_t lo = m.rowptr[row], hi = m.rowptr[row + 1];
    return lo >= 0 && lo < hi && hi <= m.nnz ? m.at(lo) : -1;
  };
  int64_t lo = 0, hi = m.num_rows;
  while (lo < hi) {
    const int64_t mid = lo + (hi - lo) / 2;
    int64_t row = mid;
    while (row < hi && first_of(row) < 0) ++row;
    if (row == hi || first_of(row) < row) {
      hi = mid;
    } else {
      lo = row + 1;
    }
  }
  return lo == m.num_rows ? 0 : lo;
}

// Layers h of propagation, one after the other. A side of the next one is made from the other side of this one, so the
// smaller side goes into memory of its own and the larger one over the one it replaces: two layers take a table and a
// side instead of two tables.
class Layers {
 public:
  // given: the table is somebody else's. split: where the second side begins; 0: not known.
  Layers(const Csr& m, const Tensor& table, int64_t split, bool given)
      : m_(m), split_(split), second_is_small_(2 * split > m.num_rows), table_(table), given_(given) {}

  // h <- what `a` makes of it, for all nodes, or for those of an ascending list: then the others are not to be read.
  // like: as in layer_out. False: a row of one side has a neighbour on it, and h is lost.
  bool next(SpmmArgs a, const Tensor& like, const std::vector<int64_t>* list) {
    const int64_t n = list ? static_cast<int64_t>(list->size()) : m_.num_rows;
    if (n == 0) return true;
    a.rows = list ? list->data() : nullptr;
    if (given_ || split_ == 0) {
      a.x = table_.const_data_ptr();
      Tensor out = layer_out(a, m_.num_rows, like, false);
      run(m_, a, n, true);
      table_ = out;
      given_ = false;
      return true;
    }
    return by_side(a, [&](const SpmmArgs& b, bool second, const char* x) { return side(b, second, x, n, true); });
  }

  // The same for the rows of each side that are needed, where the sides are known.
  bool next_of(SpmmArgs a, const Tensor& like, const Needed& needed) {
    sides_ = true;
    const char *first = at(false), *second = at(true);
    if (given_) {
      Tensor out = layer_out(a, m_.num_rows, like, false);
      if (!some(a, false, second, needed.first) || !some(a, true, first, needed.second)) return false;
      table_ = out;
      given_ = false;
      return true;
    }
    return by_side(a, [&](const SpmmArgs& b, bool second, const char* x) {
      return some(b, second, x, second ? needed.second : needed.first);
    });
  }

  // The layer that `a` makes of h, of all nodes, in a table. Empty: as above.
  std::optional<Tensor> finish(SpmmArgs a, const Tensor& like) {
    if (apart_ && !a.add_f32) return next(a, like, nullptr) ? std::optional<Tensor>(table_) : std::nullopt;
    const Tensor out = layer_out(a, m_.num_rows, like, true);
    return last(a, m_.num_rows) ? std::optional<Tensor>(out) : std::nullopt;
  }

  // What `a` makes of h at n positions goes where `a` says. False: as above.
  bool last(SpmmArgs a, int64_t n) {
    if (apart_ && a.rows && !std::is_partitioned(a.rows, a.rows + n, [&](int64_t r) { return r < split_; })) join();
    a.x = table_.const_data_ptr();
    if (!apart_ && !sides_) {
      run(m_, a, n);
      return true;
    }
    return side(a, false, at(true), n, false) && side(a, true, at(false), n, false);
  }

 private:
  int64_t row_bytes() const { return table_.size(1) * static_cast<int64_t>(table_.element_size()); }

  // Where a node's row of the side would be if all nodes' lay there; `apart`: of the smaller side's memory of its own.
  char* at_place(bool second, bool apart) const {
    const Tensor& rows = apart ? *spare_ : table_;
    const uintptr_t start = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
    return reinterpret_cast<char*>(apart && second ? start - static_cast<uintptr_t>(split_ * row_bytes()) : start);
  }
  char* at(bool second) const { return at_place(second, apart_ && second == second_is_small_); }

  // The positions of one side, from the other side's rows at x; false where a column is not one of those.
  bool side(SpmmArgs a, bool second, const char* x, int64_t n, bool read_again) const {
    const int64_t middle =
        a.rows ? std::partition_point(a.rows, a.rows + n, [&](int64_t r) { return r < split_; }) - a.rows : split_;
    const int64_t begin = second ? middle : 0, end = second ? n : middle;
    a.x = x;
    a.first_col = second ? 0 : split_;
    a.num_cols = second ? split_ : m_.num_rows;
    return begin == end || try_run(m_, a, begin, end, read_again) < 0;
  }

  // make(a, second, x) writes a side of the next layer where `a` says, from the other side's rows at x.
  template <class Make>
  bool by_side(SpmmArgs a, const Make& make) {
    const int64_t size = second_is_small_ ? m_.num_rows - split_ : split_;
    if (!spare_) spare_ = empty({size, table_.size(1)}, table_);
    const char* small = at(second_is_small_);
    a.out = at_place(second_is_small_, !apart_);
    if (!make(a, second_is_small_, at(!second_is_small_))) return false;
    a.out = at(!second_is_small_);
    if (!make(a, !second_is_small_, small)) return false;
    apart_ = !apart_;
    return true;
  }

  // The rows of one side that are needed.
  bool some(SpmmArgs a, bool second, const char* x, const std::optional<std::vector<int64_t>>& rows) const {
    if (!rows) return side(a, second, x, m_.num_rows, true);
    a.rows = rows->data();
    return rows->empty() || side(a, second, x, static_cast<int64_t>(rows->size()), true);
  }

  // The smaller side to where the larger one is.
  void join() {
    const int64_t bytes = row_bytes(), first = second_is_small_ ? split_ : 0;
    std::memcpy(static_cast<char*>(table_.mutable_data_ptr()) + first * bytes, spare_->const_data_ptr(),
                static_cast<size_t>(spare_->size(0) * bytes));
    apart_ = false;
  }

  const Csr& m_;
  const int64_t split_;
  const bool second_is_small_;
  Tensor table_;                 // of all nodes
  std::optional<Tensor> spare_;  // of the smaller side
  bool given_, apart_ = false;   // apart: the smaller side is in spare_
  bool sides_ = false;           // rows of h are missing if the graph has no such sides
};

// f(split), where the graph's second side may begin. If f finds by an empty result that the graph has no sides, or if
// they are of no use, f(0).
template <class F>
auto with_sides(const Csr& m, bool of_use, const F& f) {
  auto result = f(of_use ? split_of(m) : 0);
  return result ? result : f(0);
}

// Horner's form: h <- x + Â h, num_layers >= 1 times, then / (num_layers + 1): the mean costs no pass of its own. Of
// all rows, or of n wanted ones.
std::optional<Tensor> horner(const Graph& g, const Tensor& x, int64_t num_layers, const int64_t* wanted, int64_t n,
                             bool mixed, int64_t split) {
  SpmmArgs a = layer_args(g, x, mixed);
  Layers h(g.m, mixed ? narrowed(x) : x, split, !mixed);
  const auto before = [&](int64_t r) { return r < split; };
  const bool by_side = wanted && split > 0 && std::is_partitioned(wanted, wanted + n, before);
  for (int64_t l = 1; l < num_layers; ++l) {
    if (by_side && l == num_layers - 1) {
      const int64_t middle = std::partition_point(wanted, wanted + n, before) - wanted;
      if (!h.next_of(a, x, needed_of(g.m, wanted, n, middle, split))) return std::nullopt;
    } else if (wanted && l == num_layers - 1 && !nearly_all(g.m, wanted, n)) {
      // Only what the last layer will gather is computed.
      const std::vector<int64_t> needed = flagged(neighbourhood(g.m, wanted, n), 0, g.m.num_rows);
      if (!h.next(a, x, &needed)) return std::nullopt;
    } else if (!h.next(a, x, nullptr)) {
      return std::nullopt;
    }
  }
  a.alpha = 1.0 / static_cast<double>(num_layers + 1);
  if (!wanted) return h.finish(a, x);
  a.rows = wanted;
  a.compact = true;
  const Tensor out = layer_out(a, n, x, true);
  return h.last(a, n) ? std::optional<Tensor>(out) : std::nullopt;
}

}  // namespace

Tensor propagate_as(const Tensor& rowptr, const Tensor& col, const Tensor& scale, const Tensor& x, int64_t num_layers,
                    const OptTensor& rows, bool mixed, const char* name) {
  check_table(x, name);
  const Graph g = graph_of(rowptr, col, scale, x.scalar_type());
  check_size(x, name, 0, g.m.num_rows);
  MMKD_CHECK(num_layers >= 0, "num_layers: expected >= 0, got ", num_layers);
  const int64_t n = rows ? rows->numel() : g.m.num_rows;
  const int64_t* wanted = rows ? rows_of(*rows, g.m.num_rows) : nullptr;
  // An empty `rows` has a null pointer, which would read as "all rows" below.
  if (rows && n == 0) return empty({0, x.size(1)}, x);
  if (num_layers == 0) return identity_layers(x, wanted, n);
  return *with_sides(g.m, num_layers > (wanted || mixed ? 1 : 2),
                     [&](int64_t split) { return horner(g, x, num_layers, wanted, n, mixed, split); });
}

namespace {

Tensor propagate(Tensor rowptr, Tensor col, Tensor scale, Tensor x, int64_t num_layers, OptTensor rows,
                 OptTensor /*plan*/) {
  return propagate_as(rowptr, col, scale, x, num_layers, rows, false);
}

Tensor propagate_mixed(Tensor rowptr, Tensor col, Tensor scale, Tensor x, int64_t num_layers, OptTensor rows) {
  check_type(x, "x", ScalarType::Float);
  return propagate_as(rowptr, col, scale, x, num_layers, rows, true);
}

// Sums the gradients of repeated rows, in order of position. unique: sorted; sums: [unique, d] accumulator type.
template <class A>
void unique_rows(const int64_t* rows, int64_t n, const A* grad, int64_t d, std::vector<int64_t>& unique, A* sums) {
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](int64_t i, int64_t j) { return rows[i] != rows[j] ? rows[i] < rows[j] : i < j; });
  for (int64_t i : order) {
    if (unique.empty() || unique.back() != rows[i]) {
      std::copy_n(grad + i * d, d, sums + static_cast<int64_t>(unique.size()) * d);
      unique.push_back(rows[i]);
    } else {
      A* s = sums + (static_cast<int64_t>(unique.size()) - 1) * d;
      for (int64_t c = 0; c < d; ++c) s[c] += grad[i * d + c];
    }
  }
}

// position[rows[i]] = i, -1 elsewhere.
std::vector<int32_t> positions(const std::vector<int64_t>& rows, int64_t nodes) {
  std::vector<int32_t> position(nodes, -1);
  for (size_t i = 0; i < rows.size(); ++i) position[rows[i]] = static_cast<int32_t>(i);
  return position;
}

Tensor scatter_rows(const Tensor& grad, const std::vector<int64_t>& rows, int64_t nodes) {
  Tensor out = empty({nodes, grad.size(1)}, grad);
  const int64_t bytes = grad.size(1) * static_cast<int64_t>(grad.element_size());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  std::fill_n(to, nodes * bytes, 0);
  for (size_t i = 0; i < rows.size(); ++i) {
    std::copy_n(data<char>(grad) + static_cast<int64_t>(i) * bytes, bytes, to + rows[i] * bytes);
  }
  return out;
}

// Where gradient rows g come in, and the first layer back.
struct FromRows {
  const Graph& g;
  const Tensor& grad;  // [len(rows), d]
  const std::vector<int64_t>& rows;
  bool mixed;
  std::vector<int32_t> place;  // of a node in rows, -1 for none

  FromRows(const Graph& graph, const Tensor& gradient, const std::vector<int64_t>& nodes, bool mixed_layers)
      : g(graph), grad(gradient), rows(nodes), mixed(mixed_layers), place(positions(nodes, graph.m.num_rows)) {}

  // What the layers after the first gather and add.
  SpmmArgs args() const {
    SpmmArgs a = layer_args(g, grad, mixed);
    a.num_cols = g.m.num_rows;
    a.add_map = place.data();
    return a;
  }

  // [len(rows)], in the type of their gradients.
  Tensor scales_of_rows() const {
    Tensor out = empty({static_cast<int64_t>(rows.size())}, grad);
    const auto pick = [&](const auto* from, auto* to) {
      for (size_t i = 0; i < rows.size(); ++i) to[i] = from[rows[i]];
    };
    if (out.scalar_type() == ScalarType::Double) {
      pick(static_cast<const double*>(g.scale), mutable_data<double>(out));
    } else {
      pick(static_cast<const float*>(g.scale), mutable_data<float>(out));
    }
    return out;
  }

  // g + Â g, [nodes, d]; halved if it is the only layer.
  Tensor first(bool only) const {
    SpmmArgs a = args();
    const Tensor gathered = mixed ? narrowed(grad) : grad, scales = scales_of_rows();
    a.x = gathered.const_data_ptr();
    a.col_map = place.data();
    a.col_scale = scales.const_data_ptr();
    a.alpha = only ? 0.5 : 1.0;
    Tensor h = layer_out(a, g.m.num_rows, grad, only);
    run(g.m, a, g.m.num_rows, !only);
    return h;
  }

  // The layer before the last one back: h1 = g + Â g, h <- g + Â h.
  std::optional<Layers> layers(int64_t num_layers, int64_t split) const {
    Layers h(g.m, first(false), split, false);
    for (int64_t l = 2; l < num_layers; ++l) {
      if (!h.next(args(), grad, nullptr)) return std::nullopt;
    }
    return h;
  }
  std::optional<Layers> layers(int64_t num_layers) const {
    return with_sides(g.m, num_layers > 2, [&](int64_t split) { return layers(num_layers, split); });
  }
};

// The layers before were of all rows, and each of them was checked.
void check_sides(bool good) {
  if (!good) fail("rowptr, col: changed while they were being read");
}

// The gradient of propagate(...)[rows] with respect to x. Â is symmetric, so it is the same Horner form, started from
// the gradient's own rows: h1 = g + Â g, h <- g + Â h. grad: [len(rows), d]; rows ascending, each once.
Tensor backward_rows(const Graph& g, const Tensor& grad, int64_t num_layers, const std::vector<int64_t>& rows,
                     bool mixed) {
  const int64_t nodes = g.m.num_rows;
  if (num_layers == 0) return scatter_rows(grad, rows, nodes);
  const FromRows from(g, grad, rows, mixed);
  if (num_layers == 1) return from.first(true);
  std::optional<Layers> h = from.layers(num_layers);
  SpmmArgs a = from.args();
  a.alpha = 1.0 / static_cast<double>(num_layers + 1);
  const std::optional<Tensor> out = h->finish(a, grad);
  check_sides(out.has_value());
  return *out;
}

bool ascending(const int64_t* rows, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    if (rows[i - 1] >= rows[i]) return false;
  }
  return true;
}

Tensor backward_as(const Tensor& rowptr, const Tensor& col, const Tensor& scale, const Tensor& grad, int64_t num_layers,
                   const OptTensor& rows, bool mixed) {
  if (!rows) return propagate_as(rowptr, col, scale, grad, num_layers, std::nullopt, mixed);
  check_table(grad, "grad");
  check_size(grad, "grad", 0, rows->numel());
  const ScalarType type = grad.scalar_type(), acc = accumulate_type(type);
  const Graph g = graph_of(rowptr, col, scale, type);
  MMKD_CHECK(g.m.num_rows <= INT32_MAX, "rowptr: row-restricted propagation takes up to 2^31 - 1 nodes, got ",
             g.m.num_rows);
  const int64_t* r = rows_of(*rows, g.m.num_rows);
  // 16-bit gradients are propagated in float32: the sums of a row's neighbours need it anyway.
  const Tensor wide = type == acc ? grad : torch::stable::to(grad, acc);
  const int64_t n = rows->numel();
  Tensor sums = wide;  // gradients of repeated rows, added
  std::vector<int64_t> unique;
  if (ascending(r, n)) {
    unique.assign(r, r + n);
  } else {
    sums = empty({n, grad.size(1)}, wide);
    acc == ScalarType::Double ? unique_rows(r, n, data<double>(wide), grad.size(1), unique, mutable_data<double>(sums))
                              : unique_rows(r, n, data<float>(wide), grad.size(1), unique, mutable_data<float>(sums));
  }
  const Tensor out = backward_rows(g, sums, num_layers, unique, mixed);
  return type == acc ? out : torch::stable::to(out, type);
}

Tensor propagate_backward(Tensor rowptr, Tensor col, Tensor scale, Tensor grad, int64_t num_layers, OptTensor rows,
                          OptTensor /*plan*/) {
  return backward_as(rowptr, col, scale, grad, num_layers, rows, false);
}

Tensor propagate_mixed_backward(Tensor rowptr, Tensor col, Tensor scale, Tensor grad, int64_t num_layers,
                                OptTensor rows) {
  check_type(grad, "grad", ScalarType::Float);
  return backward_as(rowptr, col, scale, grad, num_layers, rows, true);
}

void* stepped(const Tensor& t, const char* name, const Tensor& like, int64_t num_nodes) {
  check_table(t, name);
  check_type(t, name, like.scalar_type());
  check_size(t, name, 0, num_nodes);
  check_size(t, name, 1, like.size(1));
  return const_cast<void*>(t.const_data_ptr());
}

void dense_step(const Tensor& grad, const AdamwArgs& step, const int32_t* place) {
  for_range(grad.size(0), 256, [&](int64_t begin, int64_t end) {
    MMKD_ON_ISA(adamw_rows(step, dtype_of(grad), grad.const_data_ptr(), place, grad.size(1), begin, end));
  });
}

// A step of AdamW on x with the gradient of propagate(...)[rows]: the last layer back is not written anywhere, each of
// its rows goes into the step of its row of weights.
void propagate_adamw(Tensor rowptr, Tensor col, Tensor scale, Tensor grad, int64_t num_layers, Tensor rows,
                     OptTensor l2, Tensor weight, Tensor exp_avg, Tensor exp_avg_sq, double lr, double beta1,
                     double beta2, double eps, double weight_decay, int64_t step, bool mixed) {
  check_table(grad, "grad");
  const ScalarType type = grad.scalar_type();
  MMKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "grad: expected float32 or float64, got ",
             torch::headeronly::toString(type));
  MMKD_CHECK(!mixed || type == ScalarType::Float, "grad: expected float32 where bfloat16 is gathered, got ",
             torch::headeronly::toString(type));
  const Graph g = graph_of(rowptr, col, scale, type);
  const int64_t nodes = g.m.num_rows, n = rows.numel();
  MMKD_CHECK(nodes <= INT32_MAX, "rowptr: expected up to 2^31 - 1 nodes, got ", nodes);
  MMKD_CHECK(num_layers >= 0, "num_layers: expected >= 0, got ", num_layers);
  MMKD_CHECK(step >= 1, "step: expected >= 1, got ", step);
  const int64_t* r = rows_of(rows, nodes);
  check_size(grad, "grad", 0, n);
  MMKD_CHECK(ascending(r, n), "rows: expected node ids in ascending order, each once");
  AdamwArgs adamw{stepped(weight, "weight", grad, nodes),
                  stepped(exp_avg, "exp_avg", grad, nodes),
                  stepped(exp_avg_sq, "exp_avg_sq", grad, nodes),
                  scale_of(l2, "l2", n, type),
                  lr,
                  beta1,
                  beta2,
                  eps,
                  weight_decay,
                  std::sqrt(1 - std::pow(beta2, static_cast<double>(step))),
                  lr / (1 - std::pow(beta1, static_cast<double>(step)))};
  const std::vector<int64_t> unique(r, r + n);
  const FromRows from(g, grad, unique, mixed);
  if (num_layers < 2 || grad.size(1) % 16 != 0) {
    dense_step(backward_rows(g, grad, num_layers, from.rows, mixed), adamw, from.place.data());
    return;
  }
  std::optional<Layers> h = from.layers(num_layers);
  SpmmArgs a = from.args();
  a.alpha = 1.0 / static_cast<double>(num_layers + 1);
  a.adamw = &adamw;
  check_sides(h->last(a, nodes));
}

}  // namespace

}  // namespace mmkd

STABLE_TORCH_LIBRARY_IMPL(mmkd, CPU, m) {
  m.impl("spmm", TORCH_BOX(&mmkd::spmm));
  m.impl("sddmm", TORCH_BOX(&mmkd::sddmm));
  m.impl("csr_transpose", TORCH_BOX(&mmkd::csr_transpose));
  m.impl("propagate", TORCH_BOX(&mmkd::propagate));
  m.impl("propagate_backward", TORCH_BOX(&mmkd::propagate_backward));
  m.impl("propagate_mixed", TORCH_BOX(&mmkd::propagate_mixed));
  m.impl("propagate_mixed_backward", TORCH_BOX(&mmkd::propagate_mixed_backward));
  m.impl("propagate_adamw", TORCH_BOX(&mmkd::propagate_adamw));
}
