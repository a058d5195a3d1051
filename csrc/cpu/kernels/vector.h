// Vectors of accumulators that fill a register, and arithmetic on them.
//
// They are vector extensions of GCC and Clang. What those have no operator for is an intrinsic.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define RF_INLINE inline __attribute__((always_inline))
// Of functions with loops over maps and weights: one copy, however many call it.
#define RF_KERNEL __attribute__((noinline))

namespace resnest_fused::cpu::RF_SET {

inline constexpr int kRegisterBytes = RF_REGISTER_BYTES;

// kCount elements of type E.
template <typename E, int kCount>
struct LanesOf {
  typedef E type __attribute__((vector_size(kCount * sizeof(E))));
};
template <typename E, int kCount>
using Lanes = typename LanesOf<E, kCount>::type;

template <typename A>
using Vec = Lanes<A, kRegisterBytes / static_cast<int>(sizeof(A))>;

template <typename V>
using Element = std::remove_cvref_t<decltype(std::declval<V>()[0])>;

template <typename V>
inline constexpr int kLanes = sizeof(V) / sizeof(Element<V>);

// Unsigned integers of the lanes' size.
template <typename V>
using Bits = Lanes<std::conditional_t<sizeof(Element<V>) == 4, uint32_t, uint64_t>, kLanes<V>>;

// The same bits as another type; std::bit_cast need not be inlined.
template <typename To, typename From>
RF_INLINE To reinterpret(From value) {
  return __builtin_bit_cast(To, value);
}

// A vector's lower and upper half.
template <typename V>
struct Halves {
  Lanes<Element<V>, kLanes<V> / 2> low, high;

