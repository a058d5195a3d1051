// Every op's schema, once for all libraries that define the ops.
//
// The arguments are described in resnest_fused/functional.py, the results in calls.h.
// Ops are functional: no argument is written to, and no result shares memory with one.
#pragma once

namespace resnest_fused {

// A norm, absent without statistics; in the ops that take them from the batch a flag says so.
#define RF_NORM(bn)                                                                                \
  "Tensor? " bn "_weight, Tensor? " bn "_bias, Tensor? " bn "_mean, Tensor? " bn "_var, float " bn \
  "_eps, "
#define RF_BATCH_NORM(bn) RF_NORM(bn) "bool " bn "_batch_stats, "
#define RF_FCS "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "

// Define the ops on m, the handle that STABLE_TORCH_LIBRARY gives.
template <typename Library>
void define_ops(Library& m) {
  // All phases.
  m.def("split_attention(Tensor x, bool relu, " RF_NORM("bn0")
            RF_FCS RF_NORM("bn1") "int radix, int cardinality) -> Tensor");
  m.def("split_attention_train(Tensor x, bool relu, " RF_BATCH_NORM("bn0") RF_FCS RF_BATCH_NORM(
      "bn1") "int radix, int cardinality) -> "
             "(Tensor out, Tensor gap, Tensor hidden, Tensor attention, Tensor batch_mean0, "
             "Tensor batch_var0, Tensor batch_mean1, Tensor batch_var1)");
  m.def("split_attention_backward(Tensor dout, Tensor x, bool relu, " RF_BATCH_NORM("bn0")
        "Tensor fc1_weight, Tensor fc2_weight, " RF_BATCH_NORM("bn1")
        "Tensor gap, Tensor hidden, Tensor attention, int radix, int cardinality, bool[] needed) "
        "-> (Tensor dx, Tensor dbn0_weight, Tensor dbn0_bias, Tensor dfc1_weight, "
        "Tensor dfc1_bias, Tensor dfc2_weight, Tensor dfc2_bias, Tensor dbn1_weight, "
        "Tensor dbn1_bias)");
  // One phase each, for any modules between the pool and recombine.
  m.def("batch_statistics(Tensor x) -> (Tensor mean, Tensor var)");
  m.def("pool(Tensor x, bool relu, " RF_NORM("bn0") "int radix) -> Tensor");
  m.def("recombine(Tensor x, bool relu, " RF_NORM("bn0") "Tensor attention) -> Tensor");
  m.def("pool_backward(Tensor dout, Tensor x, bool relu, " RF_NORM(
      "bn0") "int radix) -> (Tensor dattention, Tensor sums)");
  m.def(
      "prologue_backward(Tensor sums, Tensor attention, Tensor dgap, int pixels) -> "
      "(Tensor dbn0_weight, Tensor dbn0_bias)");
  m.def("recombine_backward(Tensor dout, Tensor x, bool relu, " RF_NORM(
      "bn0") "Tensor attention, Tensor dgap, Tensor? mean_dz, Tensor? mean_dz_xhat) -> Tensor");
}

#undef RF_FCS
#undef RF_BATCH_NORM
#undef RF_NORM

}  // namespace resnest_fused
