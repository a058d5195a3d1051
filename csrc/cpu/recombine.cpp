// Phase 3, recombine: kernels.
#include "cpu/recombine.h"

#include <algorithm>

namespace resnest_fused::cpu {
namespace {

// Results at least this large pass the caches: they would not stay there until they are read.
// Measured on 2 cores of an Xeon with 48 MB of L3, shared with other machines.
constexpr int64_t kStreamBytes = 8 * 1024 * 1024;

template <typename T>
bool streams(const Problem& p, int64_t features) {
  return p.batch * features * p.pixels() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

// Write value(i) to out[i, ...] for all of [0, count), a vector at a time. The last vector of a row
// overlaps the one before it, which writes the same values again (as does the first, where
// streaming starts at an aligned element); rows shorter than a vector use value_first(i, n).
template <typename Isa, typename T, typename Value, typename ValueFirst>
RF_INLINE void write_row(bool streamed, int64_t count, T* out, Value value,
                         ValueFirst value_first) {
  constexpr int64_t kStep = kLanes<Acc<T>>;
  if (count < kStep) {
    store_first(out, value_first(0, count), count);
    return;
  }
  int64_t i = 0;
  if (streamed) {
    constexpr uintptr_t kBytes = kStep * sizeof(T);
    const uintptr_t past = reinterpret_cast<uintptr_t>(out) % kBytes;
    if (past != 0) {
      store(out, value(0));
      i = static_cast<int64_t>((kBytes - past) / sizeof(T));
    }
    for (; i + kStep <= count; i += kStep) {
      stream<Isa>(out + i, value(i));
    }
  } else {
    for (; i + kStep <= count; i += kStep) {
      store(out + i, value(i));
    }
  }
  if (i < count) {
    store(out + count - kStep, value(count - kStep));
  }
}

// out[b,c,p] = sum_r a[b,r,c] x[b,r,c,p]; kRadix 0: any radix.
template <typename T, int kRadix>
struct RecombineNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* x, const Acc<T>* attention, int64_t begin,
                            int64_t end, T* out) {
    using A = Acc<T>;
    const bool streamed = streams<T>(*p, p->channels);
    const int64_t pixels = p->pixels(), channels = p->channels;
    const int64_t radix = kRadix ? kRadix : p->radix;
    const int64_t split = channels * pixels;
    for (int64_t unit = end; unit-- > begin;) {
      const int64_t b = unit / channels, c = unit % channels;
      const T* row = x + (b * radix * channels + c) * pixels;
      const A* a = attention + b * radix * channels + c;
      write_row<Isa>(
          streamed, pixels, out + unit * pixels,
          [&](int64_t i) __attribute__((always_inline)) {
            Vec<A> sum = a[0] * load(row + i);
#pragma GCC unroll 4
            for (int64_t r = 1; r < radix; ++r) {
              sum = fma<Isa, A>(broadcast(a[r * channels]), load(row + r * split + i), sum);
            }
            return sum;
          },
          [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            Vec<A> sum = a[0] * load_first(row + i, n);
            for (int64_t r = 1; r < radix; ++r) {
              sum =
                  fma<Isa, A>(broadcast(a[r * channels]), load_first(row + r * split + i, n), sum);
            }
            return sum;
          });
    }
    stream_fence();
  }
};

// dx[b,r,c,p] = a[b,r,c] dout[b,c,p] + dgap[b,c] / HW.
template <typename T>
struct RecombineBackwardNchw {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* dout, const Acc<T>* attention,
                            const Acc<T>* dgap, int64_t begin, int64_t end, T* dx) {
    using A = Acc<T>;
    const bool streamed = streams<T>(*p, p->features());
    const int64_t pixels = p->pixels(), channels = p->channels, radix = p->radix;
    for (int64_t unit = end; unit-- > begin;) {
      const int64_t b = unit / channels, c = unit % channels;
      const T* g = dout + unit * pixels;
      const A shift = dgap[unit] / static_cast<A>(pixels);
      for (int64_t r = 0; r < radix; ++r) {
        const int64_t feature = (b * radix + r) * channels + c;
        const A a = attention[feature];
        write_row<Isa>(
            streamed, pixels, dx + feature * pixels,
            [&](int64_t i) __attribute__((always_inline)) { return a * load(g + i) + shift; },
            [&](int64_t i, int64_t n)
                __attribute__((always_inline)) { return a * load_first(g + i, n) + shift; });
      }
    }
    stream_fence();
  }
};

