// The namespace and the schema of every op, for all devices. Implementations register themselves beside their code.
#include <string>

#include "check.h"
#include "cpu/isa.h"

namespace mmkd {
namespace {

std::string cpu_isa() { return isa_name(isa()); }

// "" goes back to the best one.
std::string set_cpu_isa(std::string name) {
  set_isa(name.c_str());
  return isa_name(isa());
}

}  // namespace
}  // namespace mmkd

STABLE_TORCH_LIBRARY(mmkd, m) {
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> str");
  m.def("release_memory() -> int");  // bytes of the CPU ops' kept blocks that went back to the system
  m.def(
      "spmm(Tensor rowptr, Tensor col, Tensor x, Tensor? value, Tensor? row_scale, Tensor? col_scale, "
      "Tensor? t_rowptr, Tensor? t_col, Tensor? plan=None, Tensor? t_plan=None) -> Tensor");
  // How the GPU kernels cut a matrix's rows into even work; what is in it is theirs.
  m.def("spmm_plan(Tensor rowptr, int nnz) -> Tensor");
  m.def("sddmm(Tensor rowptr, Tensor col, Tensor a, Tensor b, Tensor? row_scale, Tensor? col_scale) -> Tensor");
  m.def("csr_transpose(Tensor rowptr, Tensor col, int num_cols) -> (Tensor, Tensor, Tensor)");
  m.def(
      "propagate(Tensor rowptr, Tensor col, Tensor scale, Tensor x, int num_layers, Tensor? rows, Tensor? plan=None) "
      "-> Tensor");
  m.def(
      "propagate_backward(Tensor rowptr, Tensor col, Tensor scale, Tensor grad, int num_layers, Tensor? rows, "
      "Tensor? plan=None) -> Tensor");
  // The same with layers in bfloat16, x and what comes back in float32.
  m.def("propagate_mixed(Tensor rowptr, Tensor col, Tensor scale, Tensor x, int num_layers, Tensor? rows) -> Tensor");
  m.def(
      "propagate_mixed_backward(Tensor rowptr, Tensor col, Tensor scale, Tensor grad, int num_layers, Tensor? rows) -> "
      "Tensor");
  // Steps `weight` and AdamW's moments in place; `l2` and `grad` have an entry for each of `rows`, ascending.
  m.def(
      "propagate_adamw(Tensor rowptr, Tensor col, Tensor scale, Tensor grad, int num_layers, Tensor rows, Tensor? l2, "
      "Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int step, bool mixed=False) -> ()");
  // Losses are scalars in the accumulator type. A gradient that is not needed comes back as an empty tensor.
  m.def(
      "bpr_kd(Tensor user_emb, Tensor item_emb, Tensor users, Tensor pos, Tensor neg, Tensor? teacher_margin, "
      "float tau, bool bernoulli) -> (Tensor bpr, Tensor pair_kd, Tensor margin)");
  m.def(
      "bpr_kd_backward(Tensor grad_bpr, Tensor grad_pair, Tensor user_emb, Tensor item_emb, Tensor users, "
      "Tensor pos, Tensor neg, Tensor margin, Tensor? teacher_margin, float tau, bool bernoulli, bool need_user, "
      "bool need_item, bool need_teacher) -> (Tensor, Tensor, Tensor)");
  m.def(
      "bpr_kd_scores(Tensor margin, Tensor? teacher_margin, float tau, bool bernoulli) -> (Tensor bpr, Tensor "
      "pair_kd)");
  m.def(
      "bpr_kd_scores_backward(Tensor grad_bpr, Tensor grad_pair, Tensor margin, Tensor? teacher_margin, float tau, "
      "bool bernoulli, bool need_student, bool need_teacher) -> (Tensor, Tensor)");
  m.def("list_scores(Tensor user_emb, Tensor item_emb, Tensor users, Tensor candidates) -> Tensor");
  m.def(
      "list_scores_backward(Tensor grad, Tensor user_emb, Tensor item_emb, Tensor users, Tensor candidates, "
      "bool need_user, bool need_item) -> (Tensor, Tensor)");
  m.def(
      "list_kd(Tensor user_emb, Tensor item_emb, Tensor users, Tensor candidates, Tensor teacher_logits, Tensor "
      "modality_weights, float alpha, float beta, float tau, bool coupled) -> (Tensor loss, Tensor logits)");
  m.def(
      "list_kd_backward(Tensor grad, Tensor user_emb, Tensor item_emb, Tensor users, Tensor candidates, Tensor "
      "teacher_logits, Tensor modality_weights, Tensor logits, float alpha, float beta, float tau, bool coupled, "
      "bool need_user, bool need_item, bool need_teacher) -> (Tensor, Tensor, Tensor)");
  m.def(
      "list_kd_scores(Tensor student_logits, Tensor teacher_logits, Tensor modality_weights, float alpha, float "
      "beta, float tau, bool coupled) -> Tensor");
  m.def(
      "list_kd_scores_backward(Tensor grad, Tensor student_logits, Tensor teacher_logits, Tensor modality_weights, "
      "float alpha, float beta, float tau, bool coupled, bool need_student, bool need_teacher) -> (Tensor, Tensor)");
  m.def(
      "emb_kd(Tensor student, Tensor teachers, Tensor modality_weights, float gamma, bool with_grad) -> (Tensor loss, "
      "Tensor stats, Tensor grad_student)");
  m.def(
      "emb_kd_backward(Tensor grad, Tensor student, Tensor teachers, Tensor modality_weights, Tensor stats, "
      "float gamma, bool need_student, bool need_teachers) -> (Tensor, Tensor)");
  // The weighted sum of the student's losses, each of them, and the gradients of the sum, made on the way: there is no
  // backward op, autograd hands them over (and may scale them in place: they are its own).
  m.def(
      "distill(Tensor table, int num_users, Tensor users, Tensor candidates, Tensor? teacher_margin, Tensor? "
      "teacher_logits, Tensor nodes, Tensor? targets, Tensor list_weights, Tensor emb_weights, float bpr, float pair, "
      "float list, float emb, float pair_tau, bool bernoulli, float alpha, float beta, float list_tau, bool coupled, "
      "float gamma, bool need_table, bool need_margin, bool need_logits, bool need_targets) -> (Tensor loss, Tensor "
      "terms, Tensor grad_table, Tensor grad_margin, Tensor grad_logits, Tensor grad_targets)");
  // Gradients that are not there are None; the one of `state` comes back.
  m.def(
      "frozen_teacher(Tensor content, Tensor design, Tensor ids, Tensor omega, Tensor state, Tensor nodes, Tensor "
      "candidates, int first_item) -> (Tensor margin, Tensor logits, Tensor targets, Tensor heads)");
  m.def(
      "frozen_teacher_backward(Tensor? grad_margin, Tensor? grad_logits, Tensor? grad_targets, Tensor content, Tensor "
      "design, Tensor ids, Tensor omega, Tensor state, Tensor nodes, Tensor candidates, Tensor heads, int first_item) "
      "-> Tensor");
  // distill of what frozen_teacher says, with its gradients.
  m.def(
      "distill_frozen(Tensor table, int num_users, Tensor users, Tensor candidates, Tensor nodes, Tensor content, "
      "Tensor design, Tensor ids, Tensor omega, Tensor state, Tensor asked, Tensor listed, int first_item, Tensor "
      "list_weights, "
      "Tensor emb_weights, float bpr, float pair, float list, float emb, float pair_tau, bool bernoulli, float alpha, "
      "float beta, float list_tau, bool coupled, float gamma, bool need_table, bool need_state) -> (Tensor loss, "
      "Tensor "
      "terms, Tensor grad_table, Tensor grad_state)");
  // distill_frozen of propagate(table)[rows] and the prompt's state V V^T mixed, and 1/2 sum l2 ||table[rows]||^2:
  // terms are the loss's five summands, gradients those of the propagated rows and of the prompt.
  m.def(
      "student(Tensor rowptr, Tensor col, Tensor scale, Tensor table, int num_layers, Tensor rows, bool mixed_layers, "
      "Tensor? l2, int num_users, Tensor users, Tensor candidates, Tensor nodes, Tensor content, Tensor design, Tensor "
      "ids, Tensor omega, Tensor prompt_weight, Tensor prompt_bias, Tensor mixed, Tensor asked, Tensor listed, int "
      "first_item, Tensor list_weights, Tensor emb_weights, float bpr, float pair, float list, float emb, float "
      "pair_tau, bool bernoulli, float alpha, float beta, float list_tau, bool coupled, float gamma, bool need_table, "
      "bool need_prompt) -> (Tensor loss, Tensor terms, Tensor grad_rows, Tensor grad_weight, Tensor grad_bias)");
  // joint BPR(E^T) + modality sum_m BPR(F^m) + by_prompt BPR(p) at a batch's rows, E^T = ids + sum_m omega_m
  // rownorm(F^m): terms are the three summands.
  m.def(
      "teacher(Tensor ids, Tensor user_features, Tensor item_features, Tensor? prompt, Tensor users, Tensor pos, "
      "Tensor neg, Tensor omega, float joint, float modality, float by_prompt, bool need_ids, bool need_users, bool "
      "need_items, bool need_prompt) -> (Tensor loss, Tensor terms, Tensor grad_ids, Tensor grad_users, Tensor "
      "grad_items, Tensor grad_prompt)");
  // mask * ([scales_m * (tables_m weights_m)] + design added), tables side by side. A weight with one row more than its
  // table has columns adds that row; an empty tensor among `scales` is none. The way back gives the gradients of the
  // weights (empty where they are not needed), then that of `added`.
  m.def(
      "project(Tensor[] tables, Tensor[] weights, Tensor[] scales, Tensor? design, Tensor? added, Tensor? mask) -> "
      "Tensor");
  m.def(
      "project_backward(Tensor grad, Tensor[] tables, int[] weight_rows, Tensor[] scales, Tensor? design, Tensor? "
      "mask, "
      "bool need_weights) -> Tensor[]");
  m.def(
      "topk(Tensor user_emb, Tensor item_emb, int k, Tensor? users, Tensor? rowptr, Tensor? col) -> (Tensor scores, "
      "Tensor ids)");
}

STABLE_TORCH_LIBRARY_IMPL(mmkd, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&mmkd::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&mmkd::set_cpu_isa));
}
