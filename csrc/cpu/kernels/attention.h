// Phase 2, attention: fc1, bn1, ReLU, fc2 and r-softmax on (B, C)-sized data, and their gradients.
//
// All functions share their work among torch's threads; called from within one of them, they run
// on it alone. Sums are taken in an order that neither threads nor the batch change.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu/dtype.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/norm.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "formulas.h"
#include "problem.h"

namespace resnest_fused::cpu::RF_SET {

// The weight of an FC, in a dtype that the kernels widen as they read it.
struct Weight {
  const void* data;
  ScalarType dtype;
};

// The parameters of phase 2, but for the weights in the accumulator's type.
template <typename A>
struct AttentionParameters {
  Weight fc1_weight;  // (I, C/K)
  const A* fc1_bias;  // (I) or null
  Weight fc2_weight;  // (R*C, I/K), rows in the logits' order
  const A* fc2_bias;  // (R*C) or null
  Norm<A> bn1;
};

// result[f] = sum_b rows[b, f]
template <typename A>
void sum_over_batch(const A* rows /* (B, F) */, int64_t batch, int64_t features,
                    A* result /* (F) */) {
  parallel_items(
      features, batch * static_cast<int64_t>(sizeof(A)), [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += kFeatureBlock) {
          const int64_t last = std::min(first + kFeatureBlock, end);
          double sums[1][kFeatureBlock];
          sum_block(batch, first, last, sums,
                    [&](int64_t b, int64_t f, int64_t at)
                        __attribute__((always_inline)) { sums[0][at] += rows[b * features + f]; });
          std::copy_n(sums[0], last - first, result + first);
        }
      });
}

// An FC in `groups` blocks: y = W x + bias for `batch` samples.
template <typename A>
struct Fc {
  int64_t groups;
  int64_t outputs;
  int64_t inputs;
  Weight weight;  // (outputs, inputs / groups)
  const A* bias;  // (outputs) or null

  int64_t rows() const { return outputs / groups; }
  int64_t columns() const { return inputs / groups; }
  template <typename P>
  Matrices<P> w_of(P* w) const {
    return {w, columns(), rows() * columns()};
  }
  template <typename P>
  Matrices<P> x_of(P* x) const {
    return {x, inputs, columns()};
  }
  template <typename P>
  Matrices<P> y_of(P* y) const {
    return {y, outputs, rows()};
  }

  void forward(int64_t batch, const A* x /* (B, inputs) */, A* y /* (B, outputs) */) const {
    with_weight([&](const auto* w) {
      gemm_nt(groups, batch, rows(), columns(), x_of(x), w_of(w), bias, y_of(y));
    });
  }

  // dx = W^T dy
  void input_gradient(int64_t batch, const A* dy /* (B, outputs) */,
                      A* dx /* (B, inputs) */) const {
    with_weight([&](const auto* w) {
      gemm_nn(groups, batch, columns(), rows(), y_of(dy), false, w_of(w), x_of(dx));
    });
  }

  // dW = dy^T x, dbias = sum_b dy; null for those not wanted.
  void weight_gradient(int64_t batch, const A* dy, const A* x, A* dweight, A* dbias) const {
    if (dweight) {
      gemm_nn(groups, rows(), columns(), batch, y_of(dy), true, x_of(x), w_of(dweight));
    }
    if (dbias) {
      sum_over_batch(dy, batch, outputs, dbias);
    }
  }

 private:
  template <typename F>
  void with_weight(const F& f) const {
    for_dtype(weight.dtype, [&](auto tag) {
      using P = decltype(tag);
      if constexpr (kReads<A, P>) {
        f(static_cast<const P*>(weight.data));
      }
    });
  }
};

template <typename A>
Fc<A> fc1_of(const Problem& p, const AttentionParameters<A>& params) {
  return {p.cardinality, p.inter, p.channels, params.fc1_weight, params.fc1_bias};
}

template <typename A>
Fc<A> fc2_of(const Problem& p, const AttentionParameters<A>& params) {
  return {p.cardinality, p.features(), p.inter, params.fc2_weight, params.fc2_bias};
}

// u = relu(bn1(hidden))
template <typename A>
std::unique_ptr<A[]> activated(const Problem& p, const Norm<A>& bn1, int64_t batch,
                               const A* hidden /* (B, I) */) {
  auto u = uninitialized<A>(batch * p.inter);
  const A* mean = bn1.mean.data();
  const A* invstd = bn1.invstd.data();
  const A* gamma = bn1.gamma.data();
  const A* beta = bn1.beta.data();
  parallel_items(batch, 2 * p.inter * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t b = begin; b < end; ++b) {
                     for (int64_t i = 0; i < p.inter; ++i) {
                       const int64_t at = b * p.inter + i;
                       u[at] = relu(batch_norm(hidden[at], mean[i], gamma[i] * invstd[i], beta[i]));
                     }
                   }
                 });
  return u;
}

