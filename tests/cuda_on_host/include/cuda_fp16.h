// float16 as CUDA has it: two bytes and conversions, which round to the nearest, ties to even.
#pragma once

#include <bit>
#include <cmath>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  if (exponent == 0) {  // zero or subnormal, a multiple of 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  const uint32_t wide_exponent = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide_exponent << 23 | fraction << 13);
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return {0x7fff};  // CUDA's NaN
  }
  if (magnitude >= 0x477ff000) {  // halfway between the largest float16 and 2^16
    return {static_cast<uint16_t>(sign | 0x7c00)};
  }
  if (magnitude < 0x38800000) {  // below 2^-14 float16 is a multiple of 2^-24
    const float multiple = std::rint(std::bit_cast<float>(magnitude) * 0x1p24f);
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(multiple))};
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000) >> 13)};
}
