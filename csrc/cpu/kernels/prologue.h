// The prologue z = relu(bn0(x)) or relu(x). The pool and recombine compute it wherever they load x,
// so that z is never stored.
//
// There bn0 is one multiply-add, x * scale + shift. All kernels evaluate it by `preactivation`, or
// forward and backward would disagree on which elements the ReLU lets through.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/elements.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/norm.h"
#include "cpu/kernels/rows.h"
#include "cpu/kernels/vector.h"
#include "cpu/scratch.h"
#include "cpu/work_items.h"
#include "formulas.h"
#include "problem.h"
#include "prologue_sums.h"

namespace resnest_fused::cpu::RF_SET {

template <typename A>
struct Prologue {
  bool active = false;   // else z = x, and all members are empty
  Norm<A> bn0;           // over R*C features; the identity for relu(x)
  std::vector<A> scale;  // (R*C) gamma * invstd
  std::vector<A> shift;  // (R*C) beta - mean * scale

  // From bn0, once its statistics are known.
  void set_scale_and_shift() {
    const size_t features = bn0.mean.size();
    scale.resize(features);
    shift.resize(features);
    for (size_t f = 0; f < features; ++f) {
      scale[f] = bn0.gamma[f] * bn0.invstd[f];
      // In float64: with a mean far from zero, this is where digits would be lost.
      shift[f] = static_cast<A>(bn0.beta[f] - static_cast<double>(bn0.mean[f]) * scale[f]);
    }
  }
};

// scale and shift of the features in some lanes; the plain form has none.
template <typename V>
struct Affine {
  V scale, shift;
};
struct NoAffine {};
template <bool kPrologue, typename V>
using AffineIf = std::conditional_t<kPrologue, Affine<V>, NoAffine>;

// Of one feature in all lanes, and of a feature in each lane.
template <bool kPrologue, typename V>
RF_INLINE AffineIf<kPrologue, V> affine_of(const Prologue<Element<V>>& prologue, int64_t feature) {
  if constexpr (kPrologue) {
    return {broadcast<V>(prologue.scale[static_cast<size_t>(feature)]),
            broadcast<V>(prologue.shift[static_cast<size_t>(feature)])};
  } else {
    return {};
  }
}
template <bool kPrologue, typename V, typename Which>
RF_INLINE AffineIf<kPrologue, V> affine_from(const Prologue<Element<V>>& prologue, int64_t feature,
                                             Which lanes) {
  if constexpr (kPrologue) {
    return {load<V>(prologue.scale.data() + feature, lanes),
            load<V>(prologue.shift.data() + feature, lanes)};
  } else {
    return {};
  }
}

// bn0(x)
template <typename V>
RF_INLINE V preactivation(V x, const Affine<V>& at) {
  return fma(x, at.scale, at.shift);
}

// z
template <typename V>
RF_INLINE V activation(V x, const NoAffine&) {
  return x;
}
// `relu` in one instruction; it passes NaN, too. A zero may keep its sign, which no sum shows.
template <typename V>
RF_INLINE V activation(V x, const Affine<V>& at) {
  return larger(V{}, preactivation(x, at));
}

// Mean and squares of each (b, r, c); a work item is (b, c). Sums are of distances from the pixel
// in the middle, as near to the mean as the pixels of a row are to each other.
template <typename T>
RF_KERNEL void statistics_nchw(const Problem& p, const T* x, int64_t begin, int64_t end,
                               Acc<T>* mean /* (B, R, C) */, Acc<T>* squares /* (B, R, C) */) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t pixels = p.pixels();
  const auto count = static_cast<double>(pixels);
  const bool fetches = prefetches(p, sizeof(T));
  // Descending: the pool then reads in ascending order, and finds the last rows still in cache.
  for (int64_t item = end; item-- > begin;) {
    const int64_t b = item / p.channels, c = item % p.channels;
    for (int64_t r = 0; r < p.radix; ++r) {
      const int64_t feature = (b * p.radix + r) * p.channels + c;
      const T* row = x + feature * pixels;
      const A middle = load_one<V>(row + pixels / 2);
      Sums<V, 2, 4> sums{};
      auto ahead = ahead_of_row(fetches, row, pixels);
      accumulate(pixels, sums,
                 [&](int64_t i, auto part, V(&sum)[2]) __attribute__((always_inline)) {
                   ahead.template step<kLanes<V>>();
                   const V apart = keep(load_part<V>(row + i, part) - middle, part);
                   sum[0] += apart;
                   sum[1] = fma(apart, apart, sum[1]);
                 });
      A totals[2];
      sums.totals(totals);
      const double mean_apart = totals[0] / count;
      const double from_mean = totals[1] - totals[0] * mean_apart;
      mean[feature] = static_cast<A>(middle + mean_apart);
      squares[feature] = static_cast<A>(from_mean < 0 ? 0 : from_mean);
    }
  }
}

