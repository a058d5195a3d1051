// Defines the ops and registers those on the CPU. The Python module _C has the facts of this build
// and the planner of CUDA launches.

#include <torch/csrc/stable/library.h>

#include <map>
#include <string>

#include "calls.h"
#include "cpu/instruction_set.h"
#include "cuda/plan_python.h"
#include "kernels.h"
#include "ops_generated.h"
#include "pybind.h"

STABLE_TORCH_LIBRARY(resnest_fused, m) { resnest_fused::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(resnest_fused, CPU, m) {
  resnest_fused::implement_ops<resnest_fused::Calls<resnest_fused::cpu::Kernels>>(m);
}

namespace {

// resnest_fused/backends/binary.py looks for this text in the file before loading it. A literal may
// be in several pieces there, an object is not.
[[gnu::used]] constexpr char kSources[] = RESNEST_FUSED_SOURCES;

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
      {"sources", kSources},
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
  resnest_fused::cuda::define_plan(m);
}
