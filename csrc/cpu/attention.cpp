// Phase 2, attention: kernels.
#include "cpu/attention.h"

#include <algorithm>
#include <memory>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "formulas.h"

namespace resnest_fused::cpu {
namespace {

template <typename A>
std::unique_ptr<A[]> uninitialized(int64_t count) {
  return std::make_unique_for_overwrite<A[]>(static_cast<size_t>(count));
}

// result[f] = sum_b rows[b, f], b ascending, for features [begin, end).
template <typename A>
struct SumOverBatch {
  template <typename Isa>
  static RF_INLINE void run(const A* rows /* (B, F) */, int64_t batch, int64_t features,
                            int64_t begin, int64_t end, A* result /* (F) */) {
    std::fill(result + begin, result + end, A{});
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t f = begin; f < end; ++f) {
        result[f] += rows[b * features + f];
      }
    }
  }
};

template <typename A>
void sum_over_batch(const A* rows, int64_t batch, int64_t features, A* result) {
  parallel_units(features, batch * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<SumOverBatch<A>>(rows, batch, features, begin, end, result);
                 });
}

// An FC in `groups` blocks: y = W x + bias for `batch` samples.
template <typename A>
struct Fc {
  int64_t groups;
  int64_t outputs;
  int64_t inputs;
  const A* weight;  // (outputs, inputs / groups)
  const A* bias;    // (outputs) or null

  int64_t rows() const { return outputs / groups; }
  int64_t columns() const { return inputs / groups; }
  Matrices<const A> weights() const { return {weight, columns(), rows() * columns()}; }
  template <typename P>
  Matrices<P> x_of(P* x) const {
    return {x, inputs, columns()};
  }
  template <typename P>
  Matrices<P> y_of(P* y) const {
    return {y, outputs, rows()};
  }

  void forward(int64_t batch, const A* x /* (B, inputs) */, A* y /* (B, outputs) */) const {
    gemm_nt<A>(groups, batch, rows(), columns(), x_of(x), weights(), bias, y_of(y));
  }

  // dx = W^T dy
  void input_gradient(int64_t batch, const A* dy /* (B, outputs) */,
                      A* dx /* (B, inputs) */) const {
    gemm_nn<A>(groups, batch, columns(), rows(), y_of(dy), false, weights(), x_of(dx));
  }

  // dW = dy^T x, dbias = sum_b dy; null for those not wanted.
  void weight_gradient(int64_t batch, const A* dy, const A* x, A* dweight, A* dbias) const {
    if (dweight) {
      gemm_nn<A>(groups, rows(), columns(), batch, y_of(dy), true, x_of(x),
                 {dweight, columns(), rows() * columns()});
    }
    if (dbias) {
      sum_over_batch(dy, batch, outputs, dbias);
    }
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

// mean and biased var over the batch of features [begin, end).
template <typename A>
struct BatchStats {
  template <typename Isa>
  static RF_INLINE void run(const A* hidden /* (B, I) */, int64_t batch, int64_t inter,
                            int64_t begin, int64_t end, A* mean /* (I) */, A* var /* (I) */) {
    const A scale = A(1) / static_cast<A>(batch);
    std::fill(mean + begin, mean + end, A{});
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = begin; i < end; ++i) {
        mean[i] += hidden[b * inter + i];
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      mean[i] *= scale;
      var[i] = A{};
    }
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = begin; i < end; ++i) {
        const A centered = hidden[b * inter + i] - mean[i];
        var[i] += centered * centered;
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      var[i] *= scale;
    }
  }
};

// u = relu(bn1(hidden)) of samples [begin, end).
template <typename A>
struct Activate {
  template <typename Isa>
  static RF_INLINE void run(const Norm<A>* bn, const A* hidden /* (B, I) */, int64_t inter,
                            int64_t begin, int64_t end, A* u /* (B, I) */) {
    const A* mean = bn->mean.data();
    const A* invstd = bn->invstd.data();
    const A* gamma = bn->gamma.data();
    const A* beta = bn->beta.data();
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < inter; ++i) {
        const int64_t at = b * inter + i;
        u[at] = relu(batch_norm(hidden[at], mean[i], gamma[i] * invstd[i], beta[i]));
      }
    }
  }
};

