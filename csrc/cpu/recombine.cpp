// Phase 3, recombine: kernels.
#include "cpu/recombine.h"

#include <utility>

#include "cpu/dtype.h"
#include "cpu/scratch.h"
#include "cpu/work_items.h"

namespace resnest_fused::cpu {
namespace {

// Results at least this large pass the caches: they would not stay there until they are read.
// Measured on 2 cores of an Xeon with 48 MB of L3, shared with other machines.
constexpr int64_t kStreamBytes = 8 * 1024 * 1024;

template <typename T>
bool streams(const Problem& p, int64_t features) {
  return p.batch * features * p.pixels() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

// Write `row_count` rows of `count` elements, `stride` apart, a vector at a time. column(i, lanes,
// rows) prepares what the rows share at element i and calls rows(value), value(row) being a row's
// vector. The last vector of a row overlaps the one before it and writes the same values again. So
// does the first, if streaming starts at an aligned element.
template <typename V, typename T, typename Column>
RF_INLINE void write_rows(bool streamed, int64_t row_count, int64_t count, T* out, int64_t stride,
                          Column column) {
  constexpr int64_t kStep = kLanes<V>;
  const auto write = [&](int64_t i, auto lanes, auto put) __attribute__((always_inline)) {
    column(i, lanes, [&](auto value) __attribute__((always_inline)) {
      for (int64_t row = 0; row < row_count; ++row) {
        put(out + row * stride + i, value(row));
      }
    });
  };
  const auto put_whole = [](T* to, V value) __attribute__((always_inline)) { store(to, value); };
  if (count < kStep) {
    write(0, First{count},
          [&](T* to, V value) __attribute__((always_inline)) { store(to, value, First{count}); });
    return;
  }
  constexpr uintptr_t kBytes = kStep * sizeof(T);
  const bool streams_rows =
      streamed && (row_count == 1 || static_cast<uintptr_t>(stride) * sizeof(T) % kBytes == 0);
  const uintptr_t past = reinterpret_cast<uintptr_t>(out) % kBytes;
  const bool unaligned = streams_rows && past != 0;
  const int64_t begin = unaligned ? static_cast<int64_t>((kBytes - past) / sizeof(T)) : 0;
  const int64_t end = count - (count - begin) % kStep;
  for (int edge = unaligned ? 0 : 1; edge < (end < count ? 2 : 1); ++edge) {
    write(edge == 0 ? 0 : count - kStep, Whole{}, put_whole);
  }
  if (streams_rows) {
    for (int64_t i = begin; i < end; i += kStep) {
      write(i, Whole{}, [](T* to, V value) __attribute__((always_inline)) { stream(to, value); });
    }
  } else {
    for (int64_t i = begin; i < end; i += kStep) {
      write(i, Whole{}, put_whole);
    }
  }
}

// Pixels that share the loads of what belongs to their features, in NHWC.
constexpr int kPixelTile = 4;

// Call tile(first, count) for the pixels [0, count) in tiles, descending.
template <typename Tile>
RF_INLINE void for_tiles_descending(int64_t count, Tile tile) {
  for (int64_t end = count; end > 0;) {
    const int64_t pixels = end % kPixelTile != 0 ? end % kPixelTile : kPixelTile;
    end -= pixels;
    tile(end, pixels);
  }
}

// What the weighted sum needs of a split at some lanes.
template <typename V, bool kPrologue>
struct Split {
  V attention;
  AffineIf<kPrologue, V> at;
};

// kCount splits as members, which the compiler keeps in registers as it would not an array's.
template <typename S, int kCount>
struct Held {
  S first;
  Held<S, kCount - 1> rest;
};
template <typename S>
struct Held<S, 1> {
  S first;
};
template <int kCount, typename Make>
RF_INLINE auto hold(int64_t r, Make make) {
  using S = decltype(make(r));
  if constexpr (kCount == 1) {
    return Held<S, 1>{make(r)};
  } else {
    return Held<S, kCount>{make(r), hold<kCount - 1>(r + 1, make)};
  }
}

// sum + sum_r a_r z_r over held splits, r being the first of them.
template <typename V, typename S, int kCount, typename X>
RF_INLINE V add_held(const Held<S, kCount>& splits, int64_t r, V sum, X x_of) {
  sum = fma(splits.first.attention, activation(x_of(r), splits.first.at), sum);
  if constexpr (kCount == 1) {
    return sum;
  } else {
    return add_held(splits.rest, r + 1, sum, x_of);
  }
}

// sum_r a_r z_r; x_of(r) loads a split's elements. With kRadix 0, for any radix, make(r) describes
// a split; else `held` has them all.
template <typename V, int kRadix, typename H, typename Make, typename X>
RF_INLINE V weighted_sum(int64_t radix, const H& held, Make make, X x_of) {
  if constexpr (kRadix != 0) {
    return add_held(held, 0, V{}, x_of);
  } else {
    V sum = {};
    for (int64_t r = 0; r < radix; ++r) {
      const auto split = make(r);
      sum = fma(split.attention, activation(x_of(r), split.at), sum);
    }
    return sum;
  }
}

// out[b,c,p] = sum_r a[b,r,c] z[b,r,c,p]; kRadix 0: any radix.
template <typename T, int kRadix, bool kPrologue>
struct RecombineNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const Prologue<Acc<T>>* prologue, const T* x,
                            const Acc<T>* attention, int64_t begin, int64_t end, T* out) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const bool streamed = streams<T>(*p, p->channels);
    const int64_t pixels = p->pixels(), channels = p->channels;
    const int64_t radix = kRadix ? kRadix : p->radix;
    for (int64_t item = end; item-- > begin;) {
      const int64_t b = item / channels, c = item % channels;
      const T* row = x + (b * radix * channels + c) * pixels;
      const A* a = attention + b * radix * channels + c;
      const auto make = [&](int64_t r) __attribute__((always_inline)) {
        const int64_t f = r * channels;
        return Split<V, kPrologue>{broadcast<V>(a[f]), affine_of<kPrologue, V>(*prologue, f + c)};
      };
      const auto held = hold<kRadix ? kRadix : 1>(0, make);
      write_rows<V>(streamed, 1, pixels, out + item * pixels, 0,
                    [&](int64_t i, auto lanes, auto rows) __attribute__((always_inline)) {
                      const auto x_of = [&](int64_t r) __attribute__((always_inline)) {
                        return load<V>(row + r * channels * pixels + i, lanes);
                      };
                      rows([&](int64_t) __attribute__((always_inline)) {
                        return weighted_sum<V, kRadix>(radix, held, make, x_of);
                      });
                    });
    }
    stream_fence();
  }
};

