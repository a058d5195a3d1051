// Phase 2, attention: kernels.
#include "cpu/attention.h"

#include <algorithm>
#include <memory>

#include "cpu/parallel.h"
#include "formulas.h"

namespace resnest_fused::cpu {
namespace {

// Samples that an FC computes at once, one to a lane. A lane's sums do not depend on the others'.
template <typename A>
constexpr int64_t kTile = kLanes<A>;

// Rows of an FC in one unit of work; columns summed before they join the total, which keeps the
// rounding error of long sums small.
constexpr int64_t kRowsPerUnit = 32;
constexpr int64_t kColumnsPerSum = 64;

template <typename A>
std::unique_ptr<A[]> uninitialized(int64_t count) {
  return std::make_unique_for_overwrite<A[]>(static_cast<size_t>(count));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// y = W x (+ bias) in `groups` independent blocks; W may be read transposed.
template <typename A>
struct Fc {
  const A* weight;
  const A* bias;  // (groups * rows) or null
  int64_t groups;
  int64_t rows;     // per group
  int64_t columns;  // per group
  int64_t row_stride;
  int64_t column_stride;

  int64_t inputs() const { return groups * columns; }
  int64_t outputs() const { return groups * rows; }
  int64_t units_per_group() const { return ceil_div(rows, kRowsPerUnit); }
};

template <typename A>
Fc<A> fc_of(const A* weight, const A* bias, int64_t groups, int64_t outputs, int64_t inputs) {
  const int64_t columns = inputs / groups;
  return {weight, bias, groups, outputs / groups, columns, columns, 1};
}

// The map of gradients, x = W^T y, of an FC with these inputs and outputs.
template <typename A>
Fc<A> transposed_fc_of(const A* weight, int64_t groups, int64_t outputs, int64_t inputs) {
  const int64_t columns = inputs / groups;
  return {weight, nullptr, groups, columns, outputs / groups, 1, columns};
}

// tiles[t, f, lane] = rows[t * kTile + lane, f], zero beyond the batch; t in [begin, end).
template <typename A>
struct ToTiles {
  template <typename Isa>
  static RF_INLINE void run(const A* rows /* (batch, F) */, int64_t batch, int64_t features,
                            int64_t begin, int64_t end, A* tiles /* (tiles, F, kTile) */) {
    for (int64_t t = begin; t < end; ++t) {
      const A* first = rows + t * kTile<A> * features;
      const int64_t samples = std::min(kTile<A>, batch - t * kTile<A>);
      A* tile = tiles + t * features * kTile<A>;
      for (int64_t f = 0; f < features; ++f) {
        A* lanes = tile + f * kTile<A>;
        for (int64_t s = 0; s < samples; ++s) {
          lanes[s] = first[s * features + f];
        }
        std::fill(lanes + samples, lanes + kTile<A>, A{});
      }
    }
  }
};

// Units (tile, group, block of rows) of y = W x + bias.
template <typename A>
struct FcUnits {
  template <typename Isa>
  static RF_INLINE void run(const Fc<A>* fc, const A* tiles /* (tiles, inputs, kTile) */,
                            int64_t batch, int64_t begin, int64_t end, A* y /* (batch, outputs) */) {
    const int64_t blocks = fc->units_per_group();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit / (fc->groups * blocks);
      const int64_t group = unit / blocks % fc->groups;
      const int64_t first = unit % blocks * kRowsPerUnit;
      const int64_t last = std::min(first + kRowsPerUnit, fc->rows);
      const A* x = tiles + (tile * fc->groups + group) * fc->columns * kTile<A>;
      const int64_t samples = std::min(kTile<A>, batch - tile * kTile<A>);
      A* out = y + tile * kTile<A> * fc->outputs() + group * fc->rows;
      int64_t row = first;
      for (; row + Isa::kRows <= last; row += Isa::kRows) {
        rows<Isa::kRows>(*fc, x, group, row, samples, out);
      }
      for (; row < last; ++row) {
        rows<1>(*fc, x, group, row, samples, out);
      }
    }
  }

  template <int kRows>
  static RF_INLINE void rows(const Fc<A>& fc, const A* x, int64_t group, int64_t row,
                             int64_t samples, A* out) {
    const A* weight = fc.weight + group * fc.rows * fc.columns + row * fc.row_stride;
    Vec<A> total[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      total[i] = fc.bias ? broadcast(fc.bias[group * fc.rows + row + i]) : Vec<A>{};
    }
    for (int64_t first = 0; first < fc.columns; first += kColumnsPerSum) {
      const int64_t last = std::min(first + kColumnsPerSum, fc.columns);
      Vec<A> sum[kRows] = {};
      for (int64_t column = first; column < last; ++column) {
        const Vec<A> lanes = load(x + column * kTile<A>);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          sum[i] += weight[i * fc.row_stride + column * fc.column_stride] * lanes;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        total[i] += sum[i];
      }
    }
    A block[kRows][kTile<A>];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      store(block[i], total[i]);
    }
    for (int64_t s = 0; s < samples; ++s) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        out[s * fc.outputs() + row + i] = block[i][s];
      }
    }
  }
};

template <typename A>
void run_fc(const Fc<A>& fc, int64_t batch, const A* x /* (batch, inputs) */,
            A* y /* (batch, outputs) */) {
  const int64_t tiles = ceil_div(batch, kTile<A>);
  const auto in_tiles = uninitialized<A>(tiles * fc.inputs() * kTile<A>);
  A* const in = in_tiles.get();
  parallel_units(tiles, fc.inputs() * kTile<A> * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<ToTiles<A>>(x, batch, fc.inputs(), begin, end, in);
                 });
  // A unit reads its rows of W and takes about as long as moving four times those bytes.
  const int64_t unit_bytes =
      4 * std::min(kRowsPerUnit, fc.rows) * fc.columns * static_cast<int64_t>(sizeof(A));
  parallel_units(tiles * fc.groups * fc.units_per_group(), unit_bytes,
                 [&](int64_t begin, int64_t end) {
                   dispatch<FcUnits<A>>(&fc, const_cast<const A*>(in), batch, begin, end, y);
                 });
}

