// float16 and bfloat16 as stored, and a vector of them to float32 and back.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/vector.h"

namespace resnest_fused::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a dtype is accumulated in.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The stored bits of a vector V of float32.
template <typename V>
using HalfBits = Lanes<uint16_t, kLanes<V>>;

template <typename V>
RF_INLINE V widen(HalfBits<V> bits, BFloat16) {
  return reinterpret<V>(__builtin_convertvector(bits, Bits<V>) << 16);
}

// To nearest, ties to even. Not by the instructions of AVX512_BF16, which flush subnormal numbers.
template <typename V>
RF_INLINE HalfBits<V> narrow(V value, BFloat16) {
  const auto bits = reinterpret<Bits<V>>(value);
  const Bits<V> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(value != value ? (bits >> 16) | 0x40 : rounded, HalfBits<V>);
}

template <typename V>
RF_INLINE V widen(HalfBits<V> half, Half) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) > Baseline::kBytes) {
    V value;
    asm("vcvtph2ps %1, %0" : "=v"(value) : "v"(half));
    return value;
  }
#elif defined(__aarch64__)
  V value;
  asm("fcvtl %0.4s, %1.4h" : "=w"(value) : "w"(half));
  return value;
#endif
  const Bits<V> bits = __builtin_convertvector(half, Bits<V>);
  const Bits<V> magnitude = (bits & 0x7fff) << 13;
  // The exponent's bias differs by 112; multiplying also normalises subnormal numbers.
  const auto finite = reinterpret<Bits<V>>(reinterpret<V>(magnitude) * 0x1p112f);
  const Bits<V> widened = magnitude >= (0x7c00u << 13) ? finite | 0x7f800000 : finite;
  return reinterpret<V>(widened | ((bits & 0x8000) << 16));
}

// To nearest, ties to even.
template <typename V>
RF_INLINE HalfBits<V> narrow(V value, Half) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) > Baseline::kBytes) {
    HalfBits<V> half;
    asm("vcvtps2ph $0, %1, %0" : "=v"(half) : "v"(value));
    return half;
  }
#elif defined(__aarch64__)
  HalfBits<V> half;
  asm("fcvtn %0.4h, %1.4s" : "=w"(half) : "w"(value));
  return half;
#endif
  const auto bits = reinterpret<Bits<V>>(value);
  const Bits<V> magnitude = bits & 0x7fffffff;
  // Normal numbers: change the exponent's bias and round in integers; a carry moves to the next
  // exponent, and from the largest one to infinity, as it should.
  const Bits<V> normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5 lets the float adder align and round to the subnormal's last bit.
  const Bits<V> subnormal = reinterpret<Bits<V>>(reinterpret<V>(magnitude) + 0.5f) - 0x3f000000;
  Bits<V> result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? Bits<V>{} + 0x7c00 : result;  // 65520
  result = magnitude > 0x7f800000u ? Bits<V>{} + 0x7e00 : result;   // NaN
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000), HalfBits<V>);
}

}  // namespace resnest_fused::cpu
