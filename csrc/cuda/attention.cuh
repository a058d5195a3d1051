// Phase 2, attention: fc1, bn1, ReLU, fc2 and the r-softmax on (B, C)-sized data, and their
// gradients. Each direction is one launch, in stages.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/pool_sums.cuh"
#include "cuda/product.cuh"
#include "cuda/prologue.cuh"
#include "cuda/stages.cuh"

namespace resnest_fused::cuda {

// Those of a group come from the host, as a division takes a GPU as long as a load.
struct FcSizes {
  int64_t radix;
  int64_t channels;
  int64_t inter;
  int64_t group_channels;  // channels / cardinality
  int64_t group_inter;     // inter / cardinality

  __device__ __forceinline__ int64_t features() const { return radix * channels; }
  __device__ __forceinline__ int64_t group_features() const { return radix * group_channels; }
};

// hidden = fc1(gap) and, if bn1 has its statistics already, u = relu(bn1(hidden)). Both are (B, I),
// and either may be null.
//   Items: a tile of samples and of a group's outputs.
template <typename A>
struct HiddenArgs {
  FcSizes sizes;
  int64_t batch;
  const A* gap;      // (B, C)
  Parameter weight;  // (I, C/K)
  Parameter bias;    // (I) or absent
  Norm<A> bn1;
  A* hidden;
  A* u;
};

template <typename A>
__device__ __forceinline__ void hidden_item(const HiddenArgs<A>& args, int64_t item) {
  const int64_t inputs = args.sizes.group_channels, outputs = args.sizes.group_inter;
  const Tile tile(item, args.batch, outputs);
  const Operand<A, false> gap{args.gap + tile.group * inputs, args.sizes.channels, args.batch,
                              inputs};
  const WeightOperand<false> weight{args.weight, tile.group * outputs * inputs, inputs, outputs,
                                    inputs};
  multiply_tile<A>(gap, weight, tile.row, tile.column, [&](int64_t b, int64_t output, A value) {
    const int64_t i = tile.group * outputs + output;
    const A hidden = value + args.bias.template at_or<A>(i, A(0));
    if (args.hidden) {
      args.hidden[b * args.sizes.inter + i] = hidden;
    }
    if (args.u) {
      args.u[b * args.sizes.inter + i] = relu(args.bn1.at(i).normalise(hidden));
    }
  });
}

// bn1's batch statistics, and u = relu(bn1(hidden)) with them.
//   Items: kColumns features.
template <typename A>
struct BatchNormArgs {
  ColumnStatistics<A> hidden;  // (B, I)
  Norm<A> bn1;                 // its weight, bias and eps
  A* mean;                     // (I)
  A* var;                      // (I)
  A* u;                        // (B, I)
};

template <typename A>
__device__ __forceinline__ void batch_norm_item(const BatchNormArgs<A>& args, int64_t item) {
  const int64_t inter = args.hidden.features, batch = args.hidden.rows;
  const Column column(item, inter);
  A mean, var;
  args.hidden.compute(column, mean, var);
  if (column.inside && column.lane == 0) {
    args.mean[column.feature] = mean;
    args.var[column.feature] = var;
  }
  const NormAt<A> at = column.inside ? args.bn1.with(column.feature, mean, var) : NormAt<A>{};
  for_rows(
      column, batch, [&](int64_t b) { return args.hidden.mean[b * inter + column.feature]; },
      [&](int64_t b, A hidden) {
        args.u[b * inter + column.feature] = relu(at.normalise(hidden));
      });
}

// attention = r-softmax(fc2(u))
//   Items: a tile of samples and of a group's channels, in all splits.
template <typename A>
struct SoftmaxArgs {
  FcSizes sizes;
  int64_t batch;
  const A* u;        // (B, I)
  Parameter weight;  // (R*C, I/K), rows in the logits' order
  Parameter bias;    // (R*C) or absent
  A* attention;      // (B, R, C); holds the logits in between
};

template <typename A>
struct Exp {
  __device__ __forceinline__ A operator()(A x) const { return exp(x); }
};

template <typename A>
__device__ __forceinline__ void softmax_item(const SoftmaxArgs<A>& args, int64_t item) {
  const int64_t radix = args.sizes.radix, channels = args.sizes.channels;
  const int64_t features = args.sizes.features();
  const int64_t inputs = args.sizes.group_inter, outputs = args.sizes.group_channels;
  const Tile tile(item, args.batch, outputs);
  const Operand<A, false> u{args.u + tile.group * inputs, args.sizes.inter, args.batch, inputs};
  const int64_t first_channel = tile.group * outputs;
  // Each split's product needs all registers: no two are to be in flight.
#pragma unroll 1
  for (int r = 0; r < static_cast<int>(radix); ++r) {
    const int64_t first = logit_row(r, first_channel, radix, outputs);
    const WeightOperand<false> weight{args.weight, first * inputs, inputs, outputs, inputs};
    multiply_tile<A>(u, weight, tile.row, tile.column, [&](int64_t b, int64_t c, A value) {
      args.attention[b * features + r * channels + first_channel + c] =
          value + args.bias.template at_or<A>(first + c, A(0));
    });
  }
  for (int at = static_cast<int>(threadIdx.x); at < kTileSize; at += static_cast<int>(blockDim.x)) {
    const int64_t b = tile.row + at / kTileColumns, c = tile.column + at % kTileColumns;
    if (b < args.batch && c < outputs) {
      r_softmax(args.attention + b * features + first_channel + c, channels, radix, Exp<A>{});
    }
  }
}

// Phase 2, from the pool's sums to the attention.
//   Grid: a block for each item.
template <typename A>
struct AttentionArgs {
  Stages<ForwardStage::kCount> stages;
  GapArgs<A> gap;
  HiddenArgs<A> hidden;
  BatchNormArgs<A> batch_norm;
  SoftmaxArgs<A> softmax;
};

template <typename A>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks<A>)
    attention_kernel(AttentionArgs<A> args) {
  wait_for_launch_before();
  begin_next_launch();
  using Stage = ForwardStage;
  const auto& stages = args.stages;
  int64_t item;
  switch (stages.take(item)) {
    case Stage::kGap:
      gap_item(args.gap, item);
      stages.done(Stage::kGap);
      break;
    case Stage::kHidden:
      stages.wait_for(Stage::kGap);
      hidden_item(args.hidden, item);
      stages.done(Stage::kHidden);
      break;
    case Stage::kBatchNorm:
      stages.wait_for(Stage::kHidden);
      batch_norm_item(args.batch_norm, item);
      stages.done(Stage::kBatchNorm);
      break;
    default:
      stages.wait_for(stages.items[Stage::kBatchNorm] > 0 ? Stage::kBatchNorm : Stage::kHidden);
      softmax_item(args.softmax, item);
  }
}

