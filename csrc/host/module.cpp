// mmkd._host: C++ over NumPy arrays. Every function lets go of the interpreter lock while it works.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "cpu/isa.h"
#include "host/check.h"
#include "host/compact.h"
#include "host/csr.h"
#include "host/sampler.h"

namespace py = pybind11;

namespace mmkd::host {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
void check_rank(const Array<T>& a, const char* name, int rank) {
  if (a.ndim() != rank) refuse(name, ": expected ", rank, " dimension(s), got ", a.ndim());
}

template <class Col>
CsrView<Col> view(const Array<int64_t>& rowptr, const Array<Col>& col, int64_t num_cols) {
  check_rank(rowptr, "rowptr", 1);
  check_rank(col, "col", 1);
  return {rowptr.data(), col.data(), rowptr.size() - 1, num_cols, col.size()};
}

// The vector's memory as an array; nothing is copied.
template <class T>
py::array_t<T> array_of(std::vector<T>&& v) {
  auto* owned = new std::vector<T>(std::move(v));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple arrays_of(Csr&& m) { return py::make_tuple(array_of(std::move(m.rowptr)), array_of(std::move(m.col))); }

template <class Col>
bool py_check_csr(const Array<int64_t>& rowptr, const Array<Col>& col, int64_t num_cols) {
  const CsrView<Col> m = view(rowptr, col, num_cols);
  const py::gil_scoped_release released;
  return check_csr(m);
}

py::tuple py_csr_from_edges(const Array<int64_t>& rows, const Array<int64_t>& cols, int64_t num_rows,
                            int64_t num_cols) {
  check_rank(rows, "rows", 1);
  check_rank(cols, "cols", 1);
  if (rows.size() != cols.size()) refuse("rows, cols: expected equal lengths, got ", rows.size(), " and ", cols.size());
  Csr m;
  {
    const py::gil_scoped_release released;
    m = csr_from_edges(rows.data(), cols.data(), rows.size(), num_rows, num_cols);
  }
  return arrays_of(std::move(m));
}

py::tuple py_csr_transpose(const Array<int64_t>& rowptr, const Array<int32_t>& col, int64_t num_cols) {
  const CsrView<int32_t> m = view(rowptr, col, num_cols);
  Csr t;
  {
    const py::gil_scoped_release released;
    t = csr_transpose(m);
  }
  return arrays_of(std::move(t));
}

py::tuple py_csr_rows(const Array<int64_t>& rowptr, const Array<int32_t>& col, const Array<int64_t>& rows) {
  const CsrView<int32_t> m = view(rowptr, col, 0);  // columns are copied, not looked at
  check_rank(rows, "rows", 1);
  if (rowptr.size() == 0) refuse("rowptr: expected num_rows + 1 entries, got none");
  Csr part;
  {
    const py::gil_scoped_release released;
    part = csr_rows(m, rows.data(), rows.size());
  }
  return arrays_of(std::move(part));
}

template <class Col>
Sampler make_sampler(const Array<int64_t>& rowptr, const Array<Col>& col, int64_t num_items, int rounds, bool by_pair) {
  const CsrView<Col> m = view(rowptr, col, num_items);
  const py::gil_scoped_release released;
  return Sampler(m, rounds, by_pair);
}

py::tuple py_batch(const Sampler& sampler, uint64_t seed, uint32_t epoch, uint32_t step, int64_t size,
                   int64_t num_negatives, int threads) {
  if (size < 0 || size > UINT32_MAX) refuse("size: expected 0 to 2^32 - 1, got ", size);
  if (num_negatives < 1 || num_negatives > 4 << 16) refuse("num_negatives: expected 1 to 2^18, got ", num_negatives);
  py::array_t<int64_t> users(size), candidates({size, num_negatives + 1});
  {
    int64_t *u = users.mutable_data(), *c = candidates.mutable_data();
    const py::gil_scoped_release released;
    sampler.batch({seed, epoch, step}, size, num_negatives, u, c, threads);
  }
  return py::make_tuple(users, candidates);
}

py::tuple py_compact(const Array<int64_t>& users, const Array<int64_t>& candidates, int64_t num_users,
                     int64_t num_items, const std::optional<Array<int64_t>>& extra, int64_t multiple) {
  check_rank(users, "users", 1);
  check_rank(candidates, "candidates", 2);
  if (candidates.shape(0) != users.size()) {
    refuse("candidates: expected ", users.size(), " rows like users, got ", candidates.shape(0));
  }
  if (extra) check_rank(*extra, "extra", 1);
  const BatchView batch{users.data(),
                        candidates.data(),
                        extra ? extra->data() : nullptr,
                        users.size(),
                        candidates.shape(1),
                        extra ? extra->size() : 0,
                        num_users,
                        num_items};
  isa();  // a wrong MMKD_CPU_ISA raises here
  std::optional<Compact> compact;
  {
    const py::gil_scoped_release released;
    compact.emplace(batch, multiple);
  }
  py::array_t<int64_t> rows(compact->num_rows()), own(batch.size), local({batch.size, batch.width});
  py::array_t<int64_t> others(batch.num_extra), touched(compact->num_touched());
  py::array_t<float> counts(compact->num_rows()), touched_counts(compact->num_touched());
  const Localised out{rows.mutable_data(),          own.mutable_data(),    local.mutable_data(),
                      others.mutable_data(),        counts.mutable_data(), touched.mutable_data(),
                      touched_counts.mutable_data()};
  {
    const py::gil_scoped_release released;
    compact->localise(batch, out);
  }
  return py::make_tuple(rows, compact->num_local_users(), own, local, others, counts, touched, touched_counts);
}

}  // namespace
}  // namespace mmkd::host

