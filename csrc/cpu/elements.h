// The types of a map's elements, and of their sums.
#pragma once

#include <cstdint>
#include <type_traits>

namespace resnest_fused::cpu {

// As stored.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a dtype is accumulated in.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace resnest_fused::cpu
