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

// A thread's share of the result: put(offset, vector) stores it, and wait() waits for x, which may
// be in a line. The sample's attention and bn0's parameters are arrays by feature.
template <int kRadix, bool kPrologue, bool kInLine, typename T, bool kNhwc, int kVector,
          typename Wait, typename Put>
__device__ __forceinline__ void recombine_share(const Share<kVector, kNhwc>& share,
                                                const MapSizes& sizes, const T* x, T* memory,
                                                const Acc<T>* attention,
                                                const Prologue<Acc<T>>& prologue, Wait wait,
                                                Put put) {
  using A = Acc<T>;
  using Coefficient = PerChannel<A, kVector, kNhwc>;
  // The coefficients of a compiled radix stay in registers, else a split's come from L1.
  constexpr bool kHeld = kRadix > 0;
  constexpr int kSplits = kHeld ? kRadix : 1;
  constexpr int kBatch = kHeld ? positions_held(kSplits, 4) : kInSlabs<kVector, kNhwc> ? 1 : 4;
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
  const auto add = [&](auto width, auto& sums, const auto& values) {
#pragma unroll
    for (int r = 0; r < kSplits; ++r) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
#pragma unroll
        for (int e = 0; e < decltype(width)::value; ++e) {
          A z = widen(values[r][u], e);
          if constexpr (kPrologue) {
            z = relu(preactivation(z, scale[r][e], shift[r][e]));
          }
          sums[u][e] = fma(a[r][e], z, sums[u][e]);
        }
      }
    }
  };
  const auto leave = [&](auto width, const auto& sums, int position, int step, int end) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (position + u * step < end) {
        Vector<T, decltype(width)::value> result;
#pragma unroll
        for (int e = 0; e < decltype(width)::value; ++e) {
          result.values[e] = narrow<T>(sums[u][e]);
        }
        put(share.out + (position + u * step) * share.out_step, result);
      }
    }
  };
  if constexpr (kHeld) {
    Maps<T, kSplits> maps;
#pragma unroll
    for (int r = 0; r < kSplits; ++r) {
      maps.set(r, x + share.x + r * share.split, share.x_step);
    }
    Line<kBatch, kInLine, T, kSplits, kVector, kNhwc> line(share, maps, memory);
    take_coefficients(0);
    wait();
    line.for_each([&](auto width, const auto& values, int position, int step, int end) {
      A sums[kBatch][decltype(width)::value] = {};
      add(width, sums, values);
      leave(width, sums, position, step, end);
    });
  } else {
    wait();
    share.template for_each<kBatch>([&](auto width, int position, int step, int end) {
      A sums[kBatch][decltype(width)::value] = {};
      for (int split = 0; split < sizes.radix; ++split) {
        Vector<T, decltype(width)::value> values[1][kBatch];
        load_batch(x, share.x + split * share.split, share.x_step, position, step, end, values[0]);
        take_coefficients(split);
        add(width, sums, values);
      }
      leave(width, sums, position, step, end);
    });
  }
}

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__device__ __forceinline__ void recombine_block(const RecombineArgs<T>& args, int64_t block,
                                                bool again) {
  const int radix = kRadix ? kRadix : args.sizes.radix;
  Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
  const Slabs<T, kVector, kNhwc> slabs(share, args.sizes, args.tiling, radix, again);
  const T* const x = slabs.bring(0, args.x, radix);
  recombine_share<kRadix, kPrologue, kInLines<kVector, kNhwc>>(
      share, args.sizes, x, lines<T>(args.tiling),
      args.attention + share.sample * args.sizes.features(), args.prologue, [&] { slabs.wait(); },
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
  wait_for_launch_before();
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
__global__ void __launch_bounds__(kMapThreads, kBackwardBlocks<kNhwc, kRadix, kVector>)
    recombine_backward_kernel(RecombineBackwardArgs<T> args) {
  wait_for_launch_before();
  using A = Acc<T>;
  using Coefficient = PerChannel<A, kVector, kNhwc>;
  // With x of 16 bits the mean goes into the offset: x has fewer digits than that costs.
  constexpr bool kFolded = sizeof(T) < 4;
  // Of four splits with a mean of their own, two would spill.
  constexpr int kEach = !kPrologue ? 2 : kFolded || kRadix <= 2 ? 7 : 9;
  constexpr int kSplits = splits_held(kRadix, Coefficient::kCount * kEach, kNhwc ? 64 : 16);
  constexpr int kMaps = 1 + (kPrologue ? kSplits : 0);  // dout comes last
  constexpr int kBatch = kInSlabs<kVector, kNhwc> ? 1 : positions_held(kMaps, 4);
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
      const int64_t first = share.x + first_split * share.split;
      Maps<T, kMaps> maps;
      maps.set(kMaps - 1, gradient + share.out, share.out_step);
#pragma unroll
      for (int r = 0; r < kMaps - 1; ++r) {
        maps.set(r, of_map + first + r * share.split, share.x_step);
      }
      Line<kBatch, kInLines<kVector, kNhwc>, T, kMaps, kVector, kNhwc> line(share, maps,
                                                                            lines<T>(args.tiling));
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
      line.for_each([&](auto width, const auto& values, int position, int step, int end) {
        constexpr int kWidth = decltype(width)::value;
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (position + u * step < end) {
#pragma unroll
            for (int r = 0; r < kSplits; ++r) {
              Vector<T, kWidth> result;
#pragma unroll
              for (int e = 0; e < kWidth; ++e) {
                A dx = fma(p[r][e], widen(values[kMaps - 1][u], e), q[r][e]);
                if constexpr (kPrologue) {
                  const A x = widen(values[r][u], e);
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
