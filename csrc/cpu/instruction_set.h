// The instruction sets that kernels are compiled for, and the choice among them at run time.
//
// A kernel is a struct with a static `run<Isa>(arguments...)` marked RF_INLINE; `dispatch<Kernel>`
// calls it inside a function that is compiled for the best instruction set of this machine. All it
// calls must be RF_INLINE too, so that it is compiled for that set.
#pragma once

#define RF_INLINE inline __attribute__((always_inline))

namespace resnest_fused::cpu {

// kBytes: the size of a register, which a vector fills.
#if defined(__x86_64__)
struct Baseline {  // SSE2
  static constexpr int kBytes = 16;
};
struct Avx2 {  // with FMA and F16C
  static constexpr int kBytes = 32;
};
struct Avx512 {  // F, BW, DQ and VL
  static constexpr int kBytes = 64;
};
#else
struct Baseline {  // NEON on aarch64, and what the compiler makes of 16 bytes elsewhere
  static constexpr int kBytes = 16;
};
#endif

// The most of all sets, for buffers that fit any.
inline constexpr int kWidestBytes = 64;

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this machine, or the lower one that RESNEST_FUSED_CPU_CAPABILITY
// (baseline, avx2, avx512) names.
Capability capability();
const char* capability_name(Capability capability);

#if defined(__x86_64__)

template <typename Kernel, typename... Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"),
               noinline)) void run_avx512(Args... args) {
  Kernel::template run<Avx512>(args...);
}

template <typename Kernel, typename... Args>
__attribute__((target("avx2,fma,f16c"), noinline)) void run_avx2(Args... args) {
  Kernel::template run<Avx2>(args...);
}

#endif

template <typename Kernel, typename... Args>
RF_INLINE void dispatch(Args... args) {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::kAvx512:
      return run_avx512<Kernel>(args...);
    case Capability::kAvx2:
      return run_avx2<Kernel>(args...);
    case Capability::kBaseline:
      break;
  }
#endif
  Kernel::template run<Baseline>(args...);
}

}  // namespace resnest_fused::cpu
