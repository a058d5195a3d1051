// The scalar mathematics of split attention, forward and backward, written once for every kernel.
//
// Index orders, used everywhere:
//
//   splits, radix-major (B, R, C, H, W): split r, channel c is channel r*C + c of x.
//
//   logits, cardinality-major (B, K, R, C/K): those of split r, channel c = k*C/K + j
//   are row (k*R + r)*C/K + j of fc2.
//
//   attention, radix-major (B, R, C).
//
// V is a float, a double, or a vector of them (cpu/vector.h); comparisons keep NaN where PyTorch
// does.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RF_FORMULA __host__ __device__ __forceinline__
#else
#define RF_FORMULA inline __attribute__((always_inline))
#endif

namespace resnest_fused {

// Row of fc2 (and of its gradient) that holds the logit of split r, channel c.
RF_FORMULA int64_t logit_row(int64_t r, int64_t c, int64_t radix, int64_t channels_per_group) {
  const int64_t group = c / channels_per_group;
  return (group * radix + r) * channels_per_group + (c - group * channels_per_group);
}

// relu(x); NaN passes.
template <typename V>
RF_FORMULA V relu(V x) {
  return x <= V{} ? V{} : x;
}

// Whether it lets a scalar pass, and with it the gradient.
template <typename A>
RF_FORMULA bool relu_passes(A n) {
  return !(n <= A{});
}

// Gradient of relu at pre-activation n: dy where n > 0.
template <typename V>
RF_FORMULA V relu_backward(V dy, V n) {
  return n <= V{} ? V{} : dy;
}

// Softmax over the radix, in place; radix 1 is a sigmoid. Only exp(x <= 0) is ever taken, so
// nothing overflows. For radix 2 this is sigmoid(l0 - l1) and sigmoid(l1 - l0), never 1 - a.
//   Exp: V -> V for arguments that are not positive.  values: element r at values[r * stride].
template <typename V, typename Exp>
RF_FORMULA void r_softmax(V* values, int64_t stride, int64_t radix, Exp exp_of) {
  if (radix == 1) {
    const V logit = values[0];
    const V e = exp_of(logit <= V{} ? logit : -logit);
    values[0] = (logit <= V{} ? e : V{} + 1) / (e + 1);
    return;
  }
  V top = values[0];
  for (int64_t r = 1; r < radix; ++r) {
    const V logit = values[r * stride];
    top = logit > top ? logit : top;
  }
  V sum = V{};
  for (int64_t r = 0; r < radix; ++r) {
    const V e = exp_of(values[r * stride] - top);
    values[r * stride] = e;
    sum = sum + e;
  }
  for (int64_t r = 0; r < radix; ++r) {
    values[r * stride] = values[r * stride] / sum;
  }
}

// Gradient of the r-softmax with respect to the logit of one split.
//   softmax: dl = a * (da - sum_r a da)     sigmoid (radix 1): dl = a * (1 - a) * da
template <typename V>
RF_FORMULA V r_softmax_backward(V a, V da, V sum_a_da, int64_t radix) {
  return radix == 1 ? a * (1 - a) * da : a * (da - sum_a_da);
}

// Batch normalisation: gamma * (x - mean) * invstd + beta, with scale = gamma * invstd. Subtracting
// the mean first loses nothing to cancellation; mean 0, scale 1, beta 0 is the identity to the bit.
template <typename V>
RF_FORMULA V batch_norm(V x, V mean, V scale, V beta) {
  return (x - mean) * scale + beta;
}

// A running statistic of batch normalisation after one more batch.
template <typename V>
RF_FORMULA V running_statistic(V running, V batch, V momentum) {
  return (1 - momentum) * running + momentum * batch;
}

// Gradient of batch normalisation with batch statistics:
//   dx = scale * (dy - dbeta/N - xhat * dgamma/N)
// With frozen statistics the two sums take no part: pass zeros for mean_dy and mean_dy_xhat.
template <typename V>
RF_FORMULA V batch_norm_backward(V dy, V xhat, V scale, V mean_dy, V mean_dy_xhat) {
  return scale * (dy - mean_dy - xhat * mean_dy_xhat);
}

}  // namespace resnest_fused
