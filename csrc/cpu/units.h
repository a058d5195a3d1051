// How the work on a map is cut into units, the smallest pieces that threads share.
//
//   NCHW: a unit is one (b, c), all its splits.
//   NHWC: a unit is kPixelsPerUnit pixels of one sample, all features.
//
// Sums over pixels take two steps of fixed order, so that neither threads nor the batch change a
// bit: a unit yields partial sums, and a sample's partial sums are then added in ascending order.
// In NCHW a sample has one partial sum for each feature, as a unit has all its pixels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace resnest_fused::cpu {

inline constexpr int64_t kPixelsPerUnit = 128;

inline int64_t partials_per_sample(const Problem& p) {
  return p.layout == Layout::kNchw ? 1 : (p.pixels() + kPixelsPerUnit - 1) / kPixelsPerUnit;
}

inline int64_t units_per_sample(const Problem& p) {
  return p.layout == Layout::kNchw ? p.channels : partials_per_sample(p);
}

// Bytes of x in a unit.
inline int64_t unit_bytes(const Problem& p, int64_t element_size) {
  const int64_t elements =
      p.layout == Layout::kNchw ? p.radix * p.pixels() : kPixelsPerUnit * p.features();
  return elements * element_size;
}

// The pixels of a unit in NHWC.
struct PixelUnit {
  int64_t sample;
  int64_t first;  // counted through the whole batch
  int64_t count;

  PixelUnit(const Problem& p, int64_t unit) {
    const int64_t per_sample = partials_per_sample(p);
    const int64_t in_sample = unit % per_sample * kPixelsPerUnit;
    sample = unit / per_sample;
    first = sample * p.pixels() + in_sample;
    count = std::min(kPixelsPerUnit, p.pixels() - in_sample);
  }
};

}  // namespace resnest_fused::cpu
