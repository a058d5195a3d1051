// Phase 1, pool: kernels.
#include "cpu/pool.h"

#include <algorithm>

namespace resnest_fused::cpu {
namespace {

// Four independent sums hide the latency of the adder.
constexpr int kChains = 4;

// The elements [i, i + n) of a row of `count`, for load functions below: all lanes, or the rest.
struct Whole {};
struct Rest {
  int64_t n;
  bool behind_a_vector;  // at least a vector of the row lies before its end
};

template <typename T>
RF_INLINE Vec<Acc<T>> load_part(const T* p, Whole) {
  return load(p);
}

template <typename T>
RF_INLINE Vec<Acc<T>> load_part(const T* p, Rest rest) {
  return rest.behind_a_vector ? load_last(p + rest.n, rest.n) : load_first(p, rest.n);
}

// Over [0, count), sum = add(i, part, sum), which loads elements from i on with load_part.
template <typename A, typename Add>
RF_INLINE void accumulate(int64_t count, Vec<A> (&sums)[kChains], Add add) {
  constexpr int64_t kStep = kLanes<A>;
  int64_t i = 0;
  for (; i + kChains * kStep <= count; i += kChains * kStep) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = add(i + chain * kStep, Whole{}, sums[chain]);
    }
  }
  for (; i + kStep <= count; i += kStep) {
    sums[0] = add(i, Whole{}, sums[0]);
  }
  if (i < count) {
    sums[1] = add(i, Rest{count - i, count >= kStep}, sums[1]);
  }
}

template <typename A>
RF_INLINE A total(const Vec<A> (&sums)[kChains]) {
  return static_cast<A>(sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// partial[b,c] = sum_{r,p} x[b,r,c,p]; a unit is (b, c).
template <typename T>
struct PoolNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* x, int64_t begin, int64_t end,
                            Acc<T>* partial) {
    using A = Acc<T>;
    const int64_t pixels = p->pixels();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / p->channels, c = unit % p->channels;
      Vec<A> sums[kChains] = {};
      for (int64_t r = 0; r < p->radix; ++r) {
        const T* row = x + ((b * p->radix + r) * p->channels + c) * pixels;
        accumulate<A>(pixels, sums,
                      [&](int64_t i, auto part, Vec<A> sum) __attribute__((always_inline)) {
                        return sum + load_part(row + i, part);
                      });
      }
      partial[unit] = total<A>(sums);
    }
  }
};

// partial[b,r,c] = sum_p dout[b,c,p] x[b,r,c,p]; a unit is (b, c).
template <typename T>
struct PoolBackwardNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* dout, const T* x, int64_t begin, int64_t end,
                            Acc<T>* partial) {
    using A = Acc<T>;
    const int64_t pixels = p->pixels();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / p->channels, c = unit % p->channels;
      const T* g = dout + unit * pixels;
      for (int64_t r = 0; r < p->radix; ++r) {
        const int64_t feature = (b * p->radix + r) * p->channels + c;
        const T* row = x + feature * pixels;
        Vec<A> sums[kChains] = {};
        accumulate<A>(pixels, sums,
                      [&](int64_t i, auto part, Vec<A> sum) __attribute__((always_inline)) {
                        return fma<Isa, A>(load_part(g + i, part), load_part(row + i, part), sum);
                      });
        partial[feature] = total<A>(sums);
      }
    }
  }
};

// Pixels that are added to each other before they reach the running sum in memory.
constexpr int kPixelTile = 4;

// partial[b,j,c] = sum_{r, p in unit j} x[b,p,r,c]; rows of pixels stream, sums stay in L1.
template <typename T>
struct PoolNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* x, int64_t begin, int64_t end,
                            Acc<T>* partial) {
    const int64_t per_sample = pool_partials(*p);
    const int64_t channels = p->channels, features = p->features();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % per_sample * kPixelsPerUnit;
      const int64_t count = std::min(kPixelsPerUnit, p->pixels() - first);
      const T* rows = x + (unit / per_sample * p->pixels() + first) * features;
      Acc<T>* sums = partial + unit * channels;
      std::fill_n(sums, channels, Acc<T>{});
      int64_t i = 0;
      for (; i + kPixelTile <= count; i += kPixelTile) {
        add_pixels<kPixelTile>(*p, rows + i * features, sums);
      }
      for (; i < count; ++i) {
        add_pixels<1>(*p, rows + i * features, sums);
      }
    }
  }

  template <int kPixels>
  static RF_INLINE void add_pixels(const Problem& p, const T* rows, Acc<T>* sums) {
    using A = Acc<T>;
    const int64_t channels = p.channels, features = p.features();
    int64_t c = 0;
    for (; c + kLanes<A> <= channels; c += kLanes<A>) {
      Vec<A> sum = {};
      for (int64_t r = 0; r < p.radix; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i) {
          sum += load(rows + i * features + r * channels + c);
        }
      }
      store(sums + c, load(sums + c) + sum);
    }
    if (c < channels) {
      const int64_t n = channels - c;
      Vec<A> sum = {};
      for (int64_t r = 0; r < p.radix; ++r) {
        for (int i = 0; i < kPixels; ++i) {
          sum += load_first(rows + i * features + r * channels + c, n);
        }
      }
      store_first(sums + c, load_first(sums + c, n) + sum, n);
    }
  }
};

