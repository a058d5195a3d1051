// A vector of float16 or bfloat16 to float32 and back.
#pragma once

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/kernels/vector.h"

namespace resnest_fused::cpu::RF_SET {

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
#if RF_REGISTER_BYTES == 64
  return reinterpret<V>(_mm512_cvtph_ps(reinterpret<__m256i>(half)));
#elif RF_REGISTER_BYTES == 32
  return reinterpret<V>(_mm256_cvtph_ps(reinterpret<__m128i>(half)));
#elif defined(__aarch64__)
  return reinterpret<V>(vcvt_f32_f16(reinterpret<float16x4_t>(half)));
#else
  const Bits<V> bits = __builtin_convertvector(half, Bits<V>);
  const Bits<V> magnitude = bits & 0x7fff;
  // The exponent's bias differs by 112. Infinity and NaN have the largest exponent in both.
  const Bits<V> normal = (magnitude << 13) + (112u << 23);
  const Bits<V> special = (magnitude << 13) | 0x7f800000;
  // A subnormal number counts 2^-24, as the last bit of 0.5 does. No operand is subnormal, so this
  // holds also where the processor takes those for zero.
  const auto subnormal = reinterpret<Bits<V>>(reinterpret<V>(magnitude + 0x3f000000) - 0.5f);
  Bits<V> widened = magnitude < 0x400u ? subnormal : normal;
  widened = magnitude >= 0x7c00u ? special : widened;
  return reinterpret<V>(widened | ((bits & 0x8000) << 16));
#endif
}

// To nearest, ties to even.
template <typename V>
RF_INLINE HalfBits<V> narrow(V value, Half) {
#if RF_REGISTER_BYTES == 64
  return reinterpret<HalfBits<V>>(
      _mm512_cvtps_ph(reinterpret<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif RF_REGISTER_BYTES == 32
  return reinterpret<HalfBits<V>>(
      _mm256_cvtps_ph(reinterpret<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  return reinterpret<HalfBits<V>>(vcvt_f16_f32(reinterpret<float32x4_t>(value)));
#else
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
#endif
}

}  // namespace resnest_fused::cpu::RF_SET