// out[b,p,c] = sum_r a[b,r,c] z[b,p,r,c]; the attention of a sample stays in L1.
template <typename T, int kRadix, bool kPrologue>
struct RecombineNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const Prologue<Acc<T>>* prologue, const T* x,
                            const Acc<T>* attention, int64_t begin, int64_t end, T* out) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    const bool streamed = streams<T>(*p, p->channels);
    const int64_t channels = p->channels;
    const int64_t radix = kRadix ? kRadix : p->radix;
    const int64_t features = radix * channels;
    for (int64_t item = end; item-- > begin;) {
      const PixelItem pixels(*p, item);
      const A* a = attention + pixels.sample * features;
      for_tiles_descending(
          pixels.count, [&](int64_t first, int64_t tile) __attribute__((always_inline)) {
            const int64_t pixel = pixels.first + first;
            const T* of_pixels = x + pixel * features;
            prefetch(of_pixels - kPixelTile * features, kPixelTile * features);
            write_rows<V>(streamed, tile, channels, out + pixel * channels, channels,
                          [&](int64_t c, auto lanes, auto rows) __attribute__((always_inline)) {
                            const auto make = [&](int64_t r) __attribute__((always_inline)) {
                              const int64_t f = r * channels + c;
                              return Split<V, kPrologue>{
                                  load<V>(a + f, lanes),
                                  affine_from<kPrologue, V>(*prologue, f, lanes)};
                            };
                            const auto held = hold<kRadix ? kRadix : 1>(0, make);
                            rows([&](int64_t i) __attribute__((always_inline)) {
                              const auto x_of = [&](int64_t r) __attribute__((always_inline)) {
                                return load<V>(of_pixels + i * features + r * channels + c, lanes);
                              };
                              return weighted_sum<V, kRadix>(radix, held, make, x_of);
                            });
                          });
          });
    }
    stream_fence();
  }
};

// The backward: dz = p g + q, with p and q from attention and dgap; then the ReLU's part, and that
// of batch statistics.
enum class Form { kPlain, kFrozen, kBatch };

template <typename V>
struct StatisticsAt {
  V mean, slope, offset;
};
struct NoStatistics {};

template <typename V, Form kForm>
struct SplitBackward {
  V p, q;
  AffineIf<kForm != Form::kPlain, V> at;
  std::conditional_t<kForm == Form::kBatch, StatisticsAt<V>, NoStatistics> statistics;