// dW[j, i] = sum_b dy[b, j] x[b, i] and dbias[j] = sum_b dy[b, j], b ascending; units are blocks of
// rows of one group.
template <typename A>
struct FcWeightGradient {
  template <typename Isa>
  static RF_INLINE void run(const Fc<A>* fc, int64_t batch, const A* dy /* (batch, outputs) */,
                            const A* x /* (batch, inputs) */, int64_t begin, int64_t end,
                            A* dweight /* (outputs, columns) or null */,
                            A* dbias /* (outputs) or null */) {
    const int64_t blocks = fc->units_per_group();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / blocks;
      const int64_t first = group * fc->rows + unit % blocks * kRowsPerUnit;
      const int64_t last = std::min(first + kRowsPerUnit, (group + 1) * fc->rows);
      const A* group_x = x + group * fc->columns;
      if (dbias) {
        std::fill(dbias + first, dbias + last, A{});
        for (int64_t b = 0; b < batch; ++b) {
          for (int64_t j = first; j < last; ++j) {
            dbias[j] += dy[b * fc->outputs() + j];
          }
        }
      }
      if (dweight) {
        int64_t j = first;
        for (; j + Isa::kRows <= last; j += Isa::kRows) {
          rows<Isa::kRows>(*fc, batch, dy + j, group_x, dweight + j * fc->columns);
        }
        for (; j < last; ++j) {
          rows<1>(*fc, batch, dy + j, group_x, dweight + j * fc->columns);
        }
      }
    }
  }

  template <int kRows>
  static RF_INLINE void rows(const Fc<A>& fc, int64_t batch, const A* dy, const A* x, A* dweight) {
    for (int64_t i = 0; i < fc.columns; i += kLanes<A>) {
      const int64_t count = std::min<int64_t>(kLanes<A>, fc.columns - i);
      Vec<A> sum[kRows] = {};
      for (int64_t b = 0; b < batch; ++b) {
        const A* from = x + b * fc.inputs() + i;
        const Vec<A> lanes = load_lanes(from, count);
#pragma GCC unroll 8
        for (int j = 0; j < kRows; ++j) {
          sum[j] += dy[b * fc.outputs() + j] * lanes;
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) {
        A* to = dweight + j * fc.columns + i;
        store_lanes(to, sum[j], count);
      }
    }
  }
};

template <typename A>
void run_fc_weight_gradient(const Fc<A>& fc, int64_t batch, const A* dy, const A* x, A* dweight,
                            A* dbias) {
  const int64_t unit_bytes = std::min(kRowsPerUnit, fc.rows) * (fc.columns + batch) *
                             static_cast<int64_t>(sizeof(A));
  parallel_units(fc.groups * fc.units_per_group(), unit_bytes, [&](int64_t begin, int64_t end) {
    dispatch<FcWeightGradient<A>>(&fc, batch, dy, x, begin, end, dweight, dbias);
  });
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
  run_fc(fc_of(params.fc1_weight, params.fc1_bias, p.cardinality, p.inter, p.channels), batch, gap,
         hidden);
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
  run_fc(fc_of(params.fc2_weight, params.fc2_bias, p.cardinality, p.features(), p.inter), batch,
         const_cast<const A*>(u.get()), logits.get());
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
  const int64_t row_bytes = 3 * p.features() * static_cast<int64_t>(sizeof(A));
  const auto dlogits_buffer = uninitialized<A>(batch * p.features());
  A* const dlogits = dlogits_buffer.get();
  parallel_units(batch, row_bytes, [&](int64_t begin, int64_t end) {
    dispatch<RSoftmaxBackward<A>>(&p, attention, dattention, begin, end, dlogits);
  });
  if (grads.fc2_weight || grads.fc2_bias) {
    const auto u = activated(p, params.bn1, batch, hidden);
    const auto fc2 = fc_of<A>(nullptr, nullptr, p.cardinality, p.features(), p.inter);
    run_fc_weight_gradient(fc2, batch, const_cast<const A*>(dlogits),
                           const_cast<const A*>(u.get()), grads.fc2_weight, grads.fc2_bias);
  }

  const auto dhidden_buffer = uninitialized<A>(batch * p.inter);
  A* const dhidden = dhidden_buffer.get();
  run_fc(transposed_fc_of(params.fc2_weight, p.cardinality, p.features(), p.inter), batch,
         const_cast<const A*>(dlogits), dhidden);

  const auto sums = uninitialized<A>(2 * p.inter);
  A* const dgamma = grads.bn1_weight ? grads.bn1_weight : sums.get();
  A* const dbeta = grads.bn1_bias ? grads.bn1_bias : sums.get() + p.inter;
  parallel_units(p.inter, 5 * batch * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<NormBackward<A>>(&params.bn1, batch_stats, hidden, batch, p.inter,
                                             begin, end, dhidden, dgamma, dbeta);
                 });
  if (grads.fc1_weight || grads.fc1_bias) {
    const auto fc1 = fc_of<A>(nullptr, nullptr, p.cardinality, p.inter, p.channels);
    run_fc_weight_gradient(fc1, batch, const_cast<const A*>(dhidden), gap, grads.fc1_weight,
                           grads.fc1_bias);
  }
  if (grads.gap) {
    run_fc(transposed_fc_of(params.fc1_weight, p.cardinality, p.inter, p.channels), batch,
           const_cast<const A*>(dhidden), grads.gap);
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