PYBIND11_MODULE(_host, m) {
  using namespace mmkd::host;
  using py::arg;
  m.doc() = "C++ over NumPy arrays: CSR from pairs, the sampler, compact batches";
  const char* check_doc =
      "Refuses a malformed CSR with ValueError; returns whether the columns of every row are strictly ascending.";
  m.def("check_csr", &py_check_csr<int32_t>, arg("rowptr").noconvert(), arg("col").noconvert(), arg("num_cols"),
        check_doc);
  m.def("check_csr", &py_check_csr<int64_t>, arg("rowptr").noconvert(), arg("col").noconvert(), arg("num_cols"),
        check_doc);
  m.def("csr_from_edges", &py_csr_from_edges, arg("rows").noconvert(), arg("cols").noconvert(), arg("num_rows"),
        arg("num_cols"),
        "Distinct pairs as (rowptr int64 [num_rows + 1], col int32 [nnz]), columns ascending. ids: int64 [n].");
  m.def("csr_transpose", &py_csr_transpose, arg("rowptr").noconvert(), arg("col").noconvert(), arg("num_cols"),
        "The transposed pattern as (rowptr int64 [num_cols + 1], col int32 [nnz]), columns ascending.");
  m.def("csr_rows", &py_csr_rows, arg("rowptr").noconvert(), arg("col").noconvert(), arg("rows").noconvert(),
        "Rows `rows` (int64 [n], any order) of a pattern, as (rowptr int64 [n + 1], col int32 [their entries]).");
  m.def(
      "compact", &py_compact, arg("users").noconvert(), arg("candidates").noconvert(), arg("num_users"),
      arg("num_items"), arg("extra").noconvert() = py::none(), arg("multiple") = 1,
      "The nodes of a batch, each once: (rows int64 [n], number of users among them, users [B] and candidates [B, K] "
      "as "
      "positions among the users and the items of rows, extra nodes as positions in rows, counts float32 [n] of (user, "
      "candidates 0 and 1), the nodes that have a count, their counts). Users and items ascend. Behind either, and "
      "behind "
      "the nodes with a count, come nodes without one that fill up to a multiple of `multiple`.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { mmkd::set_isa(name.c_str()); }, arg("name"),
      "Draws with the kernels of that instruction set; an empty name goes back to the best one.");
  py::class_<Sampler>(m, "Sampler", "Draws batches; mmkd.data.Sampler is its door.")
      .def(py::init(&make_sampler<int32_t>), arg("rowptr").noconvert(), arg("col").noconvert(), arg("num_items"),
           arg("rounds"), arg("by_pair") = false)
      .def(py::init(&make_sampler<int64_t>), arg("rowptr").noconvert(), arg("col").noconvert(), arg("num_items"),
           arg("rounds"), arg("by_pair") = false)
      .def("batch", &py_batch, arg("seed"), arg("epoch"), arg("step"), arg("size"), arg("num_negatives"),
           arg("threads") = 1, "(users int64 [size], candidates int64 [size, num_negatives + 1], positive first).");
}
