// Phase 3, recombine: the second read of x. Forward: the weighted sum over the radix; backward: dx.
#pragma once

#include "cuda/pool.cuh"

namespace resnest_fused::cuda {

// out[b,c,p] = sum_r attention[b,r,c] z[b,r,c,p]
//   Grid: blocks of the map. The last come first, to find what the pool read last still in L2.
//   Reads R units, writes 1.
template <typename T>
struct RecombineArgs {
  MapSizes sizes;
  Tiling tiling;
  int64_t blocks;
  const T* x;                 // (B, R*C, H, W)
  Prologue<Acc<T>> prologue;  // with kPrologue
  const Acc<T>* attention;    // (B, R, C)
  T* out;                     // (B, C, H, W)
};

// A thread's share of the result: put(offset, vector) stores it, and wait() waits for x. The
// sample's attention and bn0's parameters are arrays by feature.
template <int kRadix, bool kPrologue, typename T, bool kNhwc, int kVector, typename Wait,
          typename Put>
__device__ __forceinline__ void recombine_share(const Share<kVector, kNhwc>& share,
                                                const MapSizes& sizes, const T* x,
                                                const Acc<T>* attention,
                                                const Prologue<Acc<T>>& prologue, Wait wait,
                                                Put put) {
  using A = Acc<T>;
  using Coefficient = PerChannel<A, kVector, kNhwc>;
  constexpr int kEach = (kNhwc ? kVector : 1) * (kPrologue ? 3 : 1);
  // If all splits have few coefficients, these stay in registers. Else a split's come from L1.
  constexpr bool kHeld = kRadix > 0 && kRadix * kEach <= 48;
  constexpr int kSplits = kHeld ? kRadix : 1;
  constexpr int kBatch = kHeld ? (kRadix >= 4 ? 1 : 4 / kRadix) : kInSlabs<kVector, kNhwc> ? 1 : 4;
  const int radix = kRadix ? kRadix : sizes.radix;
  Coefficient a[kSplits], scale[kSplits], shift[kSplits];
  const auto take_coefficients = [&](int first_split) {
#pragma unroll
    for (int r = 0; r < kSplits; ++r) {
      const int64_t f = int64_t{first_split + r} * sizes.channels + share.channel;
      a[r] = Coefficient::of(attention, f, A(0), share.inside);
      if constexpr (kPrologue) {
        scale[r] = Coefficient::of(prologue.scale, f, A(1), share.inside);
        shift[r] = Coefficient::of(prologue.shift, f, A(0), share.inside);
      }
    }
  };
  if constexpr (kHeld) {
    take_coefficients(0);
  }
  wait();
  share.template for_each<kBatch>([&](auto width, int position, int step, int end) {
    constexpr int kWidth = decltype(width)::value;
    A sums[kBatch][kWidth] = {};
    for (int first_split = 0; first_split < radix; first_split += kSplits) {
      Vector<T, kWidth> values[kSplits][kBatch];
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        load_batch(x, share.x + (first_split + r) * share.split, share.x_step, position, step, end,
                   values[r]);
      }
      if constexpr (!kHeld) {
        take_coefficients(first_split);
      }
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            A z = widen(values[r][u].values[e]);
            if constexpr (kPrologue) {
              z = relu(preactivation(z, scale[r][e], shift[r][e]));
            }
            sums[u][e] = fma(a[r][e], z, sums[u][e]);
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (position + u * step < end) {
        Vector<T, kWidth> result;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          result.values[e] = narrow<T>(sums[u][e]);
        }
        put(share.out + (position + u * step) * share.out_step, result);
      }
    }
  });
}

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__device__ __forceinline__ void recombine_block(const RecombineArgs<T>& args, int64_t block,
                                                bool again) {
  const int radix = kRadix ? kRadix : args.sizes.radix;
  Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
  const Slabs<T, kVector, kNhwc> slabs(share, args.sizes, args.tiling, radix, again);
  const T* const x = slabs.bring(0, args.x, radix);
  recombine_share<kRadix, kPrologue>(
      share, args.sizes, x, args.attention + share.sample * args.sizes.features(), args.prologue,
      [&] { slabs.wait(); },
      [&](int64_t offset, const auto& result) { slabs.put(args.out, offset, result); });
  slabs.leave(args.out, 1);
}

// A radix that is not compiled takes the registers of a third block.
template <bool kNhwc, int kRadix, int kVector>
constexpr int64_t kRecombineBlocks =
    kRadix == 0 ? kBlocksPerMultiprocessor : kMapBlocks<kVector, kNhwc>;

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kRecombineBlocks<kNhwc, kRadix, kVector>)
    recombine_kernel(RecombineArgs<T> args) {
  for (int64_t block = blockIdx.x; block < args.blocks; block += gridDim.x) {
    recombine_block<T, kNhwc, kRadix, kVector, kPrologue>(args, args.blocks - 1 - block,
                                                          block != blockIdx.x);
  }
}