template <typename V>
struct ExpOf {
  RF_INLINE V operator()(V x) const { return exp_nonpositive(x); }
};

// Up to kLanes channels of one group at a time, from (K, R, C/K) logits to (R, C) attention, for
// samples [begin, end).
template <typename A>
RF_KERNEL void attention_from_logits(const Problem& p, const A* logits /* (B, K, R, C/K) */,
                                     int64_t begin, int64_t end, A* attention /* (B, R, C) */) {
  using V = Vec<A>;
  const auto values = uninitialized<V>(p.radix);
  const int64_t radix = p.radix, group_channels = p.group_channels();
  for (int64_t b = begin; b < end; ++b) {
    const A* sample = logits + b * p.features();
    A* result = attention + b * p.features();
    for (int64_t group = 0; group < p.cardinality; ++group) {
      for (int64_t j = 0; j < group_channels; j += kLanes<V>) {
        const int64_t count = std::min<int64_t>(kLanes<V>, group_channels - j);
        const int64_t c = group * group_channels + j;
        for (int64_t r = 0; r < radix; ++r) {
          const A* from = sample + logit_row(r, c, radix, group_channels);
          values[r] = load_lanes<V>(from, count);
        }
        r_softmax(values.get(), 1, radix, ExpOf<V>{});
        for (int64_t r = 0; r < radix; ++r) {
          A* to = result + r * p.channels + c;
          store_lanes(to, values[r], count);
        }
      }
    }
  }
}

// dlogits of samples [begin, end).
template <typename A>
RF_KERNEL void logits_gradient(const Problem& p, const A* attention /* (B, R, C) */,
                               const A* dattention /* (B, R, C) */, int64_t begin, int64_t end,
                               A* dlogits /* (B, K, R, C/K) */) {
  using V = Vec<A>;
  const int64_t radix = p.radix, group_channels = p.group_channels();
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t group = 0; group < p.cardinality; ++group) {
      for (int64_t j = 0; j < group_channels; j += kLanes<V>) {
        const int64_t count = std::min<int64_t>(kLanes<V>, group_channels - j);
        const int64_t c = group * group_channels + j;
        const A* a = attention + b * p.features() + c;
        const A* da = dattention + b * p.features() + c;
        V sum = {};
        for (int64_t r = 0; r < radix; ++r) {
          sum +=
              load_lanes<V>(a + r * p.channels, count) * load_lanes<V>(da + r * p.channels, count);
        }
        for (int64_t r = 0; r < radix; ++r) {
          A* to = dlogits + b * p.features() + logit_row(r, c, radix, group_channels);
          store_lanes(to,
                      r_softmax_backward(load_lanes<V>(a + r * p.channels, count),
                                         load_lanes<V>(da + r * p.channels, count), sum, radix),
                      count);
        }
      }
    }
  }
}

// From du (in dhidden, overwritten) through the ReLU and bn1, for features [begin, end).
template <typename A>
RF_KERNEL void norm_backward(const Norm<A>& bn, bool batch_stats, const A* hidden /* (B, I) */,
                             int64_t batch, int64_t inter, int64_t begin, int64_t end,
                             A* dhidden /* (B, I) */, A* dgamma /* (I) */, A* dbeta /* (I) */) {
  const A* mean = bn.mean.data();
  const A* invstd = bn.invstd.data();
  const A* gamma = bn.gamma.data();
  const A* beta = bn.beta.data();
  const double scale = 1.0 / static_cast<double>(batch);
  for (int64_t first = begin; first < end; first += kFeatureBlock) {
    const int64_t last = std::min(first + kFeatureBlock, end);
    double sums[2][kFeatureBlock];
    sum_block(batch, first, last, sums,
              [&](int64_t b, int64_t i, int64_t at) __attribute__((always_inline)) {
                const int64_t e = b * inter + i;
                const A n = batch_norm(hidden[e], mean[i], gamma[i] * invstd[i], beta[i]);
                const A dn = relu_backward(dhidden[e], n);
                dhidden[e] = dn;
                sums[0][at] += dn;
                sums[1][at] += static_cast<double>(dn) * ((hidden[e] - mean[i]) * invstd[i]);
              });
    A mean_dn[kFeatureBlock], mean_dn_xhat[kFeatureBlock];
    for (int64_t at = 0; at < last - first; ++at) {
      dbeta[first + at] = static_cast<A>(sums[0][at]);
      dgamma[first + at] = static_cast<A>(sums[1][at]);
      // Not a product with 0, through which NaN would reach every sample.
      mean_dn[at] = batch_stats ? static_cast<A>(sums[0][at] * scale) : A{};
      mean_dn_xhat[at] = batch_stats ? static_cast<A>(sums[1][at] * scale) : A{};
    }
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t e = b * inter + i;
        const A xhat = (hidden[e] - mean[i]) * invstd[i];
        dhidden[e] = batch_norm_backward(dhidden[e], xhat, gamma[i] * invstd[i], mean_dn[i - first],
                                         mean_dn_xhat[i - first]);
      }
    }
  }
}

