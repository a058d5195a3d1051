// Phase 1, pool: the first read of x. Forward: the global average of the radix sum; backward: the
// sums over pixels that the gradients of the attention and of bn0 need.
#pragma once

#include <algorithm>

#include "cpu/elements.h"
#include "cpu/kernels/prologue.h"
#include "cpu/kernels/rows.h"
#include "cpu/parallel.h"
#include "cpu/work_items.h"
#include "problem.h"

namespace resnest_fused::cpu::RF_SET {

// partial[b,c] = sum_{r,p} z[b,r,c,p]; a work item is (b, c).
template <typename T, bool kPrologue>
RF_KERNEL void pool_nchw(const Problem& p, const Prologue<Acc<T>>& prologue, const T* x,
                         int64_t begin, int64_t end, Acc<T>* partial) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t pixels = p.pixels();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.channels, c = item % p.channels;
    Sums<V, 1, 4> sums{};
    for (int64_t r = 0; r < p.radix; ++r) {
      const T* row = x + ((b * p.radix + r) * p.channels + c) * pixels;
      const auto at = affine_of<kPrologue, V>(prologue, r * p.channels + c);
      accumulate(pixels, sums,
                 [&](int64_t i, auto part, V(&sum)[1]) __attribute__((always_inline)) {
                   const V z = activation(load_part<V>(row + i, part), at);
                   sum[0] += kPrologue ? keep(z, part) : z;
                 });
    }
    A total[1];
    sums.totals(total);
    partial[item] = total[0];
  }
}

// partial[b,r,c] = sum_p dout[b,c,p] x[b,r,c,p]; a work item is (b, c).
template <typename T>
RF_KERNEL void pool_backward_nchw(const Problem& p, const T* dout, const T* x, int64_t begin,
                                  int64_t end, Acc<T>* partial) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t pixels = p.pixels();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.channels, c = item % p.channels;
    const T* g = dout + item * pixels;
    for (int64_t r = 0; r < p.radix; ++r) {
      const int64_t feature = (b * p.radix + r) * p.channels + c;
      const T* row = x + feature * pixels;
      Sums<V, 1, 4> sums{};
      accumulate(pixels, sums,
                 [&](int64_t i, auto part, V(&sum)[1]) __attribute__((always_inline)) {
                   sum[0] = fma(load_part<V>(g + i, part), load_part<V>(row + i, part), sum[0]);
                 });
      A total[1];
      sums.totals(total);
      partial[feature] = total[0];
    }
  }
}

// S1 to S4 of some elements, S3 and S4 still of x - mean. What the ReLU stops is taken out of both
// factors of a product, as 0 times infinity is no 0.
template <typename V>
RF_INLINE void add_prologue_sums(V g, V x, V mean, V preactivation, V (&sums)[kPrologueSums]) {
  const V stopped_g = relu_backward(g, preactivation);
  const V stopped_x = relu_backward(x - mean, preactivation);
  sums[0] += stopped_g;
  sums[1] += relu_backward(broadcast<V>(1), preactivation);
  sums[2] = fma(stopped_g, stopped_x, sums[2]);
  sums[3] += stopped_x;
}

// The same with a prologue, one work item at a time: partial[b,s,r,c].
template <typename T>
RF_KERNEL void pool_backward_prologue_nchw(const Problem& p, const Prologue<Acc<T>>& prologue,
                                           const T* dout, const T* x, int64_t begin, int64_t end,
                                           Acc<T>* partial) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t pixels = p.pixels(), features = p.features();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.channels, c = item % p.channels;
    const T* g = dout + item * pixels;
    for (int64_t r = 0; r < p.radix; ++r) {
      const int64_t feature = r * p.channels + c;
      const T* row = x + (b * features + feature) * pixels;
      const auto at = affine_of<true, V>(prologue, feature);
      const V mean = broadcast<V>(prologue.bn0.mean[feature]);
      Sums<V, kPrologueSums, 2> sums{};
      accumulate(pixels, sums,
                 [&](int64_t i, auto part, V(&sum)[kPrologueSums]) __attribute__((always_inline)) {
                   const V value = load_part<V>(row + i, part);
                   // Lanes outside of the row count as stopped.
                   add_prologue_sums(load_part<V>(g + i, part), value, mean,
                                     keep(preactivation(value, at), part), sum);
                 });
      A totals[kPrologueSums];
      sums.totals(totals);
      for (int k = 0; k < kPrologueSums; ++k) {
        partial[(b * kPrologueSums + k) * features + feature] = totals[k];
      }
    }
  }
}

// Pixels that are added to each other before they reach the running sum in memory.
constexpr int kPoolTile = 4;

