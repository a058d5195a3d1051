// The prologue z = relu(bn0(x)) or relu(x): its parameters by feature, bn0's batch statistics, and
// bn0's gradients. The pool and recombine compute it wherever they load x. Each block of the pool,
// which comes first, takes the parameters from bn0 itself; the first sample's leave them for those
// behind it.
//
// There bn0 is one multiply-add, x * scale + shift. All kernels evaluate it by `preactivation`, or
// forward and backward would disagree on which elements the ReLU lets through.
#pragma once

#include "cuda/norm.cuh"
#include "cuda/slab.cuh"
#include "prologue_sums.h"

namespace resnest_fused::cuda {

// Parameters by feature, null for relu(x). `offset` and `slope` are null with frozen statistics.
// With those of the batch dx loses, as in `batch_norm_backward`,
//   offset + slope * (x - mean) = scale * (mean_dz + xhat * mean_dz_xhat)
// where mean_dz = dbeta / N and mean_dz_xhat = dgamma / N.
template <typename A>
struct Prologue {
  A* scale;   // (R*C) gamma * invstd
  A* shift;   // (R*C) beta - mean * scale
  A* mean;    // (R*C)
  A* invstd;  // (R*C)
  A* offset;  // (R*C)
  A* slope;   // (R*C)
};

template <typename A>
__device__ __forceinline__ A preactivation(A x, A scale, A shift) {
  return fma(x, scale, shift);
}

template <typename A>
__device__ __forceinline__ A at_or(const A* values, int64_t i, A otherwise) {
  return values ? values[i] : otherwise;
}

template <typename A>
__device__ __forceinline__ A shift_of(const NormAt<A>& at) {
  return fma(-at.mean, at.scale, at.beta);
}

template <typename A>
__device__ __forceinline__ void put_prologue(const Prologue<A>& prologue, int64_t f,
                                             const NormAt<A>& at) {
  prologue.scale[f] = at.scale;
  prologue.shift[f] = shift_of(at);
  prologue.mean[f] = at.mean;
  prologue.invstd[f] = at.invstd;
}

template <typename A>
__device__ __forceinline__ void put_statistics_gradient(const Prologue<A>& prologue, int64_t f,
                                                        A mean_dz, A mean_dz_xhat) {
  prologue.offset[f] = prologue.scale[f] * mean_dz;
  prologue.slope[f] = prologue.scale[f] * prologue.invstd[f] * mean_dz_xhat;
}

// bn0's parameters at a thread's channels, of `kSplits` splits from `first_split` on. Every thread
// of the block must call. Shared memory: pool_bytes.
template <int kSplits, int kVector, bool kNhwc, typename A>
struct HeldPrologue {
  PerChannel<A, kVector, kNhwc> scale[kSplits], shift[kSplits], mean[kSplits];

