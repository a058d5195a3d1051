// Phase 1, pool: the first read of x. Forward: the global average of the radix sum; backward: the
// sums of dout times x that the attention's gradient needs.
//
// Both add up in two steps of fixed order, so that neither threads nor the batch change a bit: a
// unit of work yields partial sums, and `finish` adds a sample's partial sums in ascending order.
//   NCHW: a unit is one (b, c); a sample has one partial sum for each (r,) c.
//   NHWC: a unit is kPixelsPerUnit pixels of one sample, all channels.
#pragma once

#include "cpu/simd.h"
#include "problem.h"

namespace resnest_fused::cpu {

inline constexpr int64_t kPixelsPerUnit = 128;

// Partial sums per sample and channel.
inline int64_t pool_partials(const Problem& p) {
  return p.layout == Layout::kNchw ? 1 : (p.pixels() + kPixelsPerUnit - 1) / kPixelsPerUnit;
}

inline int64_t pool_units_per_sample(const Problem& p) {
  return p.layout == Layout::kNchw ? p.channels : pool_partials(p);
}

// partial = sum_{p, r} x over units [begin, end), one thread. Reads R units of x.
template <typename T>
void pool_units(const Problem& problem, const T* x /* (B, R*C, H, W) */, int64_t begin, int64_t end,
                Acc<T>* partial /* (B, partials, C) */);

// gap = 1/HW * sum of partial, for samples [begin, end).
template <typename A>
void pool_finish(const Problem& problem, const A* partial /* (B, partials, C) */, int64_t begin,
                 int64_t end, A* gap /* (B, C) */);

// partial = sum_p dout x over units [begin, end), one thread. Reads R + 1 units.
template <typename T>
void pool_backward_units(const Problem& problem, const T* dout /* (B, C, H, W) */,
                         const T* x /* (B, R*C, H, W) */, int64_t begin, int64_t end,
                         Acc<T>* partial /* (B, partials, R, C) */);

// dattention = sum of partial, for samples [begin, end).
template <typename A>
void pool_backward_finish(const Problem& problem, const A* partial /* (B, partials, R, C) */,
                          int64_t begin, int64_t end, A* dattention /* (B, R, C) */);

}  // namespace resnest_fused::cpu
