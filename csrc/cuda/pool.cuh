// Phase 1, pool: the first read of x. Forward: the radix sum, averaged over the pixels; backward:
// the sums over pixels that the gradients of the attention and of bn0 need.
#pragma once

#include "cuda/prologue.cuh"

namespace resnest_fused::cuda {

// Splits whose loads are in flight, and whose sums are held, at the same time. They are all of a
// compiled radix if `each` of them takes few registers, else one.
__host__ __device__ constexpr int splits_held(int radix, int each) {
  return radix * each <= 32 && radix > 0 ? radix : 1;
}
// Positions loaded together: about eight vectors in flight.
__host__ __device__ constexpr int positions_held(int splits) {
  return splits >= 8 ? 1 : 8 / splits;
}

// partial[b,j,c] = sum_{r, p in chunk j} z[b,r,c,p], times `scale`.
//   Grid: blocks of the map. Reads R units.
template <typename T>
struct PoolArgs {
  MapSizes sizes;
  Tiling tiling;
  int64_t blocks;
  const T* x;                 // (B, R*C, H, W)
  Prologue<Acc<T>> prologue;  // with kPrologue
  Acc<T> scale;
  Acc<T>* partial;  // (B, chunks, C)
};

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__device__ __forceinline__ void pool_block(const PoolArgs<T>& args, int64_t block) {
  using A = Acc<T>;
  using Coefficient = PerChannel<A, kVector, kNhwc>;
  constexpr int kSplits = splits_held(kRadix, kPrologue && kNhwc ? 2 * kVector : 1);
  constexpr int kBatch = positions_held(kSplits);
  const int radix = kRadix ? kRadix : args.sizes.radix;
  const Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
  A sums[1][kOwnSums<kVector, kNhwc>] = {};
  for (int first_split = 0; first_split < radix; first_split += kSplits) {
    Coefficient scale[kSplits], shift[kSplits];
    if constexpr (kPrologue) {
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        const int64_t f = int64_t{first_split + r} * args.sizes.channels + share.channel;
        scale[r] = Coefficient::of(args.prologue.scale, f, A(1), share.inside);
        shift[r] = Coefficient::of(args.prologue.shift, f, A(0), share.inside);
      }
    }
    const T* const x = args.x + share.x + first_split * share.split;
    share.template for_each<kBatch>([&](auto width, int position, int step, int end) {
      constexpr int kWidth = decltype(width)::value;
      Vector<T, kWidth> values[kSplits][kBatch];
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        load_batch(x, r * share.split, share.x_step, position, step, end, values[r]);
      }
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (position + u * step < end) {
#pragma unroll
            for (int e = 0; e < kWidth; ++e) {
              A z = widen(values[r][u].values[e]);
              if constexpr (kPrologue) {
                z = relu(preactivation(z, scale[r][e], shift[r][e]));
              }
              sums[0][kNhwc ? e : 0] += z;
            }
          }
        }
      }
    });
  }
  sum_over_share(share, args.tiling, args.sizes.channels, sums, [&](int c, A(&totals)[1]) {
    const int64_t row = share.sample * args.tiling.chunks + share.chunk;
    args.partial[row * args.sizes.channels + c] = totals[0] * args.scale;
  });
}

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kBlocksPerMultiprocessor)
    pool_kernel(PoolArgs<T> args) {
  for (int64_t block = blockIdx.x; block < args.blocks; block += gridDim.x) {
    pool_block<T, kNhwc, kRadix, kVector, kPrologue>(args, block);
  }
}

// gap[b,c] = scale * sum_j partial[b,j,c], for samples of several chunks.
//   Grid: a thread for each (b, c).
template <typename A>
struct PoolFinishArgs {
  int64_t batch;
  int64_t chunks;
  int64_t channels;
  const A* partial;  // (B, chunks, C)
  A scale;
  A* gap;  // (B, C)
};

template <typename A>
__global__ void __launch_bounds__(kMapThreads) pool_finish_kernel(PoolFinishArgs<A> args) {
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.batch * args.channels;
       i += threads) {
    const int64_t b = i / args.channels, c = i - b * args.channels;
    A sum = 0;
#pragma unroll 8
    for (int64_t j = 0; j < args.chunks; ++j) {
      sum += args.partial[(b * args.chunks + j) * args.channels + c];
    }
    args.gap[i] = sum * args.scale;
  }
}

// partial[b,j,r,c] = sum_{p in chunk j} dout x. With a prologue partial[b,j,s,r,c] are the sums
// that prologue_sums.h names, with x - mean for xhat in S3 and S4.
//   Grid: blocks of the map. Reads R + 1 units.
template <typename T>
struct PoolBackwardArgs {
  MapSizes sizes;
  Tiling tiling;
  int64_t blocks;
  const T* dout;  // (B, C, H, W)
  const T* x;     // (B, R*C, H, W)
  Prologue<Acc<T>> prologue;
  Acc<T>* partial;  // (B, chunks, sums, R, C)
};