  __device__ __forceinline__ void take(const Share<kVector, kNhwc>& share, const MapSizes& sizes,
                                       const Norm<A>& bn0, const Prologue<A>& prologue,
                                       int first_split) {
    constexpr int64_t kWidest =
        kNhwc ? kWarp * kVector : kMapThreads / (kVector > 1 ? kLeastLanes : kLeastSingleLanes);
    static_assert(kSplits * kWidest <= (kVector > 1 ? kHeldFeatures : kWarp));
    A* const held = shared<A>();
    const int count = kSplits * share.width;
    const bool leaves = prologue.scale && share.sample == 0 && share.chunk == 0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      const int channel = share.first_channel + i % share.width;
      if (channel < sizes.channels) {
        const int64_t f = int64_t{first_split + i / share.width} * sizes.channels + channel;
        const NormAt<A> at = bn0.at(f);
        held[i] = at.scale;
        held[count + i] = shift_of(at);
        held[2 * count + i] = at.mean;
        if (leaves) {
          put_prologue(prologue, f, at);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kSplits; ++r) {
      const int own = r * share.width + share.channel - share.first_channel;
      const auto of = [&](int array, A otherwise) {
        return PerChannel<A, kVector, kNhwc>::of(held + array * count, own, otherwise,
                                                 share.inside);
      };
      scale[r] = of(0, A(1));
      shift[r] = of(1, A(0));
      mean[r] = of(2, A(0));
    }
    __syncthreads();  // from here on the memory is for sums
  }

  // What a pool needs of them, from where they were left.
  __device__ __forceinline__ void take(const Share<kVector, kNhwc>& share, const MapSizes& sizes,
                                       const Prologue<A>& prologue, int first_split) {
#pragma unroll
    for (int r = 0; r < kSplits; ++r) {
      const int64_t f = int64_t{first_split + r} * sizes.channels + share.channel;
      using Parameters = PerChannel<A, kVector, kNhwc>;
      scale[r] = Parameters::of(prologue.scale, f, A(1), share.inside);
      shift[r] = Parameters::of(prologue.shift, f, A(0), share.inside);
    }
  }
};

// The prologue where no pool comes before.
//   Grid: a thread for each feature.
template <typename A>
struct Prepare {
  int64_t features;
  Norm<A> bn0;
  Prologue<A> prologue;
  const A* mean_dz;       // (R*C) or null
  const A* mean_dz_xhat;  // (R*C) or null
};

template <typename A>
__global__ void __launch_bounds__(kMapThreads) prepare_kernel(Prepare<A> args) {
  wait_for_launch_before();
  begin_next_launch();
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t f = thread; f < args.features; f += threads) {
    put_prologue(args.prologue, f, args.bn0.at(f));
    if (args.mean_dz) {
      put_statistics_gradient(args.prologue, f, args.mean_dz[f], args.mean_dz_xhat[f]);
    }
  }
}

// Mean and sum of squared deviations of x over the pixels of a block, by feature. A thread takes
// those of a few elements at a time. It joins them to the ones before by the rule of Chan, Golub
// and LeVeque (1979). Then threads are joined, first their means. So no sum cancels, whichever
// values come first. Reads R units.
//   Grid: blocks of the map with radix 1. In NHWC the batch is one sample, as its pixels lie one
//   behind the other.
template <typename T>
struct StatisticsArgs {
  MapSizes sizes;  // radix 1: `channels` are all features
  Tiling tiling;
  int64_t blocks;
  const T* x;       // (B, F, H, W)
  Acc<T>* mean;     // (samples * chunks, F)
  Acc<T>* squares;  // (samples * chunks, F)
};

// Sums of one slab take few registers.
template <int kVector, bool kNhwc>
constexpr int64_t kStatisticsResident = kMapBlocks<kVector, kNhwc> + kInSlabs<kVector, kNhwc>;

template <typename T, bool kNhwc, int kVector>
__global__ void __launch_bounds__(kMapThreads, kStatisticsResident<kVector, kNhwc>)
    statistics_kernel(StatisticsArgs<T> args) {
  wait_for_launch_before();
  begin_next_launch();
  using A = Acc<T>;
  // Values are joined by so many; a line holds three turns of them.
  constexpr int kTurn = static_cast<int>(kLineBytes / (3 * sizeof(T) * kVector));
  constexpr int kBatch = kInSlabs<kVector, kNhwc> ? 2 : kVector > 1 ? kTurn : 4;
  for (int64_t block = blockIdx.x; block < args.blocks; block += gridDim.x) {
    Share<kVector, kNhwc> share(args.sizes, args.tiling, block);
    const Slabs<T, kVector, kNhwc> slabs(share, args.sizes, args.tiling, 1, block != blockIdx.x);
    Maps<T, 1> maps;
    maps.set(0, slabs.bring(0, args.x, 1) + share.x, share.x_step);
    Line<kBatch, kInLines<kVector, kNhwc>, T, 1, kVector, kNhwc> line(share, maps,
                                                                      lines<T>(args.tiling));
    slabs.wait();
    const int first = kNhwc ? share.chunk * args.tiling.chunk_pixels : 0;
    const T* const first_pixel = maps.from[0] + first * share.x_step;
    // Each channel's; in NHWC the vector's.
    constexpr int kOwn = kOwnSums<kVector, kNhwc>;
    A origin[kOwn] = {};
    if (share.inside) {
      const Vector<T, kOwn> pixel = load<kOwn>(first_pixel);
#pragma unroll
      for (int e = 0; e < kOwn; ++e) {
        origin[e] = widen(pixel.values[e]);
      }
    }
    // Of the thread's elements, all as distances from the origin.
    A count = 0, mean[kOwn] = {}, squares[kOwn] = {};
    line.for_each([&](auto width, const auto& values, int position, int step, int end) {
      constexpr int kWidth = decltype(width)::value;
      A apart[kBatch][kWidth], sums[kOwn] = {};
      int positions = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (position + u * step < end) {
          ++positions;
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            const int own = kNhwc ? e : 0;
            apart[u][e] = widen(values[0][u], e) - origin[own];
            sums[own] += apart[u][e];
          }
        }
      }
      const A fresh = A(kNhwc ? positions : positions * kWidth);
      const A all = count + fresh, part = fresh / all, per_fresh = A(1) / fresh;
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        const A fresh_mean = sums[own] * per_fresh;
        A fresh_squares = 0;
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (position + u * step < end) {
#pragma unroll
            for (int e = 0; e < (kNhwc ? 1 : kWidth); ++e) {
              const A centered = apart[u][kNhwc ? own : e] - fresh_mean;
              fresh_squares = fma(centered, centered, fresh_squares);
            }
          }
        }
        const A between = fresh_mean - mean[own];
        mean[own] = fma(between, part, mean[own]);
        squares[own] += fma(between * between, count * part, fresh_squares);
      }
      count = all;
    });
    line.end();
    const int64_t row = (share.sample * args.tiling.chunks + share.chunk) * args.sizes.channels;
    A sums[1][kOwn], of_block[kOwn];
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      sums[0][own] = count * mean[own];
    }
    if constexpr (kNhwc) {
      sum_over_share(share, args.tiling, args.sizes.channels, sums,
                     [&](int, int f, A total) { args.mean[row + f] = total / A(share.pixels); });
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        of_block[own] = share.inside ? args.mean[row + share.channel + own] : A(0);
      }
    } else {
      A totals[1] = {sums[0][0]};
      sum_over_lanes(totals, share.lanes);
      of_block[0] = totals[0] / A(share.pixels);
    }
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const A between = mean[own] - of_block[own];
      sums[0][own] = fma(between * between, count, squares[own]);
    }
    sum_over_share(share, args.tiling, args.sizes.channels, sums, [&](int, int f, A total) {
      args.squares[row + f] = total;
      if constexpr (kNhwc) {
        args.mean[row + f] += A(widen(first_pixel[f - share.channel]));
      } else {
        args.mean[row + f] = of_block[0] + origin[0];
      }
    });
  }
}