// du = fc2^T dlogits
//   Items: a tile of samples and of a group's inputs.
template <typename A>
struct HiddenGradientArgs {
  FcSizes sizes;
  int64_t batch;
  const A* dlogits;  // (B, K, R, C/K)
  Parameter weight;  // (R*C, I/K)
  A* du;             // (B, I)
};

template <typename A>
__device__ __forceinline__ void hidden_gradient_item(const HiddenGradientArgs<A>& args,
                                                     int64_t item) {
  const int64_t inputs = args.sizes.group_inter;
  const int64_t outputs = args.sizes.group_features();
  const Tile tile(item, args.batch, inputs);
  const int64_t first = tile.group * outputs;
  const Operand<A, false> dlogits{args.dlogits + first, args.sizes.features(), args.batch, outputs};
  const WeightOperand<true> weight{args.weight, first * inputs, inputs, inputs, outputs};
  multiply_tile<A>(dlogits, weight, tile.row, tile.column, [&](int64_t b, int64_t i, A value) {
    args.du[b * args.sizes.inter + tile.group * inputs + i] = value;
  });
}

// dhidden = du through the ReLU and bn1, with the gradients of bn1 and of fc1's bias. It computes u
// again, for the gradient of fc2's weight.
//   Items: kColumns features.
template <typename A>
struct BatchNormBackwardArgs {
  int64_t batch;
  int64_t inter;
  bool batch_stats;
  Norm<A> bn1;
  const A* hidden;   // (B, I)
  A* dhidden;        // (B, I); du on entry
  A* u;              // (B, I)
  Result dgamma;     // (I) or absent
  Result dbeta;      // (I) or absent
  Result dfc1_bias;  // (I) or absent
};