  // By instructions between registers: as a cast of bits it would go through memory.
  RF_INLINE static Halves of(V v) {
    using Half [[maybe_unused]] = decltype(low);
#if RF_REGISTER_BYTES == 64
    if constexpr (sizeof v == 64) {
      const auto wide = reinterpret<__m512d>(v);
      return {reinterpret<Half>(_mm512_castpd512_pd256(wide)),
              reinterpret<Half>(_mm512_extractf64x4_pd(wide, 1))};
    }
#endif
#if RF_REGISTER_BYTES >= 32
    if constexpr (sizeof v == 32) {
      const auto wide = reinterpret<__m256d>(v);
      return {reinterpret<Half>(_mm256_castpd256_pd128(wide)),
              reinterpret<Half>(_mm256_extractf128_pd(wide, 1))};
    }
#endif
    return reinterpret<Halves>(v);
  }
};

// The value in all lanes.
template <typename V>
RF_INLINE V broadcast(Element<V> value) {
  return value - V{};  // of all operations with zero the one that keeps a zero's sign
}

// f(0), ..., f(kCount - 1) of constants. An array that only constants index is kept in registers;
// in a loop that the compiler unrolls it is not, as it unrolls too late.
template <int kCount, typename F>
RF_INLINE void unroll(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// a * b + c, rounded once where the instruction set has that. Asked for by name, and the build
// turns contraction off, as the compiler contracts some copies of an expression and not others: an
// element would depend on the tile or the batch that it is in.
template <typename V>
RF_INLINE V fma(V a, V b, V c) {
  [[maybe_unused]] constexpr bool kFloat = std::is_same_v<Element<V>, float>;
#if RF_REGISTER_BYTES == 64
  if constexpr (kFloat) {
    return reinterpret<V>(_mm512_fmadd_ps(a, b, c));
  } else {
    return reinterpret<V>(_mm512_fmadd_pd(a, b, c));
  }
#elif RF_REGISTER_BYTES == 32
  if constexpr (kFloat) {
    return reinterpret<V>(_mm256_fmadd_ps(a, b, c));
  } else {
    return reinterpret<V>(_mm256_fmadd_pd(a, b, c));
  }
#elif defined(__aarch64__)
  if constexpr (kFloat) {
    return reinterpret<V>(vfmaq_f32(c, a, b));
  } else {
    return reinterpret<V>(vfmaq_f64(c, a, b));
  }
#else
  return a * b + c;
#endif
}

// a where it is larger, else b: also where one of them is NaN. One instruction, for which the
// compiler takes two or three.
template <typename V>
RF_INLINE V larger(V a, V b) {
#if defined(__x86_64__)
  constexpr bool kFloat = std::is_same_v<Element<V>, float>;
#if RF_REGISTER_BYTES == 64
  if constexpr (kFloat) {
    return reinterpret<V>(_mm512_max_ps(a, b));
  } else {
    return reinterpret<V>(_mm512_max_pd(a, b));
  }
#elif RF_REGISTER_BYTES == 32
  if constexpr (kFloat) {
    return reinterpret<V>(_mm256_max_ps(a, b));
  } else {
    return reinterpret<V>(_mm256_max_pd(a, b));
  }
#else
  if constexpr (kFloat) {
    return reinterpret<V>(_mm_max_ps(a, b));
  } else {
    return reinterpret<V>(_mm_max_pd(a, b));
  }
#endif
#else
  return a > b ? a : b;
#endif
}

// Loaded once: the compiler would read memory again for each use.
template <typename V>
RF_INLINE void hold_in_register(V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

// Lanes `index` of the two vectors laid end to end.
template <typename V, size_t... index>
RF_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>(index)...);
#else
  using Index = Bits<V>;
  return __builtin_shuffle(a, b, Index{index...});
#endif
}

// The upper half of a vector of float32 added to the lower, in float64.
template <typename V>
RF_INLINE auto halves_added(V v) {
  using Wide = Lanes<double, kLanes<V> / 2>;
#if defined(__x86_64__) && RF_REGISTER_BYTES == 16
  return reinterpret<Wide>(_mm_cvtps_pd(v)) + reinterpret<Wide>(_mm_cvtps_pd(_mm_movehl_ps(v, v)));
#else
  const auto halves = Halves<V>::of(v);
#if RF_REGISTER_BYTES == 64
  return reinterpret<Wide>(_mm512_cvtps_pd(halves.low)) +
         reinterpret<Wide>(_mm512_cvtps_pd(halves.high));
#elif RF_REGISTER_BYTES == 32
  return reinterpret<Wide>(_mm256_cvtps_pd(halves.low)) +
         reinterpret<Wide>(_mm256_cvtps_pd(halves.high));
#else
  return __builtin_convertvector(halves.low, Wide) + __builtin_convertvector(halves.high, Wide);
#endif
#endif
}

// Sum of all lanes in float64: halving the vector, a fixed order.
template <typename V>
RF_INLINE double sum_lanes(V v) {
  if constexpr (sizeof(Element<V>) == sizeof(float)) {
    return sum_lanes(halves_added(v));
  } else if constexpr (kLanes<V> > 2) {
    const auto halves = Halves<V>::of(v);
    return sum_lanes(halves.low + halves.high);
  } else {
    return v[0] + v[1];
  }
}

// Add the upper half of each block of 2 * kHalf lanes to its lower half; the sums of a's blocks
// come first, then those of b's.
template <int kHalf, typename V, size_t... lane>
RF_INLINE V fold(V a, V b, std::index_sequence<lane...>) {
  return shuffle<V, (lane / kHalf * 2 * kHalf + lane % kHalf)...>(a, b) +
         shuffle<V, (lane / kHalf * 2 * kHalf + lane % kHalf + kHalf)...>(a, b);
}

// In lane i < kCount the sum of the lanes of sums[i], by halving: the vectors fold into each other
// until one is left, which then folds into itself. kCount is a power of two, at most kLanes.
template <int kCount, int kHalf, typename V>
RF_INLINE V fold_lanes(V* sums) {
  constexpr auto kAll = std::make_index_sequence<kLanes<V>>{};
  if constexpr (kCount > 1) {
    unroll<kCount / 2>([&](auto i) __attribute__((always_inline)) {
      sums[i] = fold<kHalf>(sums[2 * i], sums[2 * i + 1], kAll);
    });
  } else {
    sums[0] = fold<kHalf>(sums[0], sums[0], kAll);
  }
  if constexpr (kHalf > 1) {
    return fold_lanes<(kCount > 1 ? kCount / 2 : 1), kHalf / 2>(sums);
  } else {
    return sums[0];
  }
}

// totals[i] = sum of the lanes of sums[i], which are used up. Costs far less than one sum after the
// other.
template <int kCount, typename V>
RF_INLINE void sum_lanes_of(V* sums, Element<V>* totals) {
  constexpr int kAtOnce = std::min(kCount, kLanes<V>);
  unroll<kCount / kAtOnce>([&](auto i) __attribute__((always_inline)) {
    const V folded = fold_lanes<kAtOnce, kLanes<V> / 2>(sums + i * kAtOnce);
    std::memcpy(totals + i * kAtOnce, &folded, kAtOnce * sizeof(Element<V>));
  });
}

// exp(x) for x <= 0; 0 below the smallest normal number, NaN for NaN.
template <typename V>
RF_INLINE V exp_nonpositive(V x) {
  if constexpr (sizeof(Element<V>) == sizeof(double)) {
    for (int i = 0; i < kLanes<V>; ++i) {
      x[i] = std::exp(x[i]);
    }
    return x;
  } else {
    using Integers = Lanes<int32_t, kLanes<V>>;
    const V clamped = x < -87.0f ? broadcast<V>(-87.0f) : x;
    // x = n ln2 + r with |r| <= ln2/2; adding 1.5 * 2^23 rounds to an integer held in the low bits.
    const V shifted = clamped * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    const V r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    // Minimax polynomial of degree 5 for (exp(r) - 1 - r) / r^2 (Cephes expf), error below 1 ulp.
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const V y = (p * r) * r + r + 1.0f;
    const Integers exponent = (reinterpret<Integers>(shifted) - 0x4b400000 + 127) << 23;
    const V result = y * reinterpret<V>(exponent);
    return x < -87.0f ? V{} : result;
  }
}

}  // namespace resnest_fused::cpu::RF_SET