template <typename A>
std::unique_ptr<A[]> activated(const Problem& p, const Norm<A>& bn1, int64_t batch,
                               const A* hidden) {
  auto result = uninitialized<A>(batch * p.inter);
  A* const u = result.get();
  parallel_units(batch, 2 * p.inter * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<Activate<A>>(&bn1, hidden, p.inter, begin, end, u);
                 });
  return result;
}

template <typename A>
struct ExpOf {
  RF_INLINE Vec<A> operator()(Vec<A> x) const { return exp_nonpositive(x); }
};

// Up to kLanes channels of one group at a time, from (K, R, C/K) logits to (R, C) attention, for
// samples [begin, end).
template <typename A>
struct RSoftmax {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const A* logits /* (B, K, R, C/K) */, int64_t begin,
                            int64_t end, A* scratch /* R + 1 vectors */,
                            A* attention /* (B, R, C) */) {
    // Vectors in memory must lie on their own size; the scratch need not.
    constexpr uintptr_t kAlignment = sizeof(Vec<A>);
    auto* values = reinterpret_cast<Vec<A>*>(
        (reinterpret_cast<uintptr_t>(scratch) + kAlignment - 1) / kAlignment * kAlignment);
    const int64_t radix = p->radix, group_channels = p->group_channels();
    for (int64_t b = begin; b < end; ++b) {
      const A* sample = logits + b * p->features();
      A* result = attention + b * p->features();
      for (int64_t group = 0; group < p->cardinality; ++group) {
        for (int64_t j = 0; j < group_channels; j += kLanes<A>) {
          const int64_t count = std::min<int64_t>(kLanes<A>, group_channels - j);
          const int64_t c = group * group_channels + j;
          for (int64_t r = 0; r < radix; ++r) {
            const A* from = sample + logit_row(r, c, radix, group_channels);
            values[r] = load_lanes(from, count);
          }
          r_softmax(values, 1, radix, ExpOf<A>{});
          for (int64_t r = 0; r < radix; ++r) {
            A* to = result + r * p->channels + c;
            store_lanes(to, values[r], count);
          }
        }
      }
    }
  }
};

// dlogits of samples [begin, end).
template <typename A>
struct RSoftmaxBackward {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const A* attention /* (B, R, C) */,
                            const A* dattention /* (B, R, C) */, int64_t begin, int64_t end,
                            A* dlogits /* (B, K, R, C/K) */) {
    const int64_t radix = p->radix, group_channels = p->group_channels();
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t group = 0; group < p->cardinality; ++group) {
        for (int64_t j = 0; j < group_channels; j += kLanes<A>) {
          const int64_t count = std::min<int64_t>(kLanes<A>, group_channels - j);
          const int64_t c = group * group_channels + j;
          const A* a = attention + b * p->features() + c;
          const A* da = dattention + b * p->features() + c;
          Vec<A> sum = {};
          for (int64_t r = 0; r < radix; ++r) {
            sum += load_lanes(a + r * p->channels, count) * load_lanes(da + r * p->channels, count);
          }
          for (int64_t r = 0; r < radix; ++r) {
            A* to = dlogits + b * p->features() + logit_row(r, c, radix, group_channels);
            store_lanes(to,
                        r_softmax_backward(load_lanes(a + r * p->channels, count),
                                           load_lanes(da + r * p->channels, count), sum, radix),
                        count);
          }
        }
      }
    }
  }
};