constexpr int kStatisticsTile = 8;

// Let the mean and squares of kPixels pixels join those of the `before` pixels before them.
template <int kPixels, typename T>
RF_INLINE void join_statistics(bool fetches, int64_t features, int64_t before, const T* rows,
                               Acc<T>* mean, Acc<T>* squares) {
  using A = Acc<T>;
  using V = Vec<A>;
  const A total = static_cast<A>(before + kPixels);
  const V share = broadcast<V>(static_cast<A>(kPixels) / total);
  const V weight = share * static_cast<A>(before);
  auto ahead = ahead_of_tile(fetches, rows, kPixels * features);
  for_vectors<V>(features, [&](int64_t f, auto lanes) __attribute__((always_inline)) {
    ahead.template step<kPixels * kLanes<V>>();
    V values[kPixels], tile_mean = {}, tile_squares = {};
    unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
      values[i] = load<V>(rows + i * features + f, lanes);
      tile_mean += values[i];
    });
    tile_mean *= A(1) / A(kPixels);
    unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
      const V centered = values[i] - tile_mean;
      tile_squares = fma(centered, centered, tile_squares);
    });
    const V known = load<V>(mean + f, lanes);
    const V apart = tile_mean - known;
    store(mean + f, fma(apart, share, known), lanes);
    store(squares + f, fma(apart * apart, weight, load<V>(squares + f, lanes) + tile_squares),
          lanes);
  });
}

// Mean and squares of each (b, j, f); a work item is (b, j). A tile of pixels has its own in
// registers. They join those of the work item by the rule of Chan, Golub and LeVeque (1979).
template <typename T>
RF_KERNEL void statistics_nhwc(const Problem& p, const T* x, int64_t begin, int64_t end,
                               Acc<T>* mean /* (B, J, R, C) */,
                               Acc<T>* squares /* (B, J, R, C) */) {
  const int64_t features = p.features();
  const bool fetches = prefetches(p, sizeof(T));
  for (int64_t item = end; item-- > begin;) {
    const PixelItem pixels(p, item);
    const T* rows = x + pixels.first * features;
    Acc<T>* item_mean = mean + item * features;
    Acc<T>* item_squares = squares + item * features;
    std::fill_n(item_mean, features, Acc<T>{});
    std::fill_n(item_squares, features, Acc<T>{});
    int64_t i = 0;
    for (; i + kStatisticsTile <= pixels.count; i += kStatisticsTile) {
      join_statistics<kStatisticsTile>(fetches, features, i, rows + i * features, item_mean,
                                       item_squares);
    }
    for (; i < pixels.count; ++i) {
      join_statistics<1>(fetches, features, i, rows + i * features, item_mean, item_squares);
    }
  }
}

// Mean and biased variance of x by feature over batch and pixels. Reads R units. Each work item's
// mean and sum of squared deviations come first; they are then combined in float64.
template <typename T>
void batch_statistics(const Problem& p, const T* x /* (B, R*C, H, W) */, Acc<T>* mean /* (R*C) */,
                      Acc<T>* var /* (R*C) */) {
  using A = Acc<T>;
  const int64_t rows = p.batch * partials_per_sample(p);
  const auto partial = uninitialized<A>(2 * rows * p.features());
  A* const means = partial.get();
  A* const squares = means + rows * p.features();
  const auto statistics = is_nchw(p) ? statistics_nchw<T> : statistics_nhwc<T>;
  parallel_items(p.batch * items_per_sample(p), item_bytes(p, sizeof(T)),
                 [&](int64_t begin, int64_t end) { statistics(p, x, begin, end, means, squares); });
  const int64_t full = is_nchw(p) ? p.pixels() : pixels_per_item(p);
  const int64_t last = p.pixels() - (partials_per_sample(p) - 1) * full;
  combine_statistics<A>({means, squares, rows, partials_per_sample(p), static_cast<double>(full),
                         static_cast<double>(last)},
                        p.features(), mean, var);
}

