// From the pool's partial sums to what the attention needs of them: stages of phase 2.
#pragma once

#include "cuda/prologue.cuh"

namespace resnest_fused::cuda {

// gap[b,c] = scale * sum_j partial[b,j,c], for samples of several chunks.
//   Items: a thread for each (b, c).
template <typename A>
struct GapArgs {
  int64_t batch;
  int64_t chunks;
  int64_t channels;
  const A* partial;  // (B, chunks, C)
  A scale;
  A* gap;  // (B, C)
};

template <typename A>
__device__ __forceinline__ void gap_item(const GapArgs<A>& args, int64_t item) {
  const int64_t i = item * blockDim.x + threadIdx.x;
  if (i >= args.batch * args.channels) {
    return;
  }
  const int64_t b = i / args.channels, c = i - b * args.channels;
  A sum = 0;
#pragma unroll 8
  for (int64_t j = 0; j < args.chunks; ++j) {
    sum += args.partial[(b * args.chunks + j) * args.channels + c];
  }
  args.gap[i] = sum * args.scale;
}

// From the partial sums to the gradients of the attention and, where asked for, of the logits.
//   Items: a thread for each (b, c).
template <typename A>
struct LogitsGradientArgs {
  int64_t batch;
  int64_t chunks;
  int64_t radix;
  int64_t channels;
  int64_t group_channels;
  bool with_prologue;
  const A* partial;    // (B, chunks, sums, R, C)
  Norm<A> bn0;         // weight and bias
  const A* invstd;     // (R*C), or null for 1
  A* sums;             // (B, 4, R, C); with a prologue
  A* dattention;       // (B, R, C)
  const A* attention;  // (B, R, C); with dlogits
  A* dlogits;          // (B, K, R, C/K) or null
};

template <typename A>
__device__ __forceinline__ void logits_gradient_item(const LogitsGradientArgs<A>& args,
                                                     int64_t item) {
  const int64_t features = args.radix * args.channels;
  const int64_t kinds = args.with_prologue ? kPrologueSums : 1;
  const int64_t i = item * blockDim.x + threadIdx.x;
  if (i >= args.batch * args.channels) {
    return;
  }
  const int64_t b = i / args.channels, c = i - b * args.channels;
  A sum_a_da = 0;
  for (int64_t r = 0; r < args.radix; ++r) {
    const int64_t f = r * args.channels + c;
    const A* const partial = args.partial + b * args.chunks * kinds * features + f;
    A da;
    if (args.with_prologue) {
      const A invstd = at_or(args.invstd, f, A(1));
      A of_kinds[kPrologueSums] = {};
#pragma unroll 4
      for (int64_t j = 0; j < args.chunks; ++j) {
#pragma unroll
        for (int kind = 0; kind < kPrologueSums; ++kind) {
          of_kinds[kind] += partial[(j * kPrologueSums + kind) * features];
        }
      }
      const A s1 = of_kinds[0], s2 = of_kinds[1];
      const A s3 = of_kinds[2] * invstd, s4 = of_kinds[3] * invstd;
      A* const sums = args.sums + b * kPrologueSums * features + f;
      sums[0] = s1;
      sums[features] = s2;
      sums[2 * features] = s3;
      sums[3 * features] = s4;
      da = args.bn0.weight.at_or(f, A(1)) * s3 + args.bn0.bias.at_or(f, A(0)) * s1;
    } else {
      da = 0;
#pragma unroll 8
      for (int64_t j = 0; j < args.chunks; ++j) {
        da += partial[j * features];
      }
    }
    args.dattention[b * features + f] = da;
    if (args.dlogits) {
      sum_a_da += args.attention[b * features + f] * da;
    }
  }
  if (args.dlogits) {
    for (int64_t r = 0; r < args.radix; ++r) {
      const int64_t at = b * features + r * args.channels + c;
      args.dlogits[b * features + logit_row(r, c, args.radix, args.group_channels)] =
          r_softmax_backward(args.attention[at], args.dattention[at], sum_a_da, args.radix);
    }
  }
}

}  // namespace resnest_fused::cuda
