// The prologue z = relu(bn0(x)) or relu(x). The pool and recombine compute it wherever they load x,
// so that z is never stored.
//
// There bn0 is one multiply-add, x * scale + shift. All kernels evaluate it by `preactivation`, or
// forward and backward would disagree on which elements the ReLU lets through.
#pragma once

#include <type_traits>
#include <vector>

#include "cpu/memory.h"
#include "cpu/norm.h"
#include "cpu/vector.h"
#include "formulas.h"
#include "problem.h"
#include "prologue_sums.h"

namespace resnest_fused::cpu {

template <typename A>
struct Prologue {
  bool active = false;   // else z = x, and all members are empty
  Norm<A> bn0;           // over R*C features; the identity for relu(x)
  std::vector<A> scale;  // (R*C) gamma * invstd
  std::vector<A> shift;  // (R*C) beta - mean * scale

  // From bn0, once its statistics are known.
  void set_scale_and_shift();
};

// scale and shift of the features in some lanes; the plain form has none.
template <typename V>
struct Affine {
  V scale, shift;
};
struct NoAffine {};
template <bool kPrologue, typename V>
using AffineIf = std::conditional_t<kPrologue, Affine<V>, NoAffine>;

// Of one feature in all lanes, and of a feature in each lane.
template <bool kPrologue, typename V>
RF_INLINE AffineIf<kPrologue, V> affine_of(const Prologue<Element<V>>& prologue, int64_t feature) {
  if constexpr (kPrologue) {
    return {broadcast<V>(prologue.scale[static_cast<size_t>(feature)]),
            broadcast<V>(prologue.shift[static_cast<size_t>(feature)])};
  } else {
    return {};
  }
}
template <bool kPrologue, typename V, typename Which>
RF_INLINE AffineIf<kPrologue, V> affine_from(const Prologue<Element<V>>& prologue, int64_t feature,
                                             Which lanes) {
  if constexpr (kPrologue) {
    return {load<V>(prologue.scale.data() + feature, lanes),
            load<V>(prologue.shift.data() + feature, lanes)};
  } else {
    return {};
  }
}

// bn0(x)
template <typename V>
RF_INLINE V preactivation(V x, const Affine<V>& at) {
  return scale_shift(x, at.scale, at.shift);
}

// z
template <typename V>
RF_INLINE V activation(V x, const NoAffine&) {
  return x;
}
template <typename V>
RF_INLINE V activation(V x, const Affine<V>& at) {
  return relu(preactivation(x, at));
}

// Mean and biased variance of x by feature over batch and pixels. Reads R units. Each work item's
// mean and sum of squared deviations come first; they are then combined in float64.
template <typename T>
void batch_statistics(const Problem& problem, const T* x /* (B, R*C, H, W) */,
                      Acc<T>* mean /* (R*C) */, Acc<T>* var /* (R*C) */);

// The gradients that the sums of the pool's backward give, as in prologue_sums.h.
template <typename A>
void prologue_dattention(const Problem& problem, const Prologue<A>& prologue,
                         const A* sums /* (B, 4, R, C) */, A* dattention /* (B, R, C) */);

template <typename A>
void prologue_backward(const Problem& problem, const A* sums /* (B, 4, R, C) */,
                       const A* attention /* (B, R, C) */, const A* dgap /* (B, C) */,
                       A* dgamma /* (R*C) */, A* dbeta /* (R*C) */);

// The part of dx that is lost as the batch statistics depend on x, per feature:
//   offset + slope * (x - mean) = scale * (mean_dz + xhat * mean_dz_xhat)
// as in `batch_norm_backward`; mean_dz = dbeta / N, mean_dz_xhat = dgamma / N, N = B*H*W. Both are
// empty if the statistics are frozen.
template <typename A>
struct StatisticsGradient {
  std::vector<A> offset;  // (R*C)
  std::vector<A> slope;   // (R*C)
};

template <typename A>
StatisticsGradient<A> statistics_gradient(const Prologue<A>& prologue, const A* mean_dz /* (R*C) */,
                                          const A* mean_dz_xhat /* (R*C) */);

}  // namespace resnest_fused::cpu
