// Phase 2, attention: fc1, bn1, ReLU, fc2 and r-softmax on (B, C)-sized data, and their gradients.
//
// All functions share their work among torch's threads; called from within one of them, they run
// on it alone. Sums are taken in an order that neither threads nor the batch change.
#pragma once

#include "cpu/norm.h"
#include "problem.h"

namespace resnest_fused::cpu {

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

// hidden = fc1(gap) for `batch` samples.
template <typename A>
void attention_hidden(const Problem& problem, const AttentionParameters<A>& params, int64_t batch,
                      const A* gap /* (batch, C) */, A* hidden /* (batch, I) */);

// Mean and biased variance of hidden over the batch, in two passes.
template <typename A>
void attention_batch_stats(const Problem& problem, const A* hidden /* (B, I) */, A* mean /* (I) */,
                           A* var /* (I) */);

// attention = r-softmax(fc2(relu(bn1(hidden)))) for `batch` samples.
template <typename A>
void attention_from_hidden(const Problem& problem, const AttentionParameters<A>& params,
                           int64_t batch, const A* hidden /* (batch, I) */,
                           A* attention /* (batch, R, C) */);

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
void attention_backward(const Problem& problem, const AttentionParameters<A>& params,
                        bool batch_stats, const A* gap /* (B, C) */, const A* hidden /* (B, I) */,
                        const A* attention /* (B, R, C) */, const A* dattention /* (B, R, C) */,
                        const AttentionGradients<A>& grads);

}  // namespace resnest_fused::cpu