  template <typename X>
  RF_INLINE V dx(V g, X x_of) const {
    const V dz = scale_shift(g, p, q);
    if constexpr (kForm == Form::kPlain) {
      return dz;
    } else {
      const V x = x_of();
      const V passed = relu_backward(dz, preactivation(x, at));
      if constexpr (kForm == Form::kFrozen) {
        return passed;
      } else {
        return passed - scale_shift(x - statistics.mean, statistics.slope, statistics.offset);
      }
    }
  }
};

// dx[b,r,c,p]
template <typename T, Form kForm>
struct RecombineBackwardNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const Prologue<Acc<T>>* prologue,
                            const StatisticsGradient<Acc<T>>* statistics, const T* dout, const T* x,
                            const Acc<T>* attention, const Acc<T>* dgap, int64_t begin, int64_t end,
                            T* dx) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    constexpr bool kPrologue = kForm != Form::kPlain;
    const bool streamed = streams<T>(*p, p->features());
    const int64_t pixels = p->pixels(), channels = p->channels, radix = p->radix;
    for (int64_t item = end; item-- > begin;) {
      const int64_t b = item / channels, c = item % channels;
      const T* g = dout + item * pixels;
      const A mean_dgap = dgap[item] / static_cast<A>(pixels);
      for (int64_t r = 0; r < radix; ++r) {
        const int64_t f = r * channels + c;
        const int64_t feature = b * radix * channels + f;
        const T* row = x + feature * pixels;
        const A scale = kPrologue ? prologue->scale[f] : A(1);
        SplitBackward<V, kForm> split;
        split.p = broadcast<V>(scale * attention[feature]);
        split.q = broadcast<V>(scale * mean_dgap);
        split.at = affine_of<kPrologue, V>(*prologue, f);
        if constexpr (kForm == Form::kBatch) {
          split.statistics = {broadcast<V>(prologue->bn0.mean[f]),
                              broadcast<V>(statistics->slope[f]),
                              broadcast<V>(statistics->offset[f])};
        }
        write_rows<V>(streamed, 1, pixels, dx + feature * pixels, 0,
                      [&](int64_t i, auto lanes, auto rows) __attribute__((always_inline)) {
                        const auto x_of = [&]() __attribute__((always_inline)) {
                          return load<V>(row + i, lanes);
                        };
                        rows([&](int64_t) __attribute__((always_inline)) {
                          return split.dx(load<V>(g + i, lanes), x_of);
                        });
                      });
      }
    }
    stream_fence();
  }
};

// dx[b,p,r,c]; the p and q of a sample stay in L1.
template <typename T, Form kForm>
struct RecombineBackwardNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const Prologue<Acc<T>>* prologue,
                            const StatisticsGradient<Acc<T>>* statistics, const T* dout, const T* x,
                            const Acc<T>* attention, const Acc<T>* dgap, int64_t begin, int64_t end,
                            Acc<T>* scratch /* (2, R, C) */, T* dx) {
    using A = Acc<T>;
    using V = Vec<Isa, A>;
    constexpr bool kPrologue = kForm != Form::kPlain;
    const bool streamed = streams<T>(*p, p->features());
    const int64_t channels = p->channels, radix = p->radix, features = p->features();
    const A per_pixel = A(1) / static_cast<A>(p->pixels());
    A* const p_of = scratch;
    A* const q_of = scratch + features;
    int64_t sample = -1;
    for (int64_t item = end; item-- > begin;) {
      const PixelItem pixels(*p, item);
      if (sample != pixels.sample) {
        sample = pixels.sample;
        for (int64_t r = 0; r < radix; ++r) {
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t f = r * channels + c;
            const A scale = kPrologue ? prologue->scale[f] : A(1);
            p_of[f] = scale * attention[sample * features + f];
            q_of[f] = scale * (dgap[sample * channels + c] * per_pixel);
          }
        }
      }
      for_tiles_descending(pixels.count, [&](int64_t first,
                                             int64_t tile) __attribute__((always_inline)) {
        const int64_t pixel = pixels.first + first;
        const T* g = dout + pixel * channels;
        const T* of_pixels = x + pixel * features;
        prefetch(g - kPixelTile * channels, kPixelTile * channels);
        prefetch(of_pixels - kPixelTile * features, kPixelTile * features);
        for (int64_t r = 0; r < radix; ++r) {
          write_rows<V>(streamed, tile, channels, dx + pixel * features + r * channels, features,
                        [&](int64_t c, auto lanes, auto rows) __attribute__((always_inline)) {
                          const int64_t f = r * channels + c;
                          SplitBackward<V, kForm> split;
                          split.p = load<V>(p_of + f, lanes);
                          split.q = load<V>(q_of + f, lanes);
                          split.at = affine_from<kPrologue, V>(*prologue, f, lanes);
                          if constexpr (kForm == Form::kBatch) {
                            split.statistics = {load<V>(prologue->bn0.mean.data() + f, lanes),
                                                load<V>(statistics->slope.data() + f, lanes),
                                                load<V>(statistics->offset.data() + f, lanes)};
                          }
                          rows([&](int64_t i) __attribute__((always_inline)) {
                            const auto x_of = [&]() __attribute__((always_inline)) {
                              return load<V>(of_pixels + i * features + f, lanes);
                            };
                            return split.dx(load<V>(g + i * channels + c, lanes), x_of);
                          });
                        });
        }
      });
    }
    stream_fence();
  }
};

