// The instruction set that `dispatch` uses on this machine.
#include "cpu/instruction_set.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace resnest_fused::cpu {
namespace {

#if defined(__x86_64__)
// Every CPU with AVX2 has F16C, but a virtual machine may hide it. Clang has no name for it.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

Capability best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Capability::kAvx512 : Capability::kAvx2;
  }
#endif
  return Capability::kBaseline;
}

Capability chosen_capability() {
  const Capability best = best_capability();
  const char* wanted = std::getenv("RESNEST_FUSED_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  for (const Capability c : {Capability::kBaseline, Capability::kAvx2, Capability::kAvx512}) {
    if (std::string(wanted) == capability_name(c)) {
      if (c > best) {
        throw std::runtime_error(std::string("RESNEST_FUSED_CPU_CAPABILITY: expected at most ") +
                                 capability_name(best) + ", the best of this machine, got '" +
                                 wanted + "'");
      }
      return c;
    }
  }
  throw std::runtime_error(
      std::string("RESNEST_FUSED_CPU_CAPABILITY: expected baseline, avx2 or avx512, got '") +
      wanted + "'");
}

}  // namespace

const char* capability_name(Capability c) {
  switch (c) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    case Capability::kBaseline:
      break;
  }
  return "baseline";
}

Capability capability() {
  static const Capability chosen = chosen_capability();
  return chosen;
}

}  // namespace resnest_fused::cpu