// Mean and biased variance of each column over all elements, in two passes over rows of partial
// ones. A row has the mean and the sum of squared deviations of `count` elements, every `chunks`th
// one of `last_count`. Over no elements the result is zeros.
//   Grid: a block for kColumns columns.
template <typename A>
struct ColumnStatistics {
  int64_t rows;
  int64_t features;
  const A* mean;     // (rows, F)
  const A* squares;  // (rows, F), or null where each row is one element
  double count;
  double last_count;
  int64_t chunks;
  double total;  // elements, or 1

  __device__ __forceinline__ void compute(const Column& column, A& of_mean, A& of_var) const {
    const unsigned every = static_cast<unsigned>(chunks);  // rows are at most kMostBlocks
    const auto count_of = [&](int64_t row) {
      return static_cast<unsigned>(row + 1) % every == 0 ? last_count : count;
    };
    struct Row {
      A mean, squares;
    };
    const auto load = [&](int64_t row) -> Row {
      const int64_t at = row * features + column.feature;
      return {mean[at], squares ? squares[at] : A(0)};
    };
    double sums[1];
    sum_over_rows<1>(column, rows, sums, load, [&](int64_t row, Row of_row, double (&add)[1]) {
      add[0] += count_of(row) * of_row.mean;
    });
    const double center = sums[0] / total;
    sum_over_rows<1>(column, rows, sums, load, [&](int64_t row, Row of_row, double (&add)[1]) {
      const double apart = of_row.mean - center;
      add[0] += count_of(row) * (apart * apart) + of_row.squares;
    });
    of_mean = static_cast<A>(center);
    of_var = static_cast<A>(sums[0] / total);
  }
};