// The gradients that the sums of the pool's backward give, as in prologue_sums.h.
template <typename A>
void prologue_dattention(const Problem& p, const Prologue<A>& prologue,
                         const A* sums /* (B, 4, R, C) */, A* dattention /* (B, R, C) */) {
  const A* gamma = prologue.bn0.gamma.data();
  const A* beta = prologue.bn0.beta.data();
  const int64_t features = p.features();
  parallel_items(p.batch * features, 3 * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   for_row_parts(begin, end, features, [&](int64_t b, int64_t first, int64_t last) {
                     const A* s1 = sums + b * kPrologueSums * features;
                     const A* s3 = s1 + 2 * features;
                     for (int64_t f = first; f < last; ++f) {
                       dattention[b * features + f] = gamma[f] * s3[f] + beta[f] * s1[f];
                     }
                   });
                 });
}

template <typename A>
void prologue_backward(const Problem& p, const A* sums /* (B, 4, R, C) */,
                       const A* attention /* (B, R, C) */, const A* dgap /* (B, C) */,
                       A* dgamma /* (R*C) */, A* dbeta /* (R*C) */) {
  const int64_t channels = p.channels, features = p.features();
  const double scale = 1.0 / static_cast<double>(p.pixels());
  // Of the features [first, last) of split r.
  const auto of_block = [&](int64_t r, int64_t first, int64_t last) {
    double totals[2][kFeatureBlock];
    sum_block(p.batch, first, last, totals,
              [&](int64_t b, int64_t c, int64_t at) __attribute__((always_inline)) {
                const A* s = sums + b * kPrologueSums * features + r * channels + c;
                const double a = attention[b * features + r * channels + c];
                const double d = dgap[b * channels + c] * scale;
                // Where the ReLU lets nothing through, not even a NaN in a or d counts.
                const bool any = s[features] != 0;
                totals[0][at] += any ? a * s[2 * features] + d * s[3 * features] : 0;
                totals[1][at] += any ? a * s[0] + d * s[features] : 0;
              });
    std::copy_n(totals[0], last - first, dgamma + r * channels + first);
    std::copy_n(totals[1], last - first, dbeta + r * channels + first);
  };
  parallel_items(features, 6 * p.batch * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   for_row_parts(begin, end, channels, [&](int64_t r, int64_t from, int64_t to) {
                     for (int64_t first = from; first < to; first += kFeatureBlock) {
                       of_block(r, first, std::min(first + kFeatureBlock, to));
                     }
                   });
                 });
}

// The part of dx that is lost as the batch statistics depend on x, per feature:
//   offset + slope * (x - mean) = scale * (mean_dz + xhat * mean_dz_xhat)
// as in `batch_norm_backward`; mean_dz = dbeta / N, mean_dz_xhat = dgamma / N, N = B*H*W. Both are
// empty if the statistics are frozen.
template <typename A>
struct StatisticsGradient {
  std::vector<A> offset;  // (R*C)
  std::vector<A> slope;   // (R*C)
};

template <typename A>
StatisticsGradient<A> statistics_gradient(const Prologue<A>& prologue, const A* mean_dz /* (R*C) */,
                                          const A* mean_dz_xhat /* (R*C) */) {
  const size_t features = prologue.scale.size();
  StatisticsGradient<A> gradient{std::vector<A>(features), std::vector<A>(features)};
  for (size_t f = 0; f < features; ++f) {
    gradient.offset[f] = prologue.scale[f] * mean_dz[f];
    gradient.slope[f] = prologue.scale[f] * prologue.bn0.invstd[f] * mean_dz_xhat[f];
  }
  return gradient;
}

}  // namespace resnest_fused::cpu::RF_SET
