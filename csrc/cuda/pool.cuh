// Phase 1, pool: the first read of x. Forward: the radix sum, averaged over the pixels; backward:
// the sums over pixels that the gradients of the attention and of bn0 need.
#pragma once

#include "cuda/prologue.cuh"
#include "cuda/slab.cuh"
#include "cuda/stages.cuh"

namespace resnest_fused::cuda {

// Splits whose loads are in flight, and whose sums and parameters are held, at the same time: as
// many of a compiled radix as take at most so many registers, if `each` of them takes some.
__host__ __device__ constexpr int splits_held(int radix, int each, int most) {
  int splits = radix > 0 ? radix : 1;
  while (splits % 2 == 0 && splits * each > most) {
    splits /= 2;
  }
  return splits;
}
// Positions that are loaded together, with about as many vectors.
__host__ __device__ constexpr int positions_held(int maps, int vectors) {
  return maps >= vectors ? 1 : vectors / maps;
}
// Vectors: few where they are in a line or a slab already, which is not far.
template <int kVector, bool kNhwc>
constexpr int kVectorsHeld = kInLines<kVector, kNhwc> || kInSlabs<kVector, kNhwc> ? 4 : 8;

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

// A thread's sum over its share of x. take(held, first_split) takes bn0's parameters and waits for
// x, which may be in a line. The order of sums does not depend on where x is.
template <int kRadix, bool kPrologue, bool kInLine, typename T, bool kNhwc, int kVector,
          typename Take>
__device__ __forceinline__ void pool_share(const Share<kVector, kNhwc>& share, const T* x,
                                           int radix, T* memory,
                                           Acc<T> (&sums)[1][kOwnSums<kVector, kNhwc>], Take take) {
  using A = Acc<T>;
  constexpr int kSplits = splits_held(kRadix, kPrologue && kNhwc ? 2 * kVector : 1, 32);
  constexpr int kBatch = positions_held(kSplits, kVectorsHeld<kVector, kNhwc>);
  for (int first_split = 0; first_split < radix; first_split += kSplits) {
    Maps<T, kSplits> maps;
#pragma unroll
    for (int r = 0; r < kSplits; ++r) {
      maps.set(r, x + share.x + (first_split + r) * share.split, share.x_step);
    }
    Line<kBatch, kInLine, T, kSplits, kVector, kNhwc> line(share, maps, memory);
    HeldPrologue<kSplits, kVector, kNhwc, A> held;
    take(held, first_split);
    line.for_each([&](auto width, const auto& values, int position, int step, int end) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (position + u * step < end) {
#pragma unroll
          for (int r = 0; r < kSplits; ++r) {
#pragma unroll
            for (int e = 0; e < decltype(width)::value; ++e) {
              A z = widen(values[r][u], e);
              if constexpr (kPrologue) {
                z = relu(preactivation(z, held.scale[r][e], held.shift[r][e]));
              }
              sums[0][kNhwc ? e : 0] += z;
            }
          }
        }
      }
    });
    line.end();
  }
}

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__device__ __forceinline__ void pool_block(const PoolArgs<T>& args, int64_t block, bool again) {
  const int radix = kRadix ? kRadix : args.sizes.radix;
  Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
  const Slabs<T, kVector, kNhwc> slabs(share, args.sizes, args.tiling, radix, again);
  const T* const x = slabs.bring(0, args.x, radix);
  Acc<T> sums[1][kOwnSums<kVector, kNhwc>] = {};
  pool_share<kRadix, kPrologue, kInLines<kVector, kNhwc>>(
      share, x, radix, lines<T>(args.tiling), sums, [&](auto& held, int first_split) {
        if constexpr (kPrologue) {
          held.take(share, args.sizes, args.bn0, args.prologue, first_split);
        }
        slabs.wait();
      });
  sum_over_share(share, args.tiling, args.sizes.channels, sums, [&](int, int c, Acc<T> total) {
    const int64_t row = share.sample * args.tiling.chunks + share.chunk;
    args.partial[row * args.sizes.channels + c] = total * args.scale;
  });
}

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<kVector, kNhwc>)
    pool_kernel(PoolArgs<T> args) {
  wait_for_launch_before();
  begin_next_launch();
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

// In a backward the sums or parameters of four splits take the registers of a third block.
template <bool kNhwc, int kRadix, int kVector>
constexpr int64_t kBackwardBlocks =
    kRadix > 2 ? kBlocksPerMultiprocessor : kMapBlocks<kVector, kNhwc>;

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kBackwardBlocks<kNhwc, kRadix, kVector>)
    pool_backward_kernel(PoolBackwardArgs<T> args) {
  wait_for_launch_before();
  begin_next_launch();
  using A = Acc<T>;
  open_stages(args.counters);
  constexpr int kSums = kPrologue ? kPrologueSums : 1;
  constexpr int kOwn = kOwnSums<kVector, kNhwc>;
  constexpr int kSplits = splits_held(kRadix, kOwn * (kPrologue ? kSums + 3 : 1), 64);
  constexpr int kBatch = positions_held(kSplits + 1, kVectorsHeld<kVector, kNhwc>);
  const int radix = kRadix ? kRadix : args.sizes.radix;
  const int64_t features = args.sizes.features();
  for (int64_t block = blockIdx.x; block < args.blocks; block += gridDim.x) {
    Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
    const Slabs<T, kVector, kNhwc> slabs(share, args.sizes, args.tiling, radix + 1,
                                         block != blockIdx.x);
    const T* const of_map = slabs.bring(0, args.x, radix);
    const T* const gradient = slabs.bring(radix, args.dout, 1);
    for (int first_split = 0; first_split < radix; first_split += kSplits) {
      Maps<T, kSplits + 1> maps;
      maps.set(kSplits, gradient + share.out, share.out_step);
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        maps.set(r, of_map + share.x + (first_split + r) * share.split, share.x_step);
      }
      Line<kBatch, kInLines<kVector, kNhwc>, T, kSplits + 1, kVector, kNhwc> line(
          share, maps, lines<T>(args.tiling));
      HeldPrologue<kSplits, kVector, kNhwc, A> held;
      if constexpr (kPrologue) {
        held.take(share, args.sizes, args.bn0, args.prologue, first_split);
      }
      slabs.wait();
      A sums[kSplits][kSums][kOwn] = {};
      line.for_each([&](auto width, const auto& values, int position, int step, int end) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (position + u * step < end) {
#pragma unroll
            for (int r = 0; r < kSplits; ++r) {
#pragma unroll
              for (int e = 0; e < decltype(width)::value; ++e) {
                const A dout = widen(values[kSplits][u], e);
                const A value = widen(values[r][u], e);
                A(&sum)[kSums][kOwn] = sums[r];
                const int own = kNhwc ? e : 0;
                if constexpr (kPrologue) {
                  const A centered = value - held.mean[r][e];
                  if (relu_passes(preactivation(value, held.scale[r][e], held.shift[r][e]))) {
                    sum[0][own] += dout;
                    sum[1][own] += A(1);
                    sum[2][own] = fma(dout, centered, sum[2][own]);
                    sum[3][own] += centered;
                  }
                } else {
                  sum[0][own] = fma(dout, value, sum[0][own]);
                }
              }
            }
          }
        }
      });
      line.end();
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        sum_over_share(share, args.tiling, args.sizes.channels, sums[r],
                       [&](int kind, int c, A total) {
                         const int64_t row = share.sample * args.tiling.chunks + share.chunk;
                         const int64_t f = int64_t{first_split + r} * args.sizes.channels + c;
                         args.partial[(row * kSums + kind) * features + f] = total;
                       });
      }
    }
  }
}

}  // namespace resnest_fused::cuda
