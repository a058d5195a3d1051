// Phase 1, pool: kernels.
#include "cpu/pool.h"

#include <algorithm>

#include "cpu/dtype.h"
#include "cpu/rows.h"
#include "cpu/work_items.h"

namespace resnest_fused::cpu {
namespace {

// partial[b,c] = sum_{r,p} z[b,r,c,p]; a work item is (b, c).
template <typename T, bool kPrologue>
struct PoolNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const Prologue<Acc<T>>* prologue, const T* x,
                            int64_t begin, int64_t end, Acc<T>* partial) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const int64_t pixels = p->pixels();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p->channels, c = item % p->channels;
      Sums<V, 1, 4> sums{};
      for (int64_t r = 0; r < p->radix; ++r) {
        const T* row = x + ((b * p->radix + r) * p->channels + c) * pixels;
        const auto at = affine_of<kPrologue, V>(*prologue, r * p->channels + c);
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
};

// partial[b,r,c] = sum_p dout[b,c,p] x[b,r,c,p]; a work item is (b, c).
template <typename T>
struct PoolBackwardNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* dout, const T* x, int64_t begin, int64_t end,
                            Acc<T>* partial) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const int64_t pixels = p->pixels();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p->channels, c = item % p->channels;
      const T* g = dout + item * pixels;
      for (int64_t r = 0; r < p->radix; ++r) {
        const int64_t feature = (b * p->radix + r) * p->channels + c;
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
};

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
struct PoolBackwardPrologueNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const Prologue<Acc<T>>* prologue, const T* dout,
                            const T* x, int64_t begin, int64_t end, Acc<T>* partial) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const int64_t pixels = p->pixels(), features = p->features();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / p->channels, c = item % p->channels;
      const T* g = dout + item * pixels;
      for (int64_t r = 0; r < p->radix; ++r) {
        const int64_t feature = r * p->channels + c;
        const T* row = x + (b * features + feature) * pixels;
        const auto at = affine_of<true, V>(*prologue, feature);
        const V mean = broadcast<V>(prologue->bn0.mean[feature]);
        Sums<V, kPrologueSums, 2> sums{};
        accumulate(pixels, sums,
                   [&](int64_t i, auto part, V(&sum)[kPrologueSums])
                       __attribute__((always_inline)) {
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
};

// Pixels that are added to each other before they reach the running sum in memory.
constexpr int kPixelTile = 4;

// Call add<kPixels>(i) for the pixels [i, i + kPixels) of [0, count) in tiles, single ones last.
template <typename Add>
RF_INLINE void for_tiles(int64_t count, Add add) {
  int64_t i = 0;
  for (; i + kPixelTile <= count; i += kPixelTile) {
    add.template operator()<kPixelTile>(i);
  }
  for (; i < count; ++i) {
    add.template operator()<1>(i);
  }
}

// partial[b,j,c] = sum_{r, p in item j} z[b,p,r,c]; rows of pixels stream, sums stay in L1.
template <typename T, bool kPrologue>
struct PoolNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const Prologue<Acc<T>>* prologue, const T* x,
                            int64_t begin, int64_t end, Acc<T>* partial) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const int64_t channels = p->channels, features = p->features();
    for (int64_t item = begin; item < end; ++item) {
      const PixelItem pixels(*p, item);
      const T* rows = x + pixels.first * features;
      A* sums = partial + item * channels;
      std::fill_n(sums, channels, A{});
      for_tiles(pixels.count, [&]<int kPixels>(int64_t first) __attribute__((always_inline)) {
        const T* tile = rows + first * features;
        prefetch(tile + kPixels * features, kPixels * features);
        for_vectors<V>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
          V sum = {};
          for (int64_t r = 0; r < p->radix; ++r) {
            const int64_t f = r * channels + c;
            const auto at = affine_from<kPrologue, V>(*prologue, f, lanes);
            unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
              sum += activation(load<V>(tile + i * features + f, lanes), at);
            });
          }
          store(sums + c, load<V>(sums + c, lanes) + sum, lanes);
        });
      });
    }
  }
};

// partial[b,j,r,c] = sum_{p in item j} dout[b,p,c] x[b,p,r,c].
template <typename T>
struct PoolBackwardNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* dout, const T* x, int64_t begin, int64_t end,
                            Acc<T>* partial) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const int64_t channels = p->channels, features = p->features();
    for (int64_t item = begin; item < end; ++item) {
      const PixelItem pixels(*p, item);
      A* sums = partial + item * features;
      std::fill_n(sums, features, A{});
      for_tiles(pixels.count, [&]<int kPixels>(int64_t first) __attribute__((always_inline)) {
        const T* g = dout + (pixels.first + first) * channels;
        for (int64_t r = 0; r < p->radix; ++r) {
          const T* tile = x + (pixels.first + first) * features + r * channels;
          A* split_sums = sums + r * channels;
          for_vectors<V>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            V sum = {};
            unroll<kPixels>([&](auto i) __attribute__((always_inline)) {
              sum = fma(load<V>(g + i * channels + c, lanes),
                        load<V>(tile + i * features + c, lanes), sum);
            });
            store(split_sums + c, load<V>(split_sums + c, lanes) + sum, lanes);
          });
        }
      });
    }
  }
};

