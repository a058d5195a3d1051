// Phase 3, recombine: the second read of x. Forward: the weighted sum over the radix; backward: dx.
//
// Elements do not depend on each other. Work items are taken in descending order, to find what the
// pool read last still in cache.
#pragma once

#include "cpu/prologue.h"
#include "problem.h"

namespace resnest_fused::cpu {

// out = sum_r attention_r z_r over work items [begin, end). Reads R units, writes 1.
template <typename T>
void recombine_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                     const T* x /* (B, R*C, H, W) */, const Acc<T>* attention /* (B, R, C) */,
                     int64_t begin, int64_t end, T* out /* (B, C, H, W) */);

// dz_r = attention_r dout + dgap / HW over work items [begin, end), and
//   dx = dz                                        plain form: reads 1 unit, writes R
//   dx = m scale dz - offset - slope (x - mean)    with a prologue, m = [bn0(x) > 0]: reads R more
template <typename T>
void recombine_backward_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                              const StatisticsGradient<Acc<T>>& statistics,
                              const T* dout /* (B, C, H, W) */, const T* x /* (B, R*C, H, W) */,
                              const Acc<T>* attention /* (B, R, C) */,
                              const Acc<T>* dgap /* (B, C) */, int64_t begin, int64_t end,
                              T* dx /* (B, R*C, H, W) */);

}  // namespace resnest_fused::cpu
