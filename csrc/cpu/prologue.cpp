// The prologue: kernels.
#include "cpu/prologue.h"

#include <algorithm>

#include "cpu/dtype.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"
#include "cpu/work_items.h"

namespace resnest_fused::cpu {
namespace {

// Mean and squares of each (b, r, c); a work item is (b, c). Sums are of distances from the pixel
// in the middle, as near to the mean as the pixels of a row are to each other.
template <typename T>
struct StatisticsNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* x, int64_t begin, int64_t end,
                            Acc<T>* mean /* (B, R, C) */, Acc<T>* squares /* (B, R, C) */) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const int64_t pixels = p->pixels();
    const auto count = static_cast<double>(pixels);
    // Descending: the pool then reads in ascending order, and finds the last rows still in cache.
    for (int64_t item = end; item-- > begin;) {
      const int64_t b = item / p->channels, c = item % p->channels;
      for (int64_t r = 0; r < p->radix; ++r) {
        const int64_t feature = (b * p->radix + r) * p->channels + c;
        const T* row = x + feature * pixels;
        const A middle = load_one<V>(row + pixels / 2);
        Sums<V, 2, 4> sums{};
        accumulate(pixels, sums,
                   [&](int64_t i, auto part, V(&sum)[2]) __attribute__((always_inline)) {
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
};

// Mean and squares of each (b, j, f); a work item is (b, j). A tile of pixels has its own in
// registers. They join those of the work item by the rule of Chan, Golub and LeVeque (1979).
template <typename T>
struct StatisticsNhwc {
  static constexpr int kTile = 8;

  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* x, int64_t begin, int64_t end,
                            Acc<T>* mean /* (B, J, R, C) */, Acc<T>* squares /* (B, J, R, C) */) {
    const int64_t features = p->features();
    for (int64_t item = end; item-- > begin;) {
      const PixelItem pixels(*p, item);
      const T* rows = x + pixels.first * features;
      Acc<T>* item_mean = mean + item * features;
      Acc<T>* item_squares = squares + item * features;
      std::fill_n(item_mean, features, Acc<T>{});
      std::fill_n(item_squares, features, Acc<T>{});
      int64_t i = 0;
      for (; i + kTile <= pixels.count; i += kTile) {
        prefetch(rows + (i + kTile) * features, kTile * features);
        join<Isa, kTile>(features, i, rows + i * features, item_mean, item_squares);
      }
      for (; i < pixels.count; ++i) {
        join<Isa, 1>(features, i, rows + i * features, item_mean, item_squares);
      }
    }
  }

  template <typename Isa, int kPixels>
  static RF_INLINE void join(int64_t features, int64_t before, const T* rows, Acc<T>* mean,
                             Acc<T>* squares) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const A total = static_cast<A>(before + kPixels);
    const V share = broadcast<V>(static_cast<A>(kPixels) / total);
    const V weight = share * static_cast<A>(before);
    for_vectors<V>(features, [&](int64_t f, auto lanes) __attribute__((always_inline)) {
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
};

template <typename A>
struct PrologueDattention {
  template <typename Isa>
  static RF_INLINE void run(const Prologue<A>* prologue, const A* sums, int64_t features,
                            int64_t begin, int64_t end, A* dattention) {
    const A* gamma = prologue->bn0.gamma.data();
    const A* beta = prologue->bn0.beta.data();
    for (int64_t b = begin; b < end; ++b) {
      const A* s1 = sums + b * kPrologueSums * features;
      const A* s3 = s1 + 2 * features;
      for (int64_t f = 0; f < features; ++f) {
        dattention[b * features + f] = gamma[f] * s3[f] + beta[f] * s1[f];
      }
    }
  }
};

template <typename A>
struct PrologueBackward {
  // For channels [begin, end) of every split.
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const A* sums, const A* attention, const A* dgap,
                            int64_t begin, int64_t end, A* dgamma, A* dbeta) {
    const int64_t channels = p->channels, features = p->features();
    const double scale = 1.0 / static_cast<double>(p->pixels());
    for (int64_t r = 0; r < p->radix; ++r) {
      for (int64_t first = begin; first < end; first += kFeatureBlock) {
        const int64_t last = std::min(first + kFeatureBlock, end);
        double totals[2][kFeatureBlock];
        sum_block(p->batch, first, last, totals,
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
      }
    }
  }
};

}  // namespace

template <typename A>
void Prologue<A>::set_scale_and_shift() {
  const size_t features = bn0.mean.size();
  scale.resize(features);
  shift.resize(features);
  for (size_t f = 0; f < features; ++f) {
    scale[f] = bn0.gamma[f] * bn0.invstd[f];
    // In float64: with a mean far from zero, this is where digits would be lost.
    shift[f] = static_cast<A>(bn0.beta[f] - static_cast<double>(bn0.mean[f]) * scale[f]);
  }
}

template <typename T>
void batch_statistics(const Problem& p, const T* x, Acc<T>* mean, Acc<T>* var) {
  using A = Acc<T>;
  const int64_t rows = p.batch * partials_per_sample(p);
  const auto partial = uninitialized<A>(2 * rows * p.features());
  A* const means = partial.get();
  A* const squares = means + rows * p.features();
  parallel_items(p.batch * items_per_sample(p), item_bytes(p, sizeof(T)),
                 [&](int64_t begin, int64_t end) {
                   if (is_nchw(p)) {
                     dispatch<StatisticsNchw<T>>(&p, x, begin, end, means, squares);
                   } else {
                     dispatch<StatisticsNhwc<T>>(&p, x, begin, end, means, squares);
                   }
                 });
  const int64_t full = is_nchw(p) ? p.pixels() : kPixelsPerItem;
  const int64_t last = p.pixels() - (partials_per_sample(p) - 1) * full;
  combine_statistics<A>({means, squares, rows, partials_per_sample(p), static_cast<double>(full),
                         static_cast<double>(last)},
                        p.features(), mean, var);
}

template <typename A>
void prologue_dattention(const Problem& p, const Prologue<A>& prologue, const A* sums,
                         A* dattention) {
  parallel_items(
      p.batch, 3 * p.features() * static_cast<int64_t>(sizeof(A)), [&](int64_t begin, int64_t end) {
        dispatch<PrologueDattention<A>>(&prologue, sums, p.features(), begin, end, dattention);
      });
}

template <typename A>
void prologue_backward(const Problem& p, const A* sums, const A* attention, const A* dgap,
                       A* dgamma, A* dbeta) {
  parallel_items(p.channels, 6 * p.radix * p.batch * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<PrologueBackward<A>>(&p, sums, attention, dgap, begin, end, dgamma,
                                                 dbeta);
                 });
}

template <typename A>
StatisticsGradient<A> statistics_gradient(const Prologue<A>& prologue, const A* mean_dz,
                                          const A* mean_dz_xhat) {
  const size_t features = prologue.scale.size();
  StatisticsGradient<A> gradient{std::vector<A>(features), std::vector<A>(features)};
  for (size_t f = 0; f < features; ++f) {
    gradient.offset[f] = prologue.scale[f] * mean_dz[f];
    gradient.slope[f] = prologue.scale[f] * prologue.bn0.invstd[f] * mean_dz_xhat[f];
  }
  return gradient;
}

#define RF_INSTANTIATE(T) \
  template void batch_statistics<T>(const Problem&, const T*, Acc<T>*, Acc<T>*);
RF_FOR_EACH_DTYPE(RF_INSTANTIATE)
#undef RF_INSTANTIATE

#define RF_INSTANTIATE(A)                                                                        \
  template struct Prologue<A>;                                                                   \
  template void prologue_dattention<A>(const Problem&, const Prologue<A>&, const A*, A*);        \
  template StatisticsGradient<A> statistics_gradient<A>(const Prologue<A>&, const A*, const A*); \
  template void prologue_backward<A>(const Problem&, const A*, const A*, const A*, A*, A*);
RF_FOR_EACH_ACC(RF_INSTANTIATE)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cpu