// The same with a prologue: partial[b,j,s,r,c].
template <typename T>
struct PoolBackwardPrologueNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const Prologue<Acc<T>>* prologue, const T* dout,
                            const T* x, int64_t begin, int64_t end, Acc<T>* partial) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const int64_t channels = p->channels, features = p->features();
    const A* mean = prologue->bn0.mean.data();
    for (int64_t item = begin; item < end; ++item) {
      const PixelItem pixels(*p, item);
      A* sums = partial + item * kPrologueSums * features;
      std::fill_n(sums, kPrologueSums * features, A{});
      for_tiles(pixels.count, [&]<int kPixels>(int64_t first) __attribute__((always_inline)) {
        const T* g = dout + (pixels.first + first) * channels;
        const T* tile = x + (pixels.first + first) * features;
        prefetch(g + kPixels * channels, kPixels * channels);
        prefetch(tile + kPixels * features, kPixels * features);
        for (int64_t r = 0; r < p->radix; ++r) {
          for_vectors<V>(channels, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
            const int64_t f = r * channels + c;
            const auto at = affine_from<true, V>(*prologue, f, lanes);
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
};

// result[b,f] = scale * sum_j partial[b,j,f], j ascending, in float64.
template <typename A>
struct SumPartials {
  template <typename Isa>
  static RF_INLINE void run(const A* partial, int64_t partials, int64_t features, double scale,
                            int64_t begin, int64_t end, A* result) {
    for (int64_t b = begin; b < end; ++b) {
      const A* rows = partial + b * partials * features;
      for (int64_t f = 0; f < features; ++f) {
        double sum = rows[f];
        for (int64_t j = 1; j < partials; ++j) {
          sum += rows[j * features + f];
        }
        result[b * features + f] = static_cast<A>(sum * scale);
      }
    }
  }
};

// From sums of x - mean to those of xhat.
template <typename A>
struct ScaleByInvstd {
  template <typename Isa>
  static RF_INLINE void run(const A* invstd, int64_t features, int64_t begin, int64_t end,
                            A* sums /* (B, 4, R, C) */) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t k = 2; k < kPrologueSums; ++k) {
        A* row = sums + (b * kPrologueSums + k) * features;
        for (int64_t f = 0; f < features; ++f) {
          row[f] *= invstd[f];
        }
      }
    }
  }
};

template <typename T, bool kPrologue>
void pool_form(const Problem& problem, const Prologue<Acc<T>>& prologue, const T* x, int64_t begin,
               int64_t end, Acc<T>* partial) {
  if (is_nchw(problem)) {
    dispatch<PoolNchw<T, kPrologue>>(&problem, &prologue, x, begin, end, partial);
  } else {
    dispatch<PoolNhwc<T, kPrologue>>(&problem, &prologue, x, begin, end, partial);
  }
}

}  // namespace

template <typename T>
void pool_items(const Problem& problem, const Prologue<Acc<T>>& prologue, const T* x, int64_t begin,
                int64_t end, Acc<T>* partial) {
  if (prologue.active) {
    pool_form<T, true>(problem, prologue, x, begin, end, partial);
  } else {
    pool_form<T, false>(problem, prologue, x, begin, end, partial);
  }
}

template <typename A>
void pool_finish(const Problem& problem, const A* partial, int64_t begin, int64_t end, A* gap) {
  const double scale = 1.0 / static_cast<double>(problem.pixels());
  dispatch<SumPartials<A>>(partial, partials_per_sample(problem), problem.channels, scale, begin,
                           end, gap);
}

template <typename T>
void pool_backward_items(const Problem& problem, const Prologue<Acc<T>>& prologue, const T* dout,
                         const T* x, int64_t begin, int64_t end, Acc<T>* partial) {
  const bool nchw = is_nchw(problem);
  if (prologue.active && nchw) {
    dispatch<PoolBackwardPrologueNchw<T>>(&problem, &prologue, dout, x, begin, end, partial);
  } else if (prologue.active) {
    dispatch<PoolBackwardPrologueNhwc<T>>(&problem, &prologue, dout, x, begin, end, partial);
  } else if (nchw) {
    dispatch<PoolBackwardNchw<T>>(&problem, dout, x, begin, end, partial);
  } else {
    dispatch<PoolBackwardNhwc<T>>(&problem, dout, x, begin, end, partial);
  }
}

template <typename A>
void pool_backward_finish(const Problem& problem, const Prologue<A>& prologue, const A* partial,
                          int64_t begin, int64_t end, A* sums) {
  const int64_t features = problem.features();
  dispatch<SumPartials<A>>(partial, partials_per_sample(problem),
                           pool_backward_sums(prologue) * features, 1.0, begin, end, sums);
  if (prologue.active) {
    dispatch<ScaleByInvstd<A>>(prologue.bn0.invstd.data(), features, begin, end, sums);
  }
}

#define RF_INSTANTIATE(T)                                                                          \
  template void pool_items<T>(const Problem&, const Prologue<Acc<T>>&, const T*, int64_t, int64_t, \
                              Acc<T>*);                                                            \
  template void pool_backward_items<T>(const Problem&, const Prologue<Acc<T>>&, const T*,          \
                                       const T*, int64_t, int64_t, Acc<T>*);
RF_FOR_EACH_DTYPE(RF_INSTANTIATE)
#undef RF_INSTANTIATE

#define RF_INSTANTIATE(A)                                                                      \
  template void pool_finish<A>(const Problem&, const A*, int64_t, int64_t, A*);                \
  template void pool_backward_finish<A>(const Problem&, const Prologue<A>&, const A*, int64_t, \
                                        int64_t, A*);
RF_FOR_EACH_ACC(RF_INSTANTIATE)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cpu