// partial[b,j,r,c] = sum_{p in unit j} dout[b,p,c] x[b,p,r,c].
template <typename T>
struct PoolBackwardNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* dout, const T* x, int64_t begin, int64_t end,
                            Acc<T>* partial) {
    const int64_t per_sample = pool_partials(*p);
    const int64_t features = p->features();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % per_sample * kPixelsPerUnit;
      const int64_t count = std::min(kPixelsPerUnit, p->pixels() - first);
      const int64_t pixel = unit / per_sample * p->pixels() + first;
      Acc<T>* sums = partial + unit * features;
      std::fill_n(sums, features, Acc<T>{});
      int64_t i = 0;
      for (; i + kPixelTile <= count; i += kPixelTile) {
        add_pixels<Isa, kPixelTile>(*p, dout + (pixel + i) * p->channels,
                                    x + (pixel + i) * features, sums);
      }
      for (; i < count; ++i) {
        add_pixels<Isa, 1>(*p, dout + (pixel + i) * p->channels, x + (pixel + i) * features, sums);
      }
    }
  }

  template <typename Isa, int kPixels>
  static RF_INLINE void add_pixels(const Problem& p, const T* g, const T* rows, Acc<T>* sums) {
    using A = Acc<T>;
    const int64_t channels = p.channels, features = p.features();
    for (int64_t r = 0; r < p.radix; ++r) {
      const T* split = rows + r * channels;
      Acc<T>* split_sums = sums + r * channels;
      int64_t c = 0;
      for (; c + kLanes<A> <= channels; c += kLanes<A>) {
        Vec<A> sum = {};
#pragma GCC unroll 4
        for (int i = 0; i < kPixels; ++i) {
          sum = fma<Isa, A>(load(g + i * channels + c), load(split + i * features + c), sum);
        }
        store(split_sums + c, load(split_sums + c) + sum);
      }
      if (c < channels) {
        const int64_t n = channels - c;
        Vec<A> sum = {};
        for (int i = 0; i < kPixels; ++i) {
          sum = fma<Isa, A>(load_first(g + i * channels + c, n),
                            load_first(split + i * features + c, n), sum);
        }
        store_first(split_sums + c, load_first(split_sums + c, n) + sum, n);
      }
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

}  // namespace

template <typename T>
void pool_units(const Problem& problem, const T* x, int64_t begin, int64_t end, Acc<T>* partial) {
  if (problem.layout == Layout::kNchw) {
    dispatch<PoolNchw<T>>(&problem, x, begin, end, partial);
  } else {
    dispatch<PoolNhwc<T>>(&problem, x, begin, end, partial);
  }
}

template <typename A>
void pool_finish(const Problem& problem, const A* partial, int64_t begin, int64_t end, A* gap) {
  const double scale = 1.0 / static_cast<double>(problem.pixels());
  dispatch<SumPartials<A>>(partial, pool_partials(problem), problem.channels, scale, begin, end,
                           gap);
}

template <typename T>
void pool_backward_units(const Problem& problem, const T* dout, const T* x, int64_t begin,
                         int64_t end, Acc<T>* partial) {
  if (problem.layout == Layout::kNchw) {
    dispatch<PoolBackwardNchw<T>>(&problem, dout, x, begin, end, partial);
  } else {
    dispatch<PoolBackwardNhwc<T>>(&problem, dout, x, begin, end, partial);
  }
}

template <typename A>
void pool_backward_finish(const Problem& problem, const A* partial, int64_t begin, int64_t end,
                          A* dattention) {
  dispatch<SumPartials<A>>(partial, pool_partials(problem), problem.features(), 1.0, begin, end,
                           dattention);
}

#define RF_INSTANTIATE(T)                                                                    \
  template void pool_units<T>(const Problem&, const T*, int64_t, int64_t, Acc<T>*);          \
  template void pool_backward_units<T>(const Problem&, const T*, const T*, int64_t, int64_t, \
                                       Acc<T>*);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(BFloat16)
RF_INSTANTIATE(Half)
#undef RF_INSTANTIATE

#define RF_INSTANTIATE(A)                                                       \
  template void pool_finish<A>(const Problem&, const A*, int64_t, int64_t, A*); \
  template void pool_backward_finish<A>(const Problem&, const A*, int64_t, int64_t, A*);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cpu