// dz_r = attention_r dout + dgap / HW, and
//   dx = dz                                        plain form: reads 1 unit, writes R
//   dx = m scale dz - offset - slope (x - mean)    with a prologue, m = [bn0(x) > 0]: reads R more;
//                                                  offset and slope only with batch statistics
//   Grid: as in the forward.
template <typename T>
struct RecombineBackwardArgs {
  MapSizes sizes;
  Tiling tiling;
  int64_t blocks;
  const T* dout;  // (B, C, H, W)
  const T* x;     // (B, R*C, H, W); with kPrologue
  Prologue<Acc<T>> prologue;
  const Acc<T>* attention;  // (B, R, C)
  const Acc<T>* dgap;       // (B, C)
  Acc<T> per_pixel;         // 1 / HW
  T* dx;                    // (B, R*C, H, W)
};

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<kVector, kNhwc>)
    recombine_backward_kernel(RecombineBackwardArgs<T> args) {
  using A = Acc<T>;
  using Coefficient = PerChannel<A, kVector, kNhwc>;
  // With x of 16 bits the mean goes into the offset: x has fewer digits than that costs.
  constexpr bool kFolded = sizeof(T) < 4;
  constexpr int kSplits = splits_held(kRadix, (kNhwc ? kVector : 1) * (kPrologue ? 9 : 2));
  constexpr bool kFew = kInSlabs<kVector, kNhwc> || (kNhwc && kPrologue && kRadix == 0);
  constexpr int kBatch = kFew ? 1 : kSplits == 1 && !kNhwc ? 4 : 2;
  const int radix = kRadix ? kRadix : args.sizes.radix;
  for (int64_t index = blockIdx.x; index < args.blocks; index += gridDim.x) {
    Share<kVector, kNhwc> share(args.sizes, args.tiling, args.blocks - 1 - index);
    const Slabs<T, kVector, kNhwc> slabs(share, args.sizes, args.tiling, kPrologue ? radix + 1 : 1,
                                         index != blockIdx.x);
    const T* of_map = nullptr;
    if constexpr (kPrologue) {
      of_map = slabs.bring(0, args.x, radix);
    }
    const T* const gradient = slabs.bring(radix, args.dout, 1);
    const auto of = [&](const A* values, int64_t first, A otherwise) {
      return Coefficient::of(values, first, otherwise, share.inside);
    };
    for (int first_split = 0; first_split < radix; first_split += kSplits) {
      // dx = p dout + q, with bn0's scale in both.
      Coefficient p[kSplits], q[kSplits];
      Coefficient scale[kSplits], shift[kSplits], mean[kSplits], offset[kSplits], slope[kSplits];
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        const int64_t f = int64_t{first_split + r} * args.sizes.channels + share.channel;
        p[r] = of(args.attention, share.sample * args.sizes.features() + f, A(0));
        q[r] = of(args.dgap, share.sample * args.sizes.channels + share.channel, A(0));
#pragma unroll
        for (int e = 0; e < Coefficient::kCount; ++e) {
          q[r].values[e] *= args.per_pixel;
        }
        if constexpr (kPrologue) {
          scale[r] = of(args.prologue.scale, f, A(1));
          shift[r] = of(args.prologue.shift, f, A(0));
          mean[r] = of(args.prologue.mean, f, A(0));
          offset[r] = of(args.prologue.offset, f, A(0));
          slope[r] = of(args.prologue.slope, f, A(0));
#pragma unroll
          for (int e = 0; e < Coefficient::kCount; ++e) {
            p[r].values[e] *= scale[r].values[e];
            q[r].values[e] *= scale[r].values[e];
            if constexpr (kFolded) {
              offset[r].values[e] =
                  fma(-mean[r].values[e], slope[r].values[e], offset[r].values[e]);
            }
          }
        }
      }
      slabs.wait();
      const int64_t first = share.x + first_split * share.split;
      share.template for_each<kBatch>([&](auto width, int position, int step, int end) {
        constexpr int kWidth = decltype(width)::value;
        Vector<T, kWidth> g[kBatch], values[kSplits][kBatch];
        load_batch(gradient, share.out, share.out_step, position, step, end, g);
        if constexpr (kPrologue) {
#pragma unroll
          for (int r = 0; r < kSplits; ++r) {
            load_batch(of_map, first + r * share.split, share.x_step, position, step, end,
                       values[r]);
          }
        }
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (position + u * step < end) {
#pragma unroll
            for (int r = 0; r < kSplits; ++r) {
              Vector<T, kWidth> result;
#pragma unroll
              for (int e = 0; e < kWidth; ++e) {
                A dx = fma(p[r][e], widen(g[u].values[e]), q[r][e]);
                if constexpr (kPrologue) {
                  const A x = widen(values[r][u].values[e]);
                  dx = relu_backward(dx, preactivation(x, scale[r][e], shift[r][e]));
                  if (args.prologue.offset) {
                    dx -= fma(kFolded ? x : x - mean[r][e], slope[r][e], offset[r][e]);
                  }
                }
                result.values[e] = narrow<T>(dx);
              }
              slabs.put(args.dx, first + r * share.split + (position + u * step) * share.x_step,
                        result);
            }
          }
        }
      });
    }
    slabs.leave(args.dx, radix);
  }
}

}  // namespace resnest_fused::cuda