// Resident blocks of the backward in NCHW. With three, whose registers spill on sm_120, it takes
// 152 us instead of 186 on an H100 (64@56, bf16, 256 samples).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int64_t kNchwBackwardBlocks = 3;
#else
constexpr int64_t kNchwBackwardBlocks = kBlocksPerMultiprocessor;
#endif
template <bool kNhwc, int kRadix>
constexpr int64_t kPoolBackwardBlocks =
    !kNhwc && (kRadix == 1 || kRadix == 2) ? kNchwBackwardBlocks : kBlocksPerMultiprocessor;

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kPoolBackwardBlocks<kNhwc, kRadix>)
    pool_backward_kernel(PoolBackwardArgs<T> args) {
  using A = Acc<T>;
  using Coefficient = PerChannel<A, kVector, kNhwc>;
  constexpr int kSums = kPrologue ? kPrologueSums : 1;
  constexpr int kOwn = kOwnSums<kVector, kNhwc>;
  constexpr int kSplits =
      splits_held(kRadix, kNhwc ? kVector * (kPrologue ? 2 * kSums : 1) : kSums);
  constexpr int kBatch = kNhwc && kPrologue ? 2 : positions_held(kSplits + 1);
  const int radix = kRadix ? kRadix : args.sizes.radix;
  const int64_t features = args.sizes.features();
  for (int64_t block = blockIdx.x; block < args.blocks; block += gridDim.x) {
    const Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
    for (int first_split = 0; first_split < radix; first_split += kSplits) {
      Coefficient scale[kSplits], shift[kSplits], mean[kSplits];
      if constexpr (kPrologue) {
#pragma unroll
        for (int r = 0; r < kSplits; ++r) {
          const int64_t f = int64_t{first_split + r} * args.sizes.channels + share.channel;
          scale[r] = Coefficient::of(args.prologue.scale, f, A(1), share.inside);
          shift[r] = Coefficient::of(args.prologue.shift, f, A(0), share.inside);
          mean[r] = Coefficient::of(args.prologue.mean, f, A(0), share.inside);
        }
      }
      A sums[kSplits][kSums][kOwn] = {};
      const T* const x = args.x + share.x + first_split * share.split;
      share.template for_each<kBatch>([&](auto width, int position, int step, int end) {
        constexpr int kWidth = decltype(width)::value;
        Vector<T, kWidth> g[kBatch], values[kSplits][kBatch];
        load_batch(args.dout, share.out, share.out_step, position, step, end, g);
#pragma unroll
        for (int r = 0; r < kSplits; ++r) {
          load_batch(x, r * share.split, share.x_step, position, step, end, values[r]);
        }
#pragma unroll
        for (int r = 0; r < kSplits; ++r) {
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (position + u * step < end) {
#pragma unroll
              for (int e = 0; e < kWidth; ++e) {
                const A dout = widen(g[u].values[e]), value = widen(values[r][u].values[e]);
                A(&sum)[kSums][kOwn] = sums[r];
                const int own = kNhwc ? e : 0;
                if constexpr (kPrologue) {
                  const A n = preactivation(value, scale[r][e], shift[r][e]);
                  // Both factors are 0 where the ReLU stops x: 0 times infinity would be NaN.
                  const A passed_g = relu_backward(dout, n);
                  const A passed_x = relu_backward(value - mean[r][e], n);
                  sum[0][own] += passed_g;
                  sum[1][own] += relu_backward(A(1), n);
                  sum[2][own] = fma(passed_g, passed_x, sum[2][own]);
                  sum[3][own] += passed_x;
                } else {
                  sum[0][own] = fma(dout, value, sum[0][own]);
                }
              }
            }
          }
        }
      });
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        sum_over_share(share, args.tiling, args.sizes.channels, sums[r],
                       [&](int c, A(&totals)[kSums]) {
                         const int64_t row = share.sample * args.tiling.chunks + share.chunk;
                         const int64_t f = int64_t{first_split + r} * args.sizes.channels + c;
#pragma unroll
                         for (int s = 0; s < kSums; ++s) {
                           args.partial[(row * kSums + s) * features + f] = totals[s];
                         }
                       });
      }
    }
  }
}

// From the partial sums to the gradients of the attention and, where asked for, of the logits.
//   Grid: a thread for each (b, c).
template <typename A>
struct PoolBackwardFinishArgs {
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
__global__ void __launch_bounds__(kMapThreads)
    pool_backward_finish_kernel(PoolBackwardFinishArgs<A> args) {
  const int64_t features = args.radix * args.channels;
  const int64_t kinds = args.with_prologue ? kPrologueSums : 1;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < args.batch * args.channels;
       i += threads) {
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
}

}  // namespace resnest_fused::cuda