template <typename A>
__device__ __forceinline__ void batch_norm_backward_item(const BatchNormBackwardArgs<A>& args,
                                                         int64_t item) {
  const Column column(item, args.inter);
  const NormAt<A> at = column.inside ? args.bn1.at(column.feature) : NormAt<A>{};
  struct Row {
    A hidden, gradient;
  };
  const auto load = [&](int64_t b) -> Row {
    const int64_t i = b * args.inter + column.feature;
    return {args.hidden[i], args.dhidden[i]};
  };
  double sums[2];
  sum_over_rows<2>(column, args.batch, sums, load, [&](int64_t b, Row row, double (&add)[2]) {
    const int64_t i = b * args.inter + column.feature;
    const A n = at.normalise(row.hidden);
    const A dn = relu_backward(row.gradient, n);
    args.dhidden[i] = dn;
    args.u[i] = relu(n);
    add[0] += dn;
    add[1] += static_cast<double>(dn) * at.xhat(row.hidden);
  });
  // Not a product with 0, through which NaN would reach every sample.
  const A mean_dn = args.batch_stats ? static_cast<A>(sums[0] / args.batch) : A(0);
  const A mean_dn_xhat = args.batch_stats ? static_cast<A>(sums[1] / args.batch) : A(0);
  double bias[1];
  sum_over_rows<1>(column, args.batch, bias, load, [&](int64_t b, Row row, double (&add)[1]) {
    const A dhidden =
        batch_norm_backward(row.gradient, at.xhat(row.hidden), at.scale, mean_dn, mean_dn_xhat);
    args.dhidden[b * args.inter + column.feature] = dhidden;
    add[0] += dhidden;
  });
  if (column.inside && column.lane == 0) {
    args.dbeta.put(column.feature, static_cast<A>(sums[0]));
    args.dgamma.put(column.feature, static_cast<A>(sums[1]));
    args.dfc1_bias.put(column.feature, static_cast<A>(bias[0]));
  }
}

// dfc2 = dlogits^T u and dfc1 = dhidden^T gap, each element a sum over the batch in one block;
// dgap = fc1^T dhidden; and the gradient of fc2's bias, dlogits summed over the batch.
//   Items: tiles of dfc2 and of dfc1, in groups; of samples and of a group's channels; and, for
//   fc2's bias, kColumns features.
template <typename A>
struct GradientsArgs {
  FcSizes sizes;
  int64_t batch;
  const A* gap;          // (B, C)
  const A* u;            // (B, I)
  const A* dlogits;      // (B, K, R, C/K)
  const A* dhidden;      // (B, I)
  Parameter fc1_weight;  // (I, C/K)
  Result dfc1_weight;    // (I, C/K) or absent
  Result dfc2_weight;    // (R*C, I/K) or absent
  Result dfc2_bias;      // (R*C) or absent
  A* dgap;               // (B, C) or null
};