template <typename T, int kRadix, bool kPrologue>
void recombine_form(const Problem& problem, const Prologue<Acc<T>>& prologue, const T* x,
                    const Acc<T>* attention, int64_t begin, int64_t end, T* out) {
  if (is_nchw(problem)) {
    dispatch<RecombineNchw<T, kRadix, kPrologue>>(&problem, &prologue, x, attention, begin, end,
                                                  out);
  } else {
    dispatch<RecombineNhwc<T, kRadix, kPrologue>>(&problem, &prologue, x, attention, begin, end,
                                                  out);
  }
}

template <typename T, int kRadix>
void recombine_radix(const Problem& problem, const Prologue<Acc<T>>& prologue, const T* x,
                     const Acc<T>* attention, int64_t begin, int64_t end, T* out) {
  if (prologue.active) {
    recombine_form<T, kRadix, true>(problem, prologue, x, attention, begin, end, out);
  } else {
    recombine_form<T, kRadix, false>(problem, prologue, x, attention, begin, end, out);
  }
}

template <typename T, Form kForm>
void recombine_backward_form(const Problem& problem, const Prologue<Acc<T>>& prologue,
                             const StatisticsGradient<Acc<T>>& statistics, const T* dout,
                             const T* x, const Acc<T>* attention, const Acc<T>* dgap, int64_t begin,
                             int64_t end, T* dx) {
  if (is_nchw(problem)) {
    dispatch<RecombineBackwardNchw<T, kForm>>(&problem, &prologue, &statistics, dout, x, attention,
                                              dgap, begin, end, dx);
  } else {
    const auto scratch = uninitialized<Acc<T>>(2 * problem.features());
    dispatch<RecombineBackwardNhwc<T, kForm>>(&problem, &prologue, &statistics, dout, x, attention,
                                              dgap, begin, end, scratch.get(), dx);
  }
}

}  // namespace

template <typename T>
void recombine_items(const Problem& problem, const Prologue<Acc<T>>& prologue, const T* x,
                     const Acc<T>* attention, int64_t begin, int64_t end, T* out) {
  switch (problem.radix) {
    case 2:
      return recombine_radix<T, 2>(problem, prologue, x, attention, begin, end, out);
    default:
      return recombine_radix<T, 0>(problem, prologue, x, attention, begin, end, out);
  }
}

template <typename T>
void recombine_backward_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                              const StatisticsGradient<Acc<T>>& statistics, const T* dout,
                              const T* x, const Acc<T>* attention, const Acc<T>* dgap,
                              int64_t begin, int64_t end, T* dx) {
  const auto run = !prologue.active            ? recombine_backward_form<T, Form::kPlain>
                   : statistics.offset.empty() ? recombine_backward_form<T, Form::kFrozen>
                                               : recombine_backward_form<T, Form::kBatch>;
  run(problem, prologue, statistics, dout, x, attention, dgap, begin, end, dx);
}

#define RF_INSTANTIATE(T)                                                                          \
  template void recombine_items<T>(const Problem&, const Prologue<Acc<T>>&, const T*,              \
                                   const Acc<T>*, int64_t, int64_t, T*);                           \
  template void recombine_backward_items<T>(const Problem&, const Prologue<Acc<T>>&,               \
                                            const StatisticsGradient<Acc<T>>&, const T*, const T*, \
                                            const Acc<T>*, const Acc<T>*, int64_t, int64_t, T*);
RF_FOR_EACH_DTYPE(RF_INSTANTIATE)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cpu
