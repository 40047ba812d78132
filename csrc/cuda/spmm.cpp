// spmm, sddmm, csr_transpose and LightGCN propagation for CUDA tensors (spec section 2). Nothing here waits for the
// device: sizes that only the device knows are bounded from above.
#include "cuda/context.h"
#include "cuda/scatter.h"
#include "cuda/spmm_kernel.h"

namespace mmkd::cuda {
namespace {

// Entries and rows in a piece of the plan: long enough to pay for itself, short enough to fill the device.
constexpr int64_t kPiece = 128;

// name: the argument that has num_cols rows.
Csr csr_of(const Tensor& rowptr, const Tensor& col, int64_t num_cols, const char* name = "x") {
  check_index(rowptr, "rowptr");
  check_dim(col, "col", 1);
  check_dense(col, "col");
  const bool col64 = col.scalar_type() == ScalarType::Long;
  MMKD_CHECK(col64 || col.scalar_type() == ScalarType::Int, "col: expected dtype int32 or int64, got ",
             torch::headeronly::toString(col.scalar_type()));
  MMKD_CHECK(rowptr.numel() >= 1, "rowptr: expected num_rows + 1 entries, got none");
  const int64_t rows = rowptr.numel() - 1;
  MMKD_CHECK(num_cols <= INT32_MAX, name, ": expected at most 2^31 - 1 rows, got ", num_cols);
  MMKD_CHECK(rows > 0 || col.numel() == 0, "col: expected no entries, as rowptr has no rows, got ", col.numel());
  return {data<int64_t>(rowptr),
          col.const_data_ptr(),
          nullptr,
          data<int64_t>(rowptr),
          rows,
          rows,
          num_cols,
          col.numel(),
          col64};
}

const void* scale_of(const OptTensor& t, const char* name, int64_t size, ScalarType type) {
  if (!t) return nullptr;
  check_dim(*t, name, 1);
  check_size(*t, name, 0, size);
  check_like(*t, name, type);
  return t->const_data_ptr();
}

// A matrix with its work cut evenly, and the tensors that hold the cuts.
struct Planned {
  Csr m;
  int64_t segments;
  Tensor cut, offsets;
};

int64_t segments_of(int64_t work) { return std::max<int64_t>(1, (work + kPiece - 1) / kPiece); }

Planned plan(const Csr& m, int64_t work, const Tensor& like, const Device& device) {
  const int64_t segments = segments_of(work);
  Planned p{m, segments, empty({segments + 1, 2}, like, ScalarType::Long), like};
  if (m.n > 0) make_plan(m, segments, mutable_data<int64_t>(p.cut), device.stream());
  return p;
}

// `given`: what spmm_plan made for this matrix, or nothing.
Planned plan_all(const Csr& m, const OptTensor& given, const Tensor& like, const Device& device) {
  if (!given) return plan(m, m.nnz + m.n, like, device);
  const int64_t segments = segments_of(m.nnz + m.n);
  check_index(*given, "plan", 2);
  check_size(*given, "plan", 0, segments + 1);
  check_size(*given, "plan", 1, 2);
  return {m, segments, *given, like};
}

Tensor spmm_plan(Tensor rowptr, int64_t nnz) {
  check_index(rowptr, "rowptr");
  MMKD_CHECK(rowptr.numel() >= 1, "rowptr: expected num_rows + 1 entries, got none");
  const Device device(rowptr);
  Csr m{};
  m.rowptr = m.offsets = data<int64_t>(rowptr);
  m.n = m.num_rows = rowptr.numel() - 1;
  m.nnz = nnz;
  return plan_all(m, std::nullopt, rowptr, device).cut;
}

// The same for some rows. How many entries they have only the device knows: the number of pieces is a guess, and the
// pieces are as long as they must be.
Planned plan_rows(Csr m, const Tensor& rows, const Device& device) {
  m.n = rows.numel();
  m.rows = data<int64_t>(rows);
  Tensor degrees = empty({m.n + 1}, rows, ScalarType::Long);
  row_lengths(m.rowptr, m.rows, m.n, m.num_rows, mutable_data<int64_t>(degrees), device.stream());
  const Tensor offsets = cumsum(degrees);
  m.offsets = data<int64_t>(offsets);
  const int64_t per_row = 4 * (m.nnz / std::max<int64_t>(1, m.num_rows) + 1);
  Planned p = plan(m, std::min(m.n * per_row, 4 * (m.nnz + m.n)), rows, device);
  p.offsets = offsets;
  return p;
}

SpmmArgs args_of(const Planned& p, const Tensor& x) {
  SpmmArgs a{};
  a.m = p.m;
  a.cut = data<int64_t>(p.cut);
  a.segments = p.segments;
  a.dtype = dtype_of(x);
  a.d = x.size(1);
  a.alpha = 1.0;
  return a;
}

void run(SpmmArgs a, const Tensor& x, Tensor& out, const Device& device) {
  Tensor partial = empty({a.segments, 2, a.d}, x, accumulate_type(x.scalar_type()));
  a.x = x.const_data_ptr();
  a.partial = partial.mutable_data_ptr();
  a.out = out.mutable_data_ptr();
  a.wide = wide_rows(a.d, x, out) && reinterpret_cast<uintptr_t>(a.add) % 16 == 0;
  spmm(a, device.stream());
}

Tensor spmm_op(Tensor rowptr, Tensor col, Tensor x, OptTensor value, OptTensor row_scale, OptTensor col_scale,
               OptTensor /*t_rowptr*/, OptTensor /*t_col*/,  // the transpose is there for the backward pass
               OptTensor plan, OptTensor /*t_plan*/) {
  check_table(x, "x");
  const Device device(x);
  const Csr m = csr_of(rowptr, col, x.size(0));
  const ScalarType acc = accumulate_type(x.scalar_type());
  Tensor out = empty({m.n, x.size(1)}, x);
  const Planned p = plan_all(m, plan, rowptr, device);
  SpmmArgs a = args_of(p, x);
  a.value = scale_of(value, "value", m.nnz, acc);
  a.row_scale = scale_of(row_scale, "row_scale", m.n, acc);
  a.col_scale = scale_of(col_scale, "col_scale", x.size(0), acc);
  run(a, x, out, device);
  return out;
}

Tensor sddmm_op(Tensor rowptr, Tensor col, Tensor a, Tensor b, OptTensor row_scale, OptTensor col_scale) {
  check_table(a, "a");
  check_table(b, "b");
  check_type(b, "b", a.scalar_type());
  const Device device(a);
  const Csr m = csr_of(rowptr, col, b.size(0), "b");
  check_size(a, "a", 0, m.n);
  check_size(b, "b", 1, a.size(1));
  const ScalarType acc = accumulate_type(a.scalar_type());
  Tensor out = empty({m.nnz}, a, acc);
  const Planned p = plan_all(m, std::nullopt, rowptr, device);
  SddmmArgs args{m,
                 data<int64_t>(p.cut),
                 p.segments,
                 dtype_of(a),
                 wide_rows(a.size(1), a, b),
                 a.const_data_ptr(),
                 b.const_data_ptr(),
                 scale_of(row_scale, "row_scale", m.n, acc),
                 scale_of(col_scale, "col_scale", b.size(0), acc),
                 out.mutable_data_ptr(),
                 a.size(1)};
  sddmm(args, device.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> csr_transpose(Tensor rowptr, Tensor col, int64_t num_cols) {
  const Device device(rowptr);
  const Csr m = csr_of(rowptr, col, num_cols, "num_cols");
  MMKD_CHECK(num_cols >= 0, "num_cols: expected >= 0, got ", num_cols);
  MMKD_CHECK(m.col64 || m.num_rows <= INT32_MAX, "col: int32 cannot hold the ", m.num_rows, " row ids; pass int64");
  const auto [sorted, perm] = sort(col);
  Tensor out_rowptr = empty({num_cols + 1}, rowptr), out_col = empty({m.nnz}, col);
  transpose(m, sorted.const_data_ptr(), data<int64_t>(perm), mutable_data<int64_t>(out_rowptr),
            out_col.mutable_data_ptr(), device.stream());
  return {out_rowptr, out_col, perm};
}

Tensor identity_layers(const Tensor& x, const OptTensor& rows, const Device& device) {
  if (!rows) return torch::stable::clone(x);
  Tensor out = empty({rows->numel(), x.size(1)}, x);
  gather_rows(dtype_of(x), x.const_data_ptr(), data<int64_t>(*rows), rows->numel(), x.size(0), x.size(1),
              out.mutable_data_ptr(), device.stream());
  return out;
}

// Whether some rows' neighbours are few enough for the layer before the last to leave the other rows out: finding them
// costs a pass over entries, and what is left runs at a lower rate than all rows do. Neighbours drawn evenly would be
// 1 - exp(-n nnz / N^2) of the nodes.
bool few_neighbours(const Csr& m, int64_t n) {
  return static_cast<double>(n) * static_cast<double>(m.nnz) < static_cast<double>(m.n) * static_cast<double>(m.n);
}

// Horner's form: h <- x + Â h, num_layers times, then / (num_layers + 1).
Tensor propagate(Tensor rowptr, Tensor col, Tensor scale, Tensor x, int64_t num_layers, OptTensor rows,
                 OptTensor plan) {
  check_table(x, "x");
  MMKD_CHECK(num_layers >= 0, "num_layers: expected >= 0, got ", num_layers);
  const Device device(x);
  const Csr m = csr_of(rowptr, col, x.size(0));
  check_size(x, "x", 0, m.n);
  const void* s = scale_of(scale, "scale", m.n, accumulate_type(x.scalar_type()));
  if (rows) check_index(*rows, "rows");
  if (num_layers == 0) return identity_layers(x, rows, device);

  const int64_t d = x.size(1);
  const Planned all = rows && num_layers == 1 ? Planned{m, 0, rowptr, rowptr} : plan_all(m, plan, rowptr, device);
  const Planned asked = rows ? plan_rows(m, *rows, device) : all;
  Tensor h = x;
  for (int64_t l = 1; l < num_layers + 1; ++l) {
    const bool last = l == num_layers, restricted = rows && last;
    const Planned& p = restricted ? asked : all;
    SpmmArgs a = args_of(p, x);
    a.row_scale = a.col_scale = s;
    a.add = x.const_data_ptr();
    a.alpha = last ? 1.0 / static_cast<double>(num_layers + 1) : 1.0;
    a.compact = restricted;
    Tensor needed = rowptr;
    if (rows && l == num_layers - 1 && few_neighbours(m, rows->numel())) {
      // the other rows of `out` stay unwritten, and count for nothing
      needed = zeros({m.n}, x, ScalarType::Byte);
      mark_neighbours(asked.m, data<int64_t>(asked.cut), asked.segments, mutable_data<uint8_t>(needed),
                      device.stream());
      a.needed = data<uint8_t>(needed);
    }
    Tensor out = empty({restricted ? p.m.n : m.n, d}, x);
    run(a, h, out, device);
    h = out;
  }
  return h;
}

Tensor propagate_backward(Tensor rowptr, Tensor col, Tensor scale, Tensor grad, int64_t num_layers, OptTensor rows,
                          OptTensor plan) {
  if (!rows) return propagate(rowptr, col, scale, grad, num_layers, std::nullopt, plan);
  check_table(grad, "grad");
  check_index(*rows, "rows");
  check_size(grad, "grad", 0, rows->numel());
  const Device device(grad);
  const ScalarType type = grad.scalar_type(), acc = accumulate_type(type);
  const int64_t d = grad.size(1);
  Csr m = csr_of(rowptr, col, rowptr.numel() - 1);
  const void* s = scale_of(scale, "scale", m.n, acc);
  // 16-bit gradients are propagated in the accumulator type: the sums of repeated rows need it anyway.
  const Tensor wide = cast(grad, acc);
  Tensor start = zeros({m.n, d}, wide, acc), asked = zeros({m.n}, wide, ScalarType::Byte);
  add_rows(wide, *rows, start, device);
  mark_rows(data<int64_t>(*rows), rows->numel(), m.n, mutable_data<uint8_t>(asked), device.stream());

  // Â is symmetric, so this is Horner's form again, from a start that is zero outside `rows`.
  const Planned all = plan_all(m, plan, rowptr, device);
  Tensor h = start;
  for (int64_t l = 1; l <= num_layers; ++l) {
    SpmmArgs a = args_of(all, start);
    a.row_scale = a.col_scale = s;
    a.add = start.const_data_ptr();
    a.add_mask = data<uint8_t>(asked);
    a.active = l == 1 ? a.add_mask : nullptr;
    a.alpha = l == num_layers ? 1.0 / static_cast<double>(num_layers + 1) : 1.0;
    Tensor out = empty({m.n, d}, start);
    run(a, h, out, device);
    h = out;
  }
  return cast(h, type);
}

}  // namespace
}  // namespace mmkd::cuda

MMKD_CUDA_IMPL(m) {
  m.impl("spmm", TORCH_BOX(&mmkd::cuda::spmm_op));
  m.impl("spmm_plan", TORCH_BOX(&mmkd::cuda::spmm_plan));
  m.impl("sddmm", TORCH_BOX(&mmkd::cuda::sddmm_op));
  m.impl("csr_transpose", TORCH_BOX(&mmkd::cuda::csr_transpose));
  m.impl("propagate", TORCH_BOX(&mmkd::cuda::propagate));
  m.impl("propagate_backward", TORCH_BOX(&mmkd::cuda::propagate_backward));
}
