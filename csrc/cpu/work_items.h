// How the work on a map is cut into work items, the smallest pieces that threads share.
//
//   NCHW: a work item is one (b, c), all its splits.
//   NHWC: a work item is pixels_per_item() pixels of one sample, all features; the last has fewer.
//
// Sums over pixels take two steps of fixed order, so that neither threads nor the batch change a
// bit. A work item yields partial sums; then a sample's partial sums are added in ascending order.
// In NCHW a sample has one partial sum for each feature, as a work item has all its pixels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

namespace resnest_fused::cpu {

inline constexpr int64_t kMostPixelsPerItem = 128;
// A work item's pixels are a multiple of every kernel's tile of pixels.
inline constexpr int64_t kLargestPixelTile = 8;

// Whether a row is a feature's pixels, and not a pixel's features. A map of one pixel is the same
// in both layouts.
inline bool is_nchw(const Problem& p) { return p.layout == Layout::kNchw && p.pixels() > 1; }

inline int64_t partials_per_sample(const Problem& p) {
  return is_nchw(p) ? 1 : (p.pixels() + kMostPixelsPerItem - 1) / kMostPixelsPerItem;
}

// In NHWC: as few work items as can be, about equally large.
inline int64_t pixels_per_item(const Problem& p) {
  const int64_t equal = (p.pixels() + partials_per_sample(p) - 1) / partials_per_sample(p);
  return (equal + kLargestPixelTile - 1) / kLargestPixelTile * kLargestPixelTile;
}

inline int64_t items_per_sample(const Problem& p) {
  return is_nchw(p) ? p.channels : partials_per_sample(p);
}

// Bytes of x in a work item.
inline int64_t item_bytes(const Problem& p, int64_t element_size) {
  const int64_t elements = is_nchw(p) ? p.radix * p.pixels() : pixels_per_item(p) * p.features();
  return elements * element_size;
}

// From so many bytes of x on, kernels ask for memory ahead of its use. Smaller maps lie in the
// cores' caches, where asking took 3 to 10% of the time.
inline constexpr int64_t kPrefetchBytes = 4 * 1024 * 1024;

inline bool prefetches(const Problem& p, int64_t element_size) {
  return p.batch * p.features() * p.pixels() * element_size >= kPrefetchBytes;
}

// The pixels of a work item in NHWC.
struct PixelItem {
  int64_t sample;
  int64_t first;  // counted through the whole batch
  int64_t count;

  PixelItem(const Problem& p, int64_t item) {
    const int64_t per_sample = partials_per_sample(p);
    const int64_t most = pixels_per_item(p);
    const int64_t in_sample = item % per_sample * most;
    sample = item / per_sample;
    first = sample * p.pixels() + in_sample;
    count = std::min(most, p.pixels() - in_sample);
  }
};

// Call f(row, first, last) for the parts of rows of `count` elements that make up the elements
// [begin, end) of all rows.
template <typename F>
void for_row_parts(int64_t begin, int64_t end, int64_t count, const F& f) {
  for (int64_t e = begin; e < end;) {
    const int64_t row = e / count, first = e % count;
    const int64_t last = std::min(count, first + end - e);
    f(row, first, last);
    e += last - first;
  }
}

}  // namespace resnest_fused::cpu
