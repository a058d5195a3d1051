// Phase 1, pool: the first read of x. Forward: the radix sum, averaged over the pixels; backward:
// the sums over pixels that the gradients of the attention and of bn0 need.
#pragma once

#include "cuda/prologue.cuh"
#include "cuda/slab.cuh"
#include "cuda/stages.cuh"

namespace resnest_fused::cuda {

// Splits whose loads are in flight, and whose sums are held, at the same time. They are all of a
// compiled radix if `each` of them takes few registers, else one.
__host__ __device__ constexpr int splits_held(int radix, int each) {
  return radix * each <= 32 && radix > 0 ? radix : 1;
}
// Positions loaded together: about eight vectors in flight, or four from shared memory, which is
// not far.
__host__ __device__ constexpr int positions_held(int splits, bool in_slabs) {
  const int vectors = in_slabs ? 4 : 8;
  return splits >= vectors ? 1 : vectors / splits;
}

// partial[b,j,c] = sum_{r, p in chunk j} z[b,r,c,p], times `scale`.
//   Grid: blocks of the map. Reads R units.
template <typename T>
struct PoolArgs {
  MapSizes sizes;
  Tiling tiling;
  int64_t blocks;
  const T* x;                 // (B, R*C, H, W)
  Norm<Acc<T>> bn0;           // with kPrologue
  Prologue<Acc<T>> prologue;  // to leave
  Acc<T> scale;
  Acc<T>* partial;     // (B, chunks, C)
  unsigned* counters;  // of phase 2, to open; or null
};

// A thread's sum over its share of x, whose splits it loads at once, to wait for memory once, or
// one after the other. take(held, first_split) takes bn0's parameters and waits for x.
template <int kRadix, bool kPrologue, bool kAtOnce, typename T, bool kNhwc, int kVector,
          typename Take>
__device__ __forceinline__ void pool_share(const Share<kVector, kNhwc>& share, const T* of_map,
                                           int radix, Acc<T> (&sums)[1][kOwnSums<kVector, kNhwc>],
                                           Take take) {
  using A = Acc<T>;
  constexpr int kSplits = splits_held(kRadix, kPrologue && kNhwc ? 2 * kVector : 1);
  constexpr int kBatch = positions_held(kSplits, kInSlabs<kVector, kNhwc>);
  for (int first_split = 0; first_split < radix; first_split += kSplits) {
    HeldPrologue<kSplits, kVector, kNhwc, A> held;
    take(held, first_split);
    const T* const x = of_map + share.x + first_split * share.split;
    share.template for_each<kBatch>([&](auto width, int position, int step, int end) {
      constexpr int kWidth = decltype(width)::value;
      Vector<T, kWidth> values[kSplits][kBatch];
      const auto load_split = [&](int r) {
        load_batch(x, r * share.split, share.x_step, position, step, end, values[r]);
      };
#pragma unroll
      for (int r = 0; kAtOnce && r < kSplits; ++r) {
        load_split(r);
      }
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        if constexpr (!kAtOnce) {
          load_split(r);
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (position + u * step < end) {
#pragma unroll
            for (int e = 0; e < kWidth; ++e) {
              A z = widen(values[r][u].values[e]);
              if constexpr (kPrologue) {
                z = relu(preactivation(z, held.scale[r][e], held.shift[r][e]));
              }
              sums[0][kNhwc ? e : 0] += z;
            }
          }
        }
      }
    });
  }
}

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__device__ __forceinline__ void pool_block(const PoolArgs<T>& args, int64_t block, bool again) {
  const int radix = kRadix ? kRadix : args.sizes.radix;
  Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
  const Slabs<T, kVector, kNhwc> slabs(share, args.sizes, args.tiling, radix, again);
  const T* const x = slabs.bring(0, args.x, radix);
  Acc<T> sums[1][kOwnSums<kVector, kNhwc>] = {};
  pool_share<kRadix, kPrologue, !kInSlabs<kVector, kNhwc>>(
      share, x, radix, sums, [&](auto& held, int first_split) {
        if constexpr (kPrologue) {
          held.take(share, args.sizes, args.bn0, args.prologue, first_split);
        }
        slabs.wait();
      });
  sum_over_share(share, args.tiling, args.sizes.channels, sums, [&](int c, Acc<T>(&totals)[1]) {
    const int64_t row = share.sample * args.tiling.chunks + share.chunk;
    args.partial[row * args.sizes.channels + c] = totals[0] * args.scale;
  });
}

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<kVector, kNhwc>)
    pool_kernel(PoolArgs<T> args) {
  open_stages(args.counters);
  for (int64_t block = blockIdx.x; block < args.blocks; block += gridDim.x) {
    pool_block<T, kNhwc, kRadix, kVector, kPrologue>(args, block, block != blockIdx.x);
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
  const T* dout;              // (B, C, H, W)
  const T* x;                 // (B, R*C, H, W)
  Norm<Acc<T>> bn0;           // with kPrologue
  Prologue<Acc<T>> prologue;  // to leave
  Acc<T>* partial;            // (B, chunks, sums, R, C)
  unsigned* counters;         // of phase 2, to open
};

// The sums of four splits take the registers of a third block.
template <bool kNhwc, int kRadix, int kVector>
constexpr int64_t kPoolBackwardBlocks =
    kRadix > 2 ? kBlocksPerMultiprocessor : kMapBlocks<kVector, kNhwc>;

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kPoolBackwardBlocks<kNhwc, kRadix, kVector>)
    pool_backward_kernel(PoolBackwardArgs<T> args) {
  using A = Acc<T>;
  open_stages(args.counters);
  constexpr int kSums = kPrologue ? kPrologueSums : 1;
  constexpr int kOwn = kOwnSums<kVector, kNhwc>;
  constexpr int kSplits =
      splits_held(kRadix, kNhwc ? kVector * (kPrologue ? 2 * kSums : 1) : kSums);
  constexpr int kBatch =
      kNhwc && kPrologue ? 2 : positions_held(kSplits + 1, kInSlabs<kVector, kNhwc>);
  const int radix = kRadix ? kRadix : args.sizes.radix;
  const int64_t features = args.sizes.features();
  for (int64_t block = blockIdx.x; block < args.blocks; block += gridDim.x) {
    Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
    const Slabs<T, kVector, kNhwc> slabs(share, args.sizes, args.tiling, radix + 1,
                                         block != blockIdx.x);
    const T* const of_map = slabs.bring(0, args.x, radix);
    const T* const gradient = slabs.bring(radix, args.dout, 1);
    for (int first_split = 0; first_split < radix; first_split += kSplits) {
      HeldPrologue<kSplits, kVector, kNhwc, A> held;
      if constexpr (kPrologue) {
        held.take(share, args.sizes, args.bn0, args.prologue, first_split);
      }
      slabs.wait();
      A sums[kSplits][kSums][kOwn] = {};
      const T* const x = of_map + share.x + first_split * share.split;
      share.template for_each<kBatch>([&](auto width, int position, int step, int end) {
        constexpr int kWidth = decltype(width)::value;
        Vector<T, kWidth> g[kBatch], values[kSplits][kBatch];
        load_batch(gradient, share.out, share.out_step, position, step, end, g);
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
                  const A n = preactivation(value, held.scale[r][e], held.shift[r][e]);
                  // Both factors are 0 where the ReLU stops x: 0 times infinity would be NaN.
                  const A passed_g = relu_backward(dout, n);
                  const A passed_x = relu_backward(value - held.mean[r][e], n);
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

}  // namespace resnest_fused::cuda