// hidden = fc1(gap) for `batch` samples.
template <typename A>
void attention_hidden(const Problem& p, const AttentionParameters<A>& params, int64_t batch,
                      const A* gap /* (batch, C) */, A* hidden /* (batch, I) */) {
  fc1_of(p, params).forward(batch, gap, hidden);
}

// Mean and biased variance of hidden over the batch, in two passes.
template <typename A>
void attention_batch_stats(const Problem& p, const A* hidden /* (B, I) */, A* mean /* (I) */,
                           A* var /* (I) */) {
  combine_statistics<A>({hidden, nullptr, p.batch, 1, 1, 1}, p.inter, mean, var);
}

// attention = r-softmax(fc2(relu(bn1(hidden)))) for `batch` samples.
template <typename A>
void attention_from_hidden(const Problem& p, const AttentionParameters<A>& params, int64_t batch,
                           const A* hidden /* (batch, I) */, A* attention /* (batch, R, C) */) {
  const auto u = activated(p, params.bn1, batch, hidden);
  const auto logits = uninitialized<A>(batch * p.features());
  fc2_of(p, params).forward(batch, u.get(), logits.get());
  // An exponential takes about as long as moving 32 bytes.
  parallel_items(batch, 32 * p.features(), [&](int64_t begin, int64_t end) {
    attention_from_logits<A>(p, logits.get(), begin, end, attention);
  });
}

// The gradients of phase 2; null for those not wanted.
template <typename A>
struct AttentionGradients {
  A* gap;         // (B, C)
  A* fc1_weight;  // (I, C/K)
  A* fc1_bias;    // (I)
  A* fc2_weight;  // (R*C, I/K)
  A* fc2_bias;    // (R*C)
  A* bn1_weight;  // (I)
  A* bn1_bias;    // (I)
};

template <typename A>
void attention_backward(const Problem& p, const AttentionParameters<A>& params, bool batch_stats,
                        const A* gap /* (B, C) */, const A* hidden /* (B, I) */,
                        const A* attention /* (B, R, C) */, const A* dattention /* (B, R, C) */,
                        const AttentionGradients<A>& grads) {
  const int64_t batch = p.batch;
  const Fc<A> fc1 = fc1_of(p, params), fc2 = fc2_of(p, params);
  const int64_t row_bytes = 3 * p.features() * static_cast<int64_t>(sizeof(A));
  const auto dlogits_buffer = uninitialized<A>(batch * p.features());
  A* const dlogits = dlogits_buffer.get();
  parallel_items(batch, row_bytes, [&](int64_t begin, int64_t end) {
    logits_gradient<A>(p, attention, dattention, begin, end, dlogits);
  });
  if (grads.fc2_weight || grads.fc2_bias) {
    const auto u = activated(p, params.bn1, batch, hidden);
    fc2.weight_gradient(batch, dlogits, u.get(), grads.fc2_weight, grads.fc2_bias);
  }

  const auto dhidden_buffer = uninitialized<A>(batch * p.inter);
  A* const dhidden = dhidden_buffer.get();
  fc2.input_gradient(batch, dlogits, dhidden);

  const auto sums = uninitialized<A>(2 * p.inter);
  A* const dgamma = grads.bn1_weight ? grads.bn1_weight : sums.get();
  A* const dbeta = grads.bn1_bias ? grads.bn1_bias : sums.get() + p.inter;
  parallel_items(p.inter, 5 * batch * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   norm_backward<A>(params.bn1, batch_stats, hidden, batch, p.inter, begin, end,
                                    dhidden, dgamma, dbeta);
                 });
  if (grads.fc1_weight || grads.fc1_bias) {
    fc1.weight_gradient(batch, dhidden, gap, grads.fc1_weight, grads.fc1_bias);
  }
  if (grads.gap) {
    fc1.input_gradient(batch, dhidden, grads.gap);
  }
}

}  // namespace resnest_fused::cpu::RF_SET
