// Phase 3, recombine: the second read of x. Forward: the weighted sum over the radix; backward: dx.
//
// Elements do not depend on each other. Work items are taken in descending order, to find what the
// pool read last still in cache.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/elements.h"
#include "cpu/kernels/prologue.h"
#include "cpu/scratch.h"
#include "cpu/work_items.h"
#include "problem.h"

namespace resnest_fused::cpu::RF_SET {

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
constexpr int kRecombineTile = 4;

// Call tile(first, count) for the pixels [0, count) of a work item in tiles: ascending, as the
// processor fetches ahead in that direction alone.
template <typename Tile>
RF_INLINE void for_pixel_tiles(int64_t count, Tile tile) {
  for (int64_t first = 0; first < count; first += kRecombineTile) {
    tile(first, std::min<int64_t>(kRecombineTile, count - first));
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
RF_KERNEL void recombine_nchw(const Problem& p, const Prologue<Acc<T>>& prologue, const T* x,
                              const Acc<T>* attention, int64_t begin, int64_t end, T* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const bool streamed = streams<T>(p, p.channels);
  const bool fetches = prefetches(p, sizeof(T));
  const int64_t pixels = p.pixels(), channels = p.channels;
  const int64_t radix = kRadix ? kRadix : p.radix;
  for (int64_t item = end; item-- > begin;) {
    const int64_t b = item / channels, c = item % channels;
    const T* row = x + (b * radix * channels + c) * pixels;
    const A* a = attention + b * radix * channels + c;
    const auto make = [&](int64_t r) __attribute__((always_inline)) {
      const int64_t f = r * channels;
      return Split<V, kPrologue>{broadcast<V>(a[f]), affine_of<kPrologue, V>(prologue, f + c)};
    };
    const auto held = hold<kRadix ? kRadix : 1>(0, make);
    // Of two splits, as the networks have them; of more the first and the last.
    auto ahead = ahead_of_row(fetches, row, pixels);
    auto ahead_last =
        ahead_of_row(fetches && radix > 1, row + (radix - 1) * channels * pixels, pixels);
    write_rows<V>(streamed, 1, pixels, out + item * pixels, 0,
                  [&](int64_t i, auto lanes, auto rows) __attribute__((always_inline)) {
                    ahead.template step<kLanes<V>>();
                    ahead_last.template step<kLanes<V>>();
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

// out[b,p,c] = sum_r a[b,r,c] z[b,p,r,c]; the attention of a sample stays in L1.
template <typename T, int kRadix, bool kPrologue>
RF_KERNEL void recombine_nhwc(const Problem& p, const Prologue<Acc<T>>& prologue, const T* x,
                              const Acc<T>* attention, int64_t begin, int64_t end, T* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  const bool streamed = streams<T>(p, p.channels);
  const bool fetches = prefetches(p, sizeof(T));
  const int64_t channels = p.channels;
  const int64_t radix = kRadix ? kRadix : p.radix;
  const int64_t features = radix * channels;
  for (int64_t item = end; item-- > begin;) {
    const PixelItem pixels(p, item);
    const A* a = attention + pixels.sample * features;
    for_pixel_tiles(pixels.count, [&](int64_t first, int64_t tile) __attribute__((always_inline)) {
      const int64_t pixel = pixels.first + first;
      const T* of_pixels = x + pixel * features;
      auto ahead = ahead_of_tile(fetches, of_pixels, kRecombineTile * features);
      write_rows<V>(streamed, tile, channels, out + pixel * channels, channels,
                    [&](int64_t c, auto lanes, auto rows) __attribute__((always_inline)) {
                      for (int64_t r = 0; r < radix; ++r) {
                        ahead.template step<kRecombineTile * kLanes<V>>();
                      }
                      const auto make = [&](int64_t r) __attribute__((always_inline)) {
                        const int64_t f = r * channels + c;
                        return Split<V, kPrologue>{load<V>(a + f, lanes),
                                                   affine_from<kPrologue, V>(prologue, f, lanes)};
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
    const V dz = fma(g, p, q);
    if constexpr (kForm == Form::kPlain) {
      return dz;
    } else {
      const V x = x_of();
      const V passed = relu_backward(dz, preactivation(x, at));
      if constexpr (kForm == Form::kFrozen) {
        return passed;
      } else {
        return passed - fma(x - statistics.mean, statistics.slope, statistics.offset);
      }
    }
  }
};

// dx[b,r,c,p]
template <typename T, Form kForm>
RF_KERNEL void recombine_backward_nchw(const Problem& p, const Prologue<Acc<T>>& prologue,
                                       const StatisticsGradient<Acc<T>>& statistics, const T* dout,
                                       const T* x, const Acc<T>* attention, const Acc<T>* dgap,
                                       int64_t begin, int64_t end, T* dx) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr bool kPrologue = kForm != Form::kPlain;
  const bool streamed = streams<T>(p, p.features());
  const bool fetches = prefetches(p, sizeof(T));
  const int64_t pixels = p.pixels(), channels = p.channels, radix = p.radix;
  for (int64_t item = end; item-- > begin;) {
    const int64_t b = item / channels, c = item % channels;
    const T* g = dout + item * pixels;
    const A mean_dgap = dgap[item] / static_cast<A>(pixels);
    for (int64_t r = 0; r < radix; ++r) {
      const int64_t f = r * channels + c;
      const int64_t feature = b * radix * channels + f;
      const T* row = x + feature * pixels;
      const A scale = kPrologue ? prologue.scale[f] : A(1);
      SplitBackward<V, kForm> split;
      split.p = broadcast<V>(scale * attention[feature]);
      split.q = broadcast<V>(scale * mean_dgap);
      split.at = affine_of<kPrologue, V>(prologue, f);
      if constexpr (kForm == Form::kBatch) {
        split.statistics = {broadcast<V>(prologue.bn0.mean[f]), broadcast<V>(statistics.slope[f]),
                            broadcast<V>(statistics.offset[f])};
      }
      auto ahead = ahead_of_row(fetches, row, pixels);
      auto ahead_g = ahead_of_row(fetches && r == 0, g, pixels);
      write_rows<V>(streamed, 1, pixels, dx + feature * pixels, 0,
                    [&](int64_t i, auto lanes, auto rows) __attribute__((always_inline)) {
                      ahead.template step<kLanes<V>>();
                      ahead_g.template step<kLanes<V>>();
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

// dx[b,p,r,c]; the p and q of a sample stay in L1.
template <typename T, Form kForm>
RF_KERNEL void recombine_backward_nhwc(const Problem& p, const Prologue<Acc<T>>& prologue,
                                       const StatisticsGradient<Acc<T>>& statistics, const T* dout,
                                       const T* x, const Acc<T>* attention, const Acc<T>* dgap,
                                       int64_t begin, int64_t end, T* dx) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr bool kPrologue = kForm != Form::kPlain;
  const bool streamed = streams<T>(p, p.features());
  const bool fetches = prefetches(p, sizeof(T));
  const int64_t channels = p.channels, radix = p.radix, features = p.features();
  const A per_pixel = A(1) / static_cast<A>(p.pixels());
  const auto scratch = uninitialized<A>(2 * features);
  A* const p_of = scratch.get();
  A* const q_of = scratch.get() + features;
  int64_t sample = -1;
  for (int64_t item = end; item-- > begin;) {
    const PixelItem pixels(p, item);
    if (sample != pixels.sample) {
      sample = pixels.sample;
      for (int64_t r = 0; r < radix; ++r) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t f = r * channels + c;
          const A scale = kPrologue ? prologue.scale[f] : A(1);
          p_of[f] = scale * attention[sample * features + f];
          q_of[f] = scale * (dgap[sample * channels + c] * per_pixel);
        }
      }
    }
    for_pixel_tiles(pixels.count, [&](int64_t first, int64_t tile) __attribute__((always_inline)) {
      const int64_t pixel = pixels.first + first;
      const T* g = dout + pixel * channels;
      const T* of_pixels = x + pixel * features;
      auto ahead_g = ahead_of_tile(fetches, g, kRecombineTile * channels);
      auto ahead = ahead_of_tile(fetches, of_pixels, kRecombineTile * features);
      for (int64_t r = 0; r < radix; ++r) {
        write_rows<V>(streamed, tile, channels, dx + pixel * features + r * channels, features,
                      [&](int64_t c, auto lanes, auto rows) __attribute__((always_inline)) {
                        if (r == 0) {
                          ahead_g.template step<kRecombineTile * kLanes<V>>();
                        }
                        ahead.template step<kRecombineTile * kLanes<V>>();
                        const int64_t f = r * channels + c;
                        SplitBackward<V, kForm> split;
                        split.p = load<V>(p_of + f, lanes);
                        split.q = load<V>(q_of + f, lanes);
                        split.at = affine_from<kPrologue, V>(prologue, f, lanes);
                        if constexpr (kForm == Form::kBatch) {
                          split.statistics = {load<V>(prologue.bn0.mean.data() + f, lanes),
                                              load<V>(statistics.slope.data() + f, lanes),
                                              load<V>(statistics.offset.data() + f, lanes)};
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

// out = sum_r attention_r z_r over work items [begin, end). Reads R units, writes 1.
template <typename T>
void recombine_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                     const T* x /* (B, R*C, H, W) */, const Acc<T>* attention /* (B, R, C) */,
                     int64_t begin, int64_t end, T* out /* (B, C, H, W) */) {
  const auto with_radix = [&]<int kRadix>() {
    const bool nchw = is_nchw(problem);
    return prologue.active
               ? (nchw ? recombine_nchw<T, kRadix, true> : recombine_nhwc<T, kRadix, true>)
               : (nchw ? recombine_nchw<T, kRadix, false> : recombine_nhwc<T, kRadix, false>);
  };
  const auto run = problem.radix == 2 ? with_radix.template operator()<2>()
                                      : with_radix.template operator()<0>();
  run(problem, prologue, x, attention, begin, end, out);
}

// dz_r = attention_r dout + dgap / HW over work items [begin, end), and
//   dx = dz                                        plain form: reads 1 unit, writes R
//   dx = m scale dz - offset - slope (x - mean)    with a prologue, m = [bn0(x) > 0]: reads R more
template <typename T>
void recombine_backward_items(const Problem& problem, const Prologue<Acc<T>>& prologue,
                              const StatisticsGradient<Acc<T>>& statistics,
                              const T* dout /* (B, C, H, W) */, const T* x /* (B, R*C, H, W) */,
                              const Acc<T>* attention /* (B, R, C) */,
                              const Acc<T>* dgap /* (B, C) */, int64_t begin, int64_t end,
                              T* dx /* (B, R*C, H, W) */) {
  const auto with_form = [&]<Form kForm>() {
    return is_nchw(problem) ? recombine_backward_nchw<T, kForm> : recombine_backward_nhwc<T, kForm>;
  };
  const auto run = !prologue.active            ? with_form.template operator()<Form::kPlain>()
                   : statistics.offset.empty() ? with_form.template operator()<Form::kFrozen>()
                                               : with_form.template operator()<Form::kBatch>();
  run(problem, prologue, statistics, dout, x, attention, dgap, begin, end, dx);
}

}  // namespace resnest_fused::cpu::RF_SET