// From du (in dhidden, overwritten) through the ReLU and bn1, for features [begin, end).
template <typename A>
struct NormBackward {
  template <typename Isa>
  static RF_INLINE void run(const Norm<A>* bn, bool batch_stats, const A* hidden /* (B, I) */,
                            int64_t batch, int64_t inter, int64_t begin, int64_t end,
                            A* dhidden /* (B, I) */, A* dgamma /* (I) */, A* dbeta /* (I) */) {
    const A* mean = bn->mean.data();
    const A* invstd = bn->invstd.data();
    const A* gamma = bn->gamma.data();
    const A* beta = bn->beta.data();
    std::fill(dgamma + begin, dgamma + end, A{});
    std::fill(dbeta + begin, dbeta + end, A{});
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = b * inter + i;
        const A n = batch_norm(hidden[at], mean[i], gamma[i] * invstd[i], beta[i]);
        const A dn = relu_backward(dhidden[at], n);
        dhidden[at] = dn;
        dbeta[i] += dn;
        dgamma[i] += dn * ((hidden[at] - mean[i]) * invstd[i]);
      }
    }
    const A scale = batch_stats ? A(1) / static_cast<A>(batch) : A{};
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = b * inter + i;
        const A xhat = (hidden[at] - mean[i]) * invstd[i];
        dhidden[at] = batch_norm_backward(dhidden[at], xhat, gamma[i] * invstd[i],
                                          dbeta[i] * scale, dgamma[i] * scale);
      }
    }
  }
};

}  // namespace

template <typename A>
void attention_hidden(const Problem& p, const AttentionParameters<A>& params, int64_t batch,
                      const A* gap, A* hidden) {
  fc1_of(p, params).forward(batch, gap, hidden);
}

template <typename A>
void attention_batch_stats(const Problem& p, const A* hidden, A* mean, A* var) {
  parallel_units(p.inter, 2 * p.batch * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<BatchStats<A>>(hidden, p.batch, p.inter, begin, end, mean, var);
                 });
}

template <typename A>
void attention_from_hidden(const Problem& p, const AttentionParameters<A>& params, int64_t batch,
                           const A* hidden, A* attention) {
  const auto u = activated(p, params.bn1, batch, hidden);
  const auto logits = uninitialized<A>(batch * p.features());
  fc2_of(p, params).forward(batch, u.get(), logits.get());
  // An exponential takes about as long as moving 32 bytes.
  parallel_units(batch, 32 * p.features(), [&](int64_t begin, int64_t end) {
    const auto scratch = uninitialized<A>((p.radix + 1) * kLanes<A>);
    dispatch<RSoftmax<A>>(&p, const_cast<const A*>(logits.get()), begin, end, scratch.get(),
                          attention);
  });
}

template <typename A>
void attention_backward(const Problem& p, const AttentionParameters<A>& params, bool batch_stats,
                        const A* gap, const A* hidden, const A* attention, const A* dattention,
                        const AttentionGradients<A>& grads) {
  const int64_t batch = p.batch;
  const Fc<A> fc1 = fc1_of(p, params), fc2 = fc2_of(p, params);
  const int64_t row_bytes = 3 * p.features() * static_cast<int64_t>(sizeof(A));
  const auto dlogits_buffer = uninitialized<A>(batch * p.features());
  A* const dlogits = dlogits_buffer.get();
  parallel_units(batch, row_bytes, [&](int64_t begin, int64_t end) {
    dispatch<RSoftmaxBackward<A>>(&p, attention, dattention, begin, end, dlogits);
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
  parallel_units(p.inter, 5 * batch * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<NormBackward<A>>(&params.bn1, batch_stats, hidden, batch, p.inter,
                                             begin, end, dhidden, dgamma, dbeta);
                 });
  if (grads.fc1_weight || grads.fc1_bias) {
    fc1.weight_gradient(batch, dhidden, gap, grads.fc1_weight, grads.fc1_bias);
  }
  if (grads.gap) {
    fc1.input_gradient(batch, dhidden, grads.gap);
  }
}

#define RF_INSTANTIATE(A)                                                                        \
  template void attention_hidden<A>(const Problem&, const AttentionParameters<A>&, int64_t,      \
                                    const A*, A*);                                               \
  template void attention_batch_stats<A>(const Problem&, const A*, A*, A*);                      \
  template void attention_from_hidden<A>(const Problem&, const AttentionParameters<A>&, int64_t, \
                                         const A*, A*);                                          \
  template void attention_backward<A>(const Problem&, const AttentionParameters<A>&, bool,       \
                                      const A*, const A*, const A*, const A*,                    \
                                      const AttentionGradients<A>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cpu
