// From a tensor's dtype to the type of its elements.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

#include "cpu/elements.h"

namespace resnest_fused::cpu {

// Call f with a value of the stored type of the dtype.
template <typename F>
void for_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

template <typename A>
inline constexpr auto kAccDtype = std::is_same_v<A, double> ? torch::headeronly::ScalarType::Double
                                                            : torch::headeronly::ScalarType::Float;

// Whether kernels that accumulate in A read this stored type without converting it first.
template <typename A, typename T>
inline constexpr bool kReads = std::is_same_v<Acc<T>, A>;

}  // namespace resnest_fused::cpu
