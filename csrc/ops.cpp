// Every op's schema, and the Python module _C with the facts of this build.
//
// Arguments and results are described in cpu/split_attention.h and resnest_fused/functional.py.
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

#include "cpu/simd.h"
#include "cpu/split_attention.h"

#define RF_ATTENTION_ARGS                                                                \
  "Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, " \
  "Tensor? bn1_weight, Tensor? bn1_bias, Tensor? bn1_mean, Tensor? bn1_var, float bn1_eps, "

STABLE_TORCH_LIBRARY(resnest_fused, m) {
  m.def("split_attention(" RF_ATTENTION_ARGS "int radix, int cardinality) -> Tensor");
  m.def("split_attention_train(" RF_ATTENTION_ARGS
        "bool batch_stats, int radix, int cardinality) -> "
        "(Tensor out, Tensor gap, Tensor hidden, Tensor attention, Tensor batch_mean, "
        "Tensor batch_var)");
  m.def(
      "split_attention_backward(Tensor dout, Tensor x, Tensor fc1_weight, Tensor fc2_weight, "
      "Tensor? bn1_weight, Tensor? bn1_bias, Tensor? bn1_mean, Tensor? bn1_var, Tensor gap, "
      "Tensor hidden, Tensor attention, float bn1_eps, bool batch_stats, int radix, "
      "int cardinality, bool[] needed) -> "
      "(Tensor dx, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dfc2_weight, Tensor dfc2_bias, "
      "Tensor dbn1_weight, Tensor dbn1_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(resnest_fused, CPU, m) {
  m.impl("split_attention", TORCH_BOX(&resnest_fused::cpu::split_attention));
  m.impl("split_attention_train", TORCH_BOX(&resnest_fused::cpu::split_attention_train));
  m.impl("split_attention_backward", TORCH_BOX(&resnest_fused::cpu::split_attention_backward));
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