// out[b,p,c] = sum_r a[b,r,c] x[b,p,r,c]; the attention of a sample stays in L1.
template <typename T, int kRadix>
struct RecombineNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* x, const Acc<T>* attention, int64_t begin,
                            int64_t end, T* out) {
    using A = Acc<T>;
    const bool streamed = streams<T>(*p, p->channels);
    const int64_t channels = p->channels;
    const int64_t radix = kRadix ? kRadix : p->radix;
    const int64_t features = radix * channels;
    const int64_t per_sample = pool_partials(*p);
    for (int64_t unit = end; unit-- > begin;) {
      const int64_t b = unit / per_sample;
      const int64_t first = unit % per_sample * kPixelsPerUnit;
      const int64_t count = std::min(kPixelsPerUnit, p->pixels() - first);
      const A* a = attention + b * features;
      for (int64_t i = count; i-- > 0;) {
        const int64_t pixel = b * p->pixels() + first + i;
        const T* row = x + pixel * features;
        write_row<Isa>(
            streamed, channels, out + pixel * channels,
            [&](int64_t c) __attribute__((always_inline)) {
              Vec<A> sum = load(a + c) * load(row + c);
#pragma GCC unroll 4
              for (int64_t r = 1; r < radix; ++r) {
                sum = fma<Isa, A>(load(a + r * channels + c), load(row + r * channels + c), sum);
              }
              return sum;
            },
            [&](int64_t c, int64_t n) __attribute__((always_inline)) {
              Vec<A> sum = load_first(a + c, n) * load_first(row + c, n);
              for (int64_t r = 1; r < radix; ++r) {
                sum = fma<Isa, A>(load_first(a + r * channels + c, n),
                                  load_first(row + r * channels + c, n), sum);
              }
              return sum;
            });
      }
    }
    stream_fence();
  }
};

// dx[b,p,r,c] = a[b,r,c] dout[b,p,c] + dgap[b,c] / HW.
template <typename T>
struct RecombineBackwardNhwc {
  template <typename Isa>
  static RF_INLINE void run(const Problem* p, const T* dout, const Acc<T>* attention,
                            const Acc<T>* dgap, int64_t begin, int64_t end, T* dx) {
    using A = Acc<T>;
    const bool streamed = streams<T>(*p, p->features());
    const int64_t channels = p->channels, radix = p->radix, features = p->features();
    const int64_t per_sample = pool_partials(*p);
    const A scale = A(1) / static_cast<A>(p->pixels());
    for (int64_t unit = end; unit-- > begin;) {
      const int64_t b = unit / per_sample;
      const int64_t first = unit % per_sample * kPixelsPerUnit;
      const int64_t count = std::min(kPixelsPerUnit, p->pixels() - first);
      const A* shift = dgap + b * channels;
      for (int64_t i = count; i-- > 0;) {
        const int64_t pixel = b * p->pixels() + first + i;
        const T* g = dout + pixel * channels;
        for (int64_t r = 0; r < radix; ++r) {
          const A* a = attention + b * features + r * channels;
          write_row<Isa>(
              streamed, channels, dx + pixel * features + r * channels,
              [&](int64_t c) __attribute__((always_inline)) {
                return load(a + c) * load(g + c) + load(shift + c) * scale;
              },
              [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                return load_first(a + c, n) * load_first(g + c, n) +
                       load_first(shift + c, n) * scale;
              });
        }
      }
    }
    stream_fence();
  }
};

template <typename T, int kRadix>
void recombine_radix(const Problem& problem, const T* x, const Acc<T>* attention, int64_t begin,
                     int64_t end, T* out) {
  if (problem.layout == Layout::kNchw) {
    dispatch<RecombineNchw<T, kRadix>>(&problem, x, attention, begin, end, out);
  } else {
    dispatch<RecombineNhwc<T, kRadix>>(&problem, x, attention, begin, end, out);
  }
}

}  // namespace

template <typename T>
void recombine_units(const Problem& problem, const T* x, const Acc<T>* attention, int64_t begin,
                     int64_t end, T* out) {
  switch (problem.radix) {
    case 1:
      return recombine_radix<T, 1>(problem, x, attention, begin, end, out);
    case 2:
      return recombine_radix<T, 2>(problem, x, attention, begin, end, out);
    case 4:
      return recombine_radix<T, 4>(problem, x, attention, begin, end, out);
    default:
      return recombine_radix<T, 0>(problem, x, attention, begin, end, out);
  }
}

template <typename T>
void recombine_backward_units(const Problem& problem, const T* dout, const Acc<T>* attention,
                              const Acc<T>* dgap, int64_t begin, int64_t end, T* dx) {
  if (problem.layout == Layout::kNchw) {
    dispatch<RecombineBackwardNchw<T>>(&problem, dout, attention, dgap, begin, end, dx);
  } else {
    dispatch<RecombineBackwardNhwc<T>>(&problem, dout, attention, dgap, begin, end, dx);
  }
}

#define RF_INSTANTIATE(T)                                                                          \
  template void recombine_units<T>(const Problem&, const T*, const Acc<T>*, int64_t, int64_t, T*); \
  template void recombine_backward_units<T>(const Problem&, const T*, const Acc<T>*,               \
                                            const Acc<T>*, int64_t, int64_t, T*);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(BFloat16)
RF_INSTANTIATE(Half)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cpu
