// Phase 3, recombine: the second read of x. Forward: the weighted sum over the radix; backward: dx.
//
// Elements do not depend on each other. A unit of work is one (b, c) in NCHW, kPixelsPerUnit pixels
// of a sample in NHWC, as in the pool.
#pragma once

#include "cpu/pool.h"

namespace resnest_fused::cpu {

// out = sum_r attention_r x_r over units [begin, end), in descending order, so that what the pool
// read last is met first, while it is still in cache. Reads R units, writes 1.
template <typename T>
void recombine_units(const Problem& problem, const T* x /* (B, R*C, H, W) */,
                     const Acc<T>* attention /* (B, R, C) */, int64_t begin, int64_t end,
                     T* out /* (B, C, H, W) */);

// dx_r = attention_r dout + dgap / HW over units [begin, end), descending. Reads 1 unit, writes R.
template <typename T>
void recombine_backward_units(const Problem& problem, const T* dout /* (B, C, H, W) */,
                              const Acc<T>* attention /* (B, R, C) */,
                              const Acc<T>* dgap /* (B, C) */, int64_t begin, int64_t end,
                              T* dx /* (B, R*C, H, W) */);

}  // namespace resnest_fused::cpu