// Call add<kPixels>(i) for the pixels [i, i + kPixels) of [0, count) in tiles, single ones last.
template <typename Add>
RF_INLINE void for_tiles(int64_t count, Add add) {
  int64_t i = 0;
  for (; i + kPoolTile <= count; i += kPoolTile) {
    add.template operator()<kPoolTile>(i);
  }
  for (; i < count; ++i) {
    add.template operator()<1>(i);
  }
}

// partial[b,j,c] = sum_{r, p in item j} z[b,p,r,c]; rows of pixels stream, sums stay in L1.
template <typename T, bool kPrologue>
RF_KERNEL void pool_nhwc(const Problem& p, const Prologue<Acc<T>>& prologue, const T* x,
                         int64_t begin, int64_t end, Acc<T>* partial) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t channels = p.channels, features = p.features();
  const bool fetches = prefetches(p, sizeof(T));
  for (int64_t item = begin; item < end; ++item) {
    const PixelItem pixels(p, item);
    const T* rows = x + pixels.first * features;
    A* sums = partial + item * channels;
    std::fill_n(sums, channels, A{});
    for_tiles(pixels.count, [&]<int kPixels>(int64_t first) __attribute__((always_inline)) {
      const T* tile = rows + first * features;
      auto ahead = ahead_of_tile(fetches, tile, kPixels * features);
      for_vectors<V>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        V sum = {};
        for (int64_t r = 0; r < p.radix; ++r) {
          ahead.template step<kPixels * kLanes<V>>();
          const int64_t f = r * channels + c;
          const auto at = affine_from<kPrologue, V>(prologue, f, lanes);
          unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
            sum += activation(load<V>(tile + i * features + f, lanes), at);
          });
        }
        store(sums + c, load<V>(sums + c, lanes) + sum, lanes);
      });
    });
  }
}

// partial[b,j,r,c] = sum_{p in item j} dout[b,p,c] x[b,p,r,c].
template <typename T>
RF_KERNEL void pool_backward_nhwc(const Problem& p, const T* dout, const T* x, int64_t begin,
                                  int64_t end, Acc<T>* partial) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t channels = p.channels, features = p.features();
  const bool fetches = prefetches(p, sizeof(T));
  for (int64_t item = begin; item < end; ++item) {
    const PixelItem pixels(p, item);
    A* sums = partial + item * features;
    std::fill_n(sums, features, A{});
    for_tiles(pixels.count, [&]<int kPixels>(int64_t first) __attribute__((always_inline)) {
      const T* g = dout + (pixels.first + first) * channels;
      auto ahead_g = ahead_of_tile(fetches, g, kPixels * channels);
      auto ahead =
          ahead_of_tile(fetches, x + (pixels.first + first) * features, kPixels * features);
      for (int64_t r = 0; r < p.radix; ++r) {
        const T* tile = x + (pixels.first + first) * features + r * channels;
        A* split_sums = sums + r * channels;
        for_vectors<V>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          if (r == 0) {
            ahead_g.template step<kPixels * kLanes<V>>();
          }
          ahead.template step<kPixels * kLanes<V>>();
          V sum = {};
          unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
            sum = fma(load<V>(g + i * channels + c, lanes), load<V>(tile + i * features + c, lanes),
                      sum);
          });
          store(split_sums + c, load<V>(split_sums + c, lanes) + sum, lanes);
        });
      }
    });
  }
}

// The same with a prologue: partial[b,j,s,r,c].
template <typename T>
RF_KERNEL void pool_backward_prologue_nhwc(const Problem& p, const Prologue<Acc<T>>& prologue,
                                           const T* dout, const T* x, int64_t begin, int64_t end,
                                           Acc<T>* partial) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t channels = p.channels, features = p.features();
  const A* mean = prologue.bn0.mean.data();
  const bool fetches = prefetches(p, sizeof(T));
  for (int64_t item = begin; item < end; ++item) {
    const PixelItem pixels(p, item);
    A* sums = partial + item * kPrologueSums * features;
    std::fill_n(sums, kPrologueSums * features, A{});
    for_tiles(pixels.count, [&]<int kPixels>(int64_t first) __attribute__((always_inline)) {
      const T* g = dout + (pixels.first + first) * channels;
      const T* tile = x + (pixels.first + first) * features;
      auto ahead_g = ahead_of_tile(fetches, g, kPixels * channels);
      auto ahead = ahead_of_tile(fetches, tile, kPixels * features);
      for (int64_t r = 0; r < p.radix; ++r) {
        for_vectors<V>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          if (r == 0) {
            ahead_g.template step<kPixels * kLanes<V>>();
          }
          ahead.template step<kPixels * kLanes<V>>();
          const int64_t f = r * channels + c;
          const auto at = affine_from<true, V>(prologue, f, lanes);
          const V mean_f = load<V>(mean + f, lanes);
          V sum[kPrologueSums] = {};
          unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
            const V value = load<V>(tile + i * features + f, lanes);
            add_prologue_sums(load<V>(g + i * channels + c, lanes), value, mean_f,
                              preactivation(value, at), sum);
          });
          unroll<kPrologueSums>([&](auto k) __attribute__((always_inline)) {
            A* to = sums + k * features + f;
            store(to, load<V>(to, lanes) + sum[k], lanes);
          });
        });
      }
    });
  }
}