// The same product of one FC or the other, so that there is one code for both.
template <typename A>
__device__ __forceinline__ void weight_gradient_item(const GradientsArgs<A>& args, bool of_fc2,
                                                     int64_t item) {
  const FcSizes& sizes = args.sizes;
  const int64_t rows = of_fc2 ? sizes.group_features() : sizes.group_inter;
  const int64_t columns = of_fc2 ? sizes.group_inter : sizes.group_channels;
  const Tile tile(item, rows, columns);
  const int64_t first = tile.group * rows;
  const Operand<A, true> gradient{(of_fc2 ? args.dlogits : args.dhidden) + first,
                                  of_fc2 ? sizes.features() : sizes.inter, rows, args.batch};
  const Operand<A, true> input{(of_fc2 ? args.u : args.gap) + tile.group * columns,
                               of_fc2 ? sizes.inter : sizes.channels, columns, args.batch};
  const Result result = of_fc2 ? args.dfc2_weight : args.dfc1_weight;
  multiply_tile<A>(gradient, input, tile.row, tile.column, [&](int64_t m, int64_t n, A value) {
    result.put((first + m) * columns + n, value);
  });
}

template <typename A>
__device__ __forceinline__ void gap_gradient_item(const GradientsArgs<A>& args, int64_t item) {
  const FcSizes& sizes = args.sizes;
  const int64_t channels = sizes.group_channels, inter = sizes.group_inter;
  const Tile tile(item, args.batch, channels);
  const int64_t first = tile.group * inter;
  const Operand<A, false> dhidden{args.dhidden + first, sizes.inter, args.batch, inter};
  const WeightOperand<true> weight{args.fc1_weight, first * channels, channels, channels, inter};
  multiply_tile<A>(dhidden, weight, tile.row, tile.column, [&](int64_t b, int64_t c, A value) {
    args.dgap[b * sizes.channels + tile.group * channels + c] = value;
  });
}

template <typename A>
__device__ __forceinline__ void fc2_bias_gradient_item(const GradientsArgs<A>& args, int64_t item) {
  const int64_t features = args.sizes.features();
  const Column column(item, features);
  double sums[1];
  sum_over_rows<1>(
      column, args.batch, sums,
      [&](int64_t b) { return args.dlogits[b * features + column.feature]; },
      [](int64_t, A dlogit, double (&add)[1]) { add[0] += dlogit; });
  if (column.inside && column.lane == 0) {
    args.dfc2_bias.put(column.feature, static_cast<A>(sums[0]));
  }
}

// Phase 2's backward, from the pool's sums to all gradients but x's. Stages of what is not wanted
// have no items.
//   Grid: as in the forward.
template <typename A>
struct AttentionBackwardArgs {
  Stages<BackwardStage::kCount> stages;
  LogitsGradientArgs<A> logits;
  HiddenGradientArgs<A> hidden;
  BatchNormBackwardArgs<A> batch_norm;
  GradientsArgs<A> gradients;
  PrologueBackwardArgs<A> prologue;
};

template <typename A>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks<A>)
    attention_backward_kernel(AttentionBackwardArgs<A> args) {
  wait_for_launch_before();
  begin_next_launch();
  using Stage = BackwardStage;
  const auto& stages = args.stages;
  int64_t item;
  const int stage = stages.take(item);
  switch (stage) {
    case Stage::kLogits:
      logits_gradient_item(args.logits, item);
      stages.done(Stage::kLogits);
      break;
    case Stage::kHidden:
      stages.wait_for(Stage::kLogits);
      hidden_gradient_item(args.hidden, item);
      stages.done(Stage::kHidden);
      break;
    case Stage::kBatchNorm:
      stages.wait_for(Stage::kHidden);
      batch_norm_backward_item(args.batch_norm, item);
      stages.done(Stage::kBatchNorm);
      break;
    case Stage::kGap:
      stages.wait_for(Stage::kBatchNorm);
      gap_gradient_item(args.gradients, item);
      stages.done(Stage::kGap);
      break;
    case Stage::kFc2Weight:
    case Stage::kFc1Weight:
      stages.wait_for(Stage::kBatchNorm);
      weight_gradient_item(args.gradients, stage == Stage::kFc2Weight, item);
      break;
    case Stage::kFc2Bias:
      stages.wait_for(Stage::kLogits);
      fc2_bias_gradient_item(args.gradients, item);
      break;
    default:
      stages.wait_for(Stage::kGap);
      prologue_backward_item(args.prologue, item);
  }
}

}  // namespace resnest_fused::cuda