template <typename A>
struct CombineArgs {
  ColumnStatistics<A> partial;
  A* mean;  // (F)
  A* var;   // (F)
};

template <typename A>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerMultiprocessor)
    combine_kernel(CombineArgs<A> args) {
  wait_for_launch_before();
  begin_next_launch();
  const int64_t features = args.partial.features;
  for (int64_t block = blockIdx.x; block * kColumns < features; block += gridDim.x) {
    const Column column(block, features);
    A mean, var;
    args.partial.compute(column, mean, var);
    if (column.inside && column.lane == 0) {
      args.mean[column.feature] = mean;
      args.var[column.feature] = var;
    }
  }
}

// dgamma and dbeta of bn0 by the formulas of prologue_sums.h, and the part of dx that is lost to
// the batch's statistics.
//   Items, and the grid where it is launched alone: a block for kColumns features.
template <typename A>
struct PrologueBackwardArgs {
  int64_t batch;
  int64_t radix;
  int64_t channels;
  double pixels;
  const A* sums;       // (B, 4, R, C)
  const A* attention;  // (B, R, C)
  const A* dgap;       // (B, C)
  Result dgamma;       // (R*C) or absent
  Result dbeta;        // (R*C) or absent
  Prologue<A> prologue;
};

template <typename A>
__device__ __forceinline__ void prologue_backward_item(const PrologueBackwardArgs<A>& args,
                                                       int64_t item) {
  const int64_t features = args.radix * args.channels;
  const double per_pixel = 1.0 / args.pixels;
  const Column column(item, features);
  const int64_t f = column.feature;
  struct Row {
    A s1, s2, s3, s4, attention, dgap;
  };
  const auto load = [&](int64_t b) -> Row {
    const A* const s = args.sums + b * kPrologueSums * features + f;
    return {s[0],
            s[features],
            s[2 * features],
            s[3 * features],
            args.attention[b * features + f],
            args.dgap[b * args.channels + f % args.channels]};
  };
  double totals[2];
  sum_over_rows<2>(column, args.batch, totals, load, [&](int64_t, Row row, double (&add)[2]) {
    // Where the ReLU lets nothing through, not even a NaN in attention or dgap counts.
    if (row.s2 != A(0)) {
      const double a = row.attention, d = row.dgap * per_pixel;
      add[0] += a * row.s3 + d * row.s4;
      add[1] += a * row.s1 + d * row.s2;
    }
  });
  if (column.inside && column.lane == 0) {
    args.dgamma.put(f, static_cast<A>(totals[0]));
    args.dbeta.put(f, static_cast<A>(totals[1]));
    if (args.prologue.offset) {
      const double elements = static_cast<double>(args.batch) * args.pixels;
      put_statistics_gradient(args.prologue, f, static_cast<A>(totals[1] / elements),
                              static_cast<A>(totals[0] / elements));
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kColumnThreads)
    prologue_backward_kernel(PrologueBackwardArgs<A> args) {
  wait_for_launch_before();
  begin_next_launch();
  const int64_t features = args.radix * args.channels;
  for (int64_t item = blockIdx.x; item * kColumns < features; item += gridDim.x) {
    prologue_backward_item(args, item);
  }
}

}  // namespace resnest_fused::cuda
