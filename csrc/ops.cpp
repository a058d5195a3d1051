// Every op's schema, and the Python module _C with the facts of this build.
//
// Arguments and results are described in cpu/split_attention.h, cpu/phases.h and
// resnest_fused/functional.py.
// Ops are functional: no argument is written to, and no result shares memory with one.
// The pybind11 in torch's headers refuses the stable ABI, which it takes no part in here.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

#include "cpu/phases.h"
#include "cpu/simd.h"
#include "cpu/split_attention.h"

// A norm, absent without statistics; in the ops that take them from the batch a flag says so.
#define RF_NORM(bn)                                                                                \
  "Tensor? " bn "_weight, Tensor? " bn "_bias, Tensor? " bn "_mean, Tensor? " bn "_var, float " bn \
  "_eps, "
#define RF_BATCH_NORM(bn) RF_NORM(bn) "bool " bn "_batch_stats, "
#define RF_FCS "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "

STABLE_TORCH_LIBRARY(resnest_fused, m) {
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

STABLE_TORCH_LIBRARY_IMPL(resnest_fused, CPU, m) {
  using namespace resnest_fused;
  m.impl("split_attention", TORCH_BOX(&cpu::split_attention));
  m.impl("split_attention_train", TORCH_BOX(&cpu::split_attention_train));
  m.impl("split_attention_backward", TORCH_BOX(&cpu::split_attention_backward));
  using BatchStatistics = std::tuple<Tensor, Tensor> (*)(Tensor);
  m.impl("batch_statistics", TORCH_BOX(static_cast<BatchStatistics>(&cpu::batch_statistics)));
  m.impl("pool", TORCH_BOX(&cpu::pool));
  m.impl("recombine", TORCH_BOX(&cpu::recombine));
  m.impl("pool_backward", TORCH_BOX(&cpu::pool_backward));
  m.impl("prologue_backward", TORCH_BOX(&cpu::prologue_backward));
  m.impl("recombine_backward", TORCH_BOX(&cpu::recombine_backward));
}

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"version", RESNEST_FUSED_VERSION},
      {"torch_version", RESNEST_FUSED_TORCH_VERSION},
      {"compiler", compiler()},
      {"cxx_flags", RESNEST_FUSED_CXX_FLAGS},
      {"cuda_status", RESNEST_FUSED_CUDA_STATUS},
      {"cuda_archs", RESNEST_FUSED_CUDA_ARCHS},
      {"cpu_capability", resnest_fused::cpu::capability_name(resnest_fused::cpu::capability())},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native ops of resnest_fused (registered on import) and the facts of their build.";
  m.def("build_info", &build_info);
}
