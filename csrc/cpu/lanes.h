// The sums of the lanes of several vectors at once, which costs far less than one after the other.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/simd.h"

namespace resnest_fused::cpu {

// Lanes `index` of the two vectors laid end to end.
template <typename A, size_t... index>
RF_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>(index)...);
#else
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vec<Lane>{static_cast<Lane>(index)...});
#endif
}

// Add the upper half of each block of 2 * kHalf lanes to its lower half; the sums of a's blocks
// come first, then those of b's.
template <int kHalf, typename A, size_t... lane>
RF_INLINE Vec<A> fold(Vec<A> a, Vec<A> b, std::index_sequence<lane...>) {
  return shuffle<A, (lane / kHalf * 2 * kHalf + lane % kHalf)...>(a, b) +
         shuffle<A, (lane / kHalf * 2 * kHalf + lane % kHalf + kHalf)...>(a, b);
}

// totals[i] = sum of the lanes of sums[i], by halving: the vectors fold into each other until one
// is left, which then folds into itself. kCount is a power of two.
template <int kCount, int kHalf, typename A>
RF_INLINE void fold_lanes(Vec<A>* sums, Vec<A>& totals) {
  constexpr auto kAll = std::make_index_sequence<kLanes<A>>{};
  if constexpr (kCount > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      sums[i] = fold<kHalf, A>(sums[2 * i], sums[2 * i + 1], kAll);
    }
  } else {
    sums[0] = fold<kHalf, A>(sums[0], sums[0], kAll);
  }
  if constexpr (kHalf > 1) {
    fold_lanes<(kCount > 1 ? kCount / 2 : 1), kHalf / 2, A>(sums, totals);
  } else {
    totals = sums[0];
  }
}

// The same sums in the same order where a shuffle of 64 bytes is no instruction.
template <typename A, int kBytes, typename V>
RF_INLINE A halve_lanes(V v) {
  if constexpr (kBytes == 16) {
    if constexpr (sizeof(A) == sizeof(float)) {
      return (v[0] + v[2]) + (v[1] + v[3]);
    } else {
      return v[0] + v[1];
    }
  } else {
    typedef A Half __attribute__((vector_size(kBytes / 2)));
    struct Halves {
      Half low, high;
    };
    const auto halves = reinterpret<Halves>(v);
    return halve_lanes<A, kBytes / 2, Half>(halves.low + halves.high);
  }
}

// totals[i] = sum of the lanes of sums[i], which are used up; in the same order for every Isa.
template <typename Isa, int kCount, typename A>
RF_INLINE void sum_lanes_of(Vec<A>* sums, A* totals) {
  if constexpr (std::is_same_v<Isa, Avx512> && kCount <= kLanes<A>) {
    Vec<A> all;
    fold_lanes<kCount, kLanes<A> / 2, A>(sums, all);
    store_first(totals, all, kCount);
  } else {
    for (int i = 0; i < kCount; ++i) {
      totals[i] = halve_lanes<A, 64>(sums[i]);
    }
  }
}

}  // namespace resnest_fused::cpu