// result[b,f] = scale * sum_j partial[b,j,f], j ascending, in float64, for elements [begin, end) of
// the result.
template <typename A>
void sum_partials(const A* partial, int64_t partials, int64_t features, double scale, int64_t begin,
                  int64_t end, A* result) {
  for_row_parts(begin, end, features, [&](int64_t b, int64_t from, int64_t to) {
    for (int64_t first = from; first < to; first += kFeatureBlock) {
      const int64_t last = std::min(first + kFeatureBlock, to);
      double sums[1][kFeatureBlock];
      sum_block(partials, first, last, sums,
                [&](int64_t j, int64_t f, int64_t at) __attribute__((always_inline)) {
                  sums[0][at] += partial[(b * partials + j) * features + f];
                });
      for (int64_t at = 0; at < last - first; ++at) {
        result[b * features + first + at] = static_cast<A>(sums[0][at] * scale);
      }
    }
  });
}

// partial = sum_{p, r} z over work items [begin, end), one thread. Reads R units of x.
template <typename T>
void pool_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                const T* x /* (B, R*C, H, W) */, int64_t begin, int64_t end,
                Acc<T>* partial /* (B, partials, C) */) {
  const bool nchw = is_nchw(problem);
  const auto run = prologue.active ? (nchw ? pool_nchw<T, true> : pool_nhwc<T, true>)
                                   : (nchw ? pool_nchw<T, false> : pool_nhwc<T, false>);
  run(problem, prologue, x, begin, end, partial);
}

// gap = 1/HW * sum of partial, for elements [begin, end) of gap.
template <typename A>
void pool_finish(const Problem& problem, const A* partial /* (B, partials, C) */, int64_t begin,
                 int64_t end, A* gap /* (B, C) */) {
  const double scale = 1.0 / static_cast<double>(problem.pixels());
  sum_partials(partial, partials_per_sample(problem), problem.channels, scale, begin, end, gap);
}

// The same for all, shared among the threads.
template <typename A>
void pool_finish(const Problem& problem, const A* partial, A* gap) {
  parallel_items(
      problem.batch * problem.channels,
      partials_per_sample(problem) * static_cast<int64_t>(sizeof(A)),
      [&](int64_t begin, int64_t end) { pool_finish<A>(problem, partial, begin, end, gap); });
}

// How many sums over pixels the backward takes of each (b, r, c).
template <typename A>
int64_t pool_backward_sums(const Prologue<A>& prologue) {
  return prologue.active ? kPrologueSums : 1;
}

// partial = sum_p dout x, or with a prologue the sums that prologue_sums.h names, over items
// [begin, end), one thread. Reads R + 1 units.
template <typename T>
void pool_backward_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                         const T* dout /* (B, C, H, W) */, const T* x /* (B, R*C, H, W) */,
                         int64_t begin, int64_t end, Acc<T>* partial /* (B, partials, S, R, C) */) {
  const bool nchw = is_nchw(problem);
  if (prologue.active) {
    const auto run = nchw ? pool_backward_prologue_nchw<T> : pool_backward_prologue_nhwc<T>;
    run(problem, prologue, dout, x, begin, end, partial);
  } else {
    const auto run = nchw ? pool_backward_nchw<T> : pool_backward_nhwc<T>;
    run(problem, dout, x, begin, end, partial);
  }
}

// sums = sum of partial; S3 and S4 with xhat from x - mean.
template <typename A>
void pool_backward_finish(const Problem& problem, const Prologue<A>& prologue,
                          const A* partial /* (B, partials, S, R, C) */,
                          A* sums /* (B, S, R, C) */) {
  const int64_t features = problem.features(), partials = partials_per_sample(problem);
  const int64_t count = pool_backward_sums(prologue);
  parallel_items(problem.batch * count * features, partials * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   sum_partials(partial, partials, count * features, 1.0, begin, end, sums);
                   if (!prologue.active) {
                     return;
                   }
                   const A* invstd = prologue.bn0.invstd.data();
                   for_row_parts(begin, end, features, [&](int64_t row, int64_t from, int64_t to) {
                     for (int64_t f = from; f < to && row % count >= 2; ++f) {
                       sums[row * features + f] *= invstd[f];
                     }
                   });
                 });
}

}  // namespace resnest_fused::cpu::RF_SET
