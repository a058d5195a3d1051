// The instruction sets that the kernels are compiled for, and the choice among them at run time.
//
// The files in kernels/ are compiled once for each, by baseline.cpp, avx2.cpp and avx512.cpp, into
// a namespace of its own; kernels.cpp calls those of the best one.
#pragma once

namespace resnest_fused::cpu {

enum class Capability {
  kBaseline,  // SSE2 on x86-64, NEON on aarch64
  kAvx2,      // with FMA and F16C
  kAvx512,    // F, BW, DQ and VL
};

// The best instruction set of this machine, or the lower one that RESNEST_FUSED_CPU_CAPABILITY
// (baseline, avx2, avx512) names.
Capability capability();
const char* capability_name(Capability capability);

}  // namespace resnest_fused::cpu
