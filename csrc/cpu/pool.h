// Phase 1, pool: the first read of x. Forward: the global average of the radix sum; backward: the
// sums over pixels that the gradients of the attention and of bn0 need.
#pragma once

#include "cpu/prologue.h"
#include "problem.h"

namespace resnest_fused::cpu {

// partial = sum_{p, r} z over work items [begin, end), one thread. Reads R units of x.
template <typename T>
void pool_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                const T* x /* (B, R*C, H, W) */, int64_t begin, int64_t end,
                Acc<T>* partial /* (B, partials, C) */);

// gap = 1/HW * sum of partial, for samples [begin, end).
template <typename A>
void pool_finish(const Problem& problem, const A* partial /* (B, partials, C) */, int64_t begin,
                 int64_t end, A* gap /* (B, C) */);

// How many sums over pixels the backward takes of each (b, r, c).
template <typename A>
int64_t pool_backward_sums(const Prologue<A>& prologue) {
  return prologue.active ? kPrologueSums : 1;
}

// partial = sum_p dout x, or with a prologue the sums that prologue_sums.h names, over items
// [begin, end), one thread. Reads R + 1 units.
template <typename T>
void pool_backward_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                         const T* dout /* (B, C, H, W) */, const T* x /* (B, R*C, H, W) */,
                         int64_t begin, int64_t end, Acc<T>* partial /* (B, partials, S, R, C) */);

// sums = sum of partial, for samples [begin, end); S3 and S4 with xhat from x - mean.
template <typename A>
void pool_backward_finish(const Problem& problem, const Prologue<A>& prologue,
                          const A* partial /* (B, partials, S, R, C) */, int64_t begin, int64_t end,
                          A* sums /* (B, S, R, C) */);

}  // namespace resnest_fused::cpu
