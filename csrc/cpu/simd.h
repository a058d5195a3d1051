// Vectors of 64 bytes of accumulators, their loads and stores for every dtype, and the choice of
// the instruction set at run time.
//
// A kernel is a struct with a static `run<Isa>(arguments...)` marked RF_INLINE; `dispatch<Kernel>`
// calls it inside a function that is compiled for the best instruction set of this machine. All it
// calls must be RF_INLINE too, so that it is compiled for that set. The vectors are GCC and Clang
// vector extensions: without AVX the compiler splits them, so every set gives the same lanes and
// the same order of summation.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "formulas.h"

#define RF_INLINE inline __attribute__((always_inline))

namespace resnest_fused::cpu {

// float16 and bfloat16 as stored.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a dtype is accumulated in.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
inline constexpr int kLanes = 64 / static_cast<int>(sizeof(A));

template <typename A>
struct VecOf {
  typedef A type __attribute__((vector_size(64)));
};
template <typename A>
using Vec = typename VecOf<A>::type;

typedef uint16_t U16Lanes __attribute__((vector_size(32)));
typedef uint32_t U32Lanes __attribute__((vector_size(64)));

// The same bits as another type; std::bit_cast need not be inlined.
template <typename To, typename From>
RF_INLINE To reinterpret(From value) {
  return __builtin_bit_cast(To, value);
}

// ---- widening and rounding of the 16-bit dtypes, sixteen at a time ----

RF_INLINE U32Lanes select(U32Lanes mask, U32Lanes yes, U32Lanes no) {
  return (mask & yes) | (~mask & no);
}

RF_INLINE Vec<float> widen(U16Lanes bits, BFloat16) {
  return reinterpret<Vec<float>>(__builtin_convertvector(bits, U32Lanes) << 16);
}

RF_INLINE U16Lanes narrow(Vec<float> value, BFloat16) {
  const U32Lanes bits = reinterpret<U32Lanes>(value);
  const U32Lanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const U32Lanes is_nan = reinterpret<U32Lanes>(value != value);
  return __builtin_convertvector(select(is_nan, (bits >> 16) | 0x40, rounded), U16Lanes);
}

RF_INLINE Vec<float> widen(U16Lanes half, Half) {
  const U32Lanes bits = __builtin_convertvector(half, U32Lanes);
  const U32Lanes magnitude = (bits & 0x7fff) << 13;
  // The exponent's bias differs by 112; multiplying also normalises subnormal numbers.
  const Vec<float> scaled = reinterpret<Vec<float>>(magnitude) * 0x1p112f;
  const U32Lanes is_special = reinterpret<U32Lanes>(magnitude >= (0x7c00u << 13));
  const U32Lanes finite = reinterpret<U32Lanes>(scaled);
  return reinterpret<Vec<float>>(select(is_special, finite | 0x7f800000, finite) |
                                 ((bits & 0x8000) << 16));
}

RF_INLINE U16Lanes narrow(Vec<float> value, Half) {
  const U32Lanes bits = reinterpret<U32Lanes>(value);
  const U32Lanes magnitude = bits & 0x7fffffff;
  // Normal numbers: change the exponent's bias and round to nearest, ties to even, in integers;
  // a carry moves to the next exponent, and from the largest one to infinity, as it should.
  const U32Lanes normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5 lets the float adder align and round to the subnormal's last bit.
  const U32Lanes subnormal =
      reinterpret<U32Lanes>(reinterpret<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  U32Lanes result = select(reinterpret<U32Lanes>(magnitude < (113u << 23)), subnormal, normal);
  const U32Lanes overflows = reinterpret<U32Lanes>(magnitude >= 0x477ff000u);  // 65520
  result = select(overflows, U32Lanes{} + 0x7c00, result);
  const U32Lanes is_nan = reinterpret<U32Lanes>(magnitude > 0x7f800000u);
  result = select(is_nan, U32Lanes{} + 0x7e00, result);
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000), U16Lanes);
}

// ---- loads and stores: kLanes<Acc<T>> elements, any alignment ----

template <typename T>
RF_INLINE Vec<Acc<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    Vec<T> value;
    std::memcpy(&value, p, sizeof value);
    return value;
  } else {
    U16Lanes bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits, T{});
  }
}

// One element, widened.
template <typename T>
RF_INLINE Acc<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return *p;
  } else {
    return widen(U16Lanes{} + p->bits, T{})[0];
  }
}

template <typename T>
RF_INLINE void store(T* p, Vec<Acc<T>> value) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    std::memcpy(p, &value, sizeof value);
  } else {
    const U16Lanes bits = narrow(value, T{});
    std::memcpy(p, &bits, sizeof bits);
  }
}

// The first `count` lanes, zeros in the others.
template <typename T>
RF_INLINE Vec<Acc<T>> load_first(const T* p, int64_t count) {
  T lanes[kLanes<Acc<T>>] = {};
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = p[i];
  }
  return load(lanes);
}

template <typename T>
RF_INLINE void store_first(T* p, Vec<Acc<T>> value, int64_t count) {
  T lanes[kLanes<Acc<T>>];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) {
    p[i] = lanes[i];
  }
}

// Ones in the last `count` lanes, zeros in the others.
template <typename A>
using Bits = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;

template <typename A>
RF_INLINE Vec<Bits<A>> last_lanes(int64_t count) {
  static constexpr auto kMask = [] {
    std::array<Bits<A>, 2 * kLanes<A>> mask{};
    std::fill(mask.begin() + kLanes<A>, mask.end(), ~Bits<A>{0});
    return mask;
  }();
  Vec<Bits<A>> mask;
  std::memcpy(&mask, kMask.data() + count, sizeof mask);
  return mask;
}

template <typename A>
RF_INLINE Vec<A> masked(Vec<A> value, Vec<Bits<A>> mask) {
  return reinterpret<Vec<A>>(reinterpret<Vec<Bits<A>>>(value) & mask);
}

// Which lanes of a vector at some place of a row the row has: all of them, or the first n. Code for
// both is written once, with the kind as a template argument.
struct Whole {};
struct First {
  int64_t n;
};

template <typename T>
RF_INLINE Vec<Acc<T>> load(const T* p, Whole) {
  return load(p);
}
template <typename T>
RF_INLINE Vec<Acc<T>> load(const T* p, First lanes) {
  return load_first(p, lanes.n);
}
template <typename T>
RF_INLINE void store(T* p, Vec<Acc<T>> value, Whole) {
  store(p, value);
}
template <typename T>
RF_INLINE void store(T* p, Vec<Acc<T>> value, First lanes) {
  store_first(p, value, lanes.n);
}

// Call f(i, lanes) for each vector of a row of `count` elements, i being where it starts.
template <typename A, typename F>
RF_INLINE void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    f(i, Whole{});
  }
  if (i < count) {
    f(i, First{count - i});
  }
}

// All lanes where the row has them, else the first `count`.
template <typename T>
RF_INLINE Vec<Acc<T>> load_lanes(const T* p, int64_t count) {
  return count == kLanes<Acc<T>> ? load(p) : load_first(p, count);
}

template <typename T>
RF_INLINE void store_lanes(T* p, Vec<Acc<T>> value, int64_t count) {
  if (count == kLanes<Acc<T>>) {
    store(p, value);
  } else {
    store_first(p, value, count);
  }
}

template <typename A>
RF_INLINE Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}

// Sum of all lanes in float64: halving the vector, a fixed order.
template <typename A>
RF_INLINE double sum_lanes(Vec<A> v) {
  if constexpr (sizeof(A) == sizeof(float)) {
    typedef float Low __attribute__((vector_size(32)));
    struct Halves {
      Low low, high;
    };
    const auto halves = reinterpret<Halves>(v);
    return sum_lanes<double>(__builtin_convertvector(halves.low, Vec<double>) +
                             __builtin_convertvector(halves.high, Vec<double>));
  } else {
    typedef double Half __attribute__((vector_size(32)));
    typedef double Quarter __attribute__((vector_size(16)));
    struct Halves {
      Half low, high;
    };
    struct Quarters {
      Quarter low, high;
    };
    const auto halves = reinterpret<Halves>(v);
    const auto quarters = reinterpret<Quarters>(halves.low + halves.high);
    const Quarter pair = quarters.low + quarters.high;
    return pair[0] + pair[1];
  }
}

// exp(x) for x <= 0; 0 below the smallest normal number, NaN for NaN.
RF_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  typedef int32_t I32Lanes __attribute__((vector_size(64)));
  const Vec<float> clamped = x < -87.0f ? broadcast(-87.0f) : x;
  // x = n ln2 + r with |r| <= ln2/2; adding 1.5 * 2^23 rounds to an integer held in the low bits.
  const Vec<float> shifted = clamped * 1.44269504f + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  // Minimax polynomial of degree 5 for (exp(r) - 1 - r) / r^2 (Cephes expf), error below 1 ulp.
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec<float> y = (p * r) * r + r + 1.0f;
  const I32Lanes exponent = (reinterpret<I32Lanes>(shifted) - 0x4b400000 + 127) << 23;
  const Vec<float> result = y * reinterpret<Vec<float>>(exponent);
  return x < -87.0f ? Vec<float>{} : result;
}

RF_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    x[i] = std::exp(x[i]);
  }
  return x;
}

// ---- instruction sets ----

struct Avx512 {};
struct Avx2 {};
struct Baseline {};

// The parts of a vector that fit in this set's registers, to hand to instructions by name. Through
// memcpy, as the compiler takes vectors larger than a register apart best that way.
template <typename Isa>
inline constexpr int kPartBytes = std::is_same_v<Isa, Avx512> ? 64
                                  : std::is_same_v<Isa, Avx2> ? 32
                                                              : 16;

template <typename Isa, typename A>
struct PartOf {
  typedef A type __attribute__((vector_size(kPartBytes<Isa>)));
};
template <typename Isa, typename A>
using Part = typename PartOf<Isa, A>::type;

// f(part of a, part of b, ...) joined.
template <typename Isa, typename A, typename F, typename... Vs>
RF_INLINE Vec<A> by_part(F f, const Vs&... vectors) {
  Vec<A> result;
#pragma GCC unroll 4
  for (int offset = 0; offset < 64; offset += kPartBytes<Isa>) {
    const auto part_of = [&](const Vec<A>& vector) __attribute__((always_inline)) {
      Part<Isa, A> part;
      std::memcpy(&part, reinterpret_cast<const char*>(&vector) + offset, sizeof part);
      return part;
    };
    const Part<Isa, A> part = f(part_of(vectors)...);
    std::memcpy(reinterpret_cast<char*>(&result) + offset, &part, sizeof part);
  }
  return result;
}

// a * b + c, rounded once where the instruction set has it. Asked for by name, and the build turns
// contraction off, as the compiler contracts some copies of an expression and not others: an
// element would depend on the tile or the batch that it is in. The result takes c's register.
template <typename Isa, typename A>
RF_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<Isa, Avx512>) {
    if constexpr (sizeof(A) == sizeof(float)) {
      asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "vm"(b));
    } else {
      asm("vfmadd231pd %2, %1, %0" : "+v"(c) : "v"(a), "vm"(b));
    }
    return c;
  } else if constexpr (std::is_same_v<Isa, Avx2>) {
    return by_part<Isa, A>(
        [](auto x, auto y, auto z) __attribute__((always_inline)) {
          if constexpr (sizeof(A) == sizeof(float)) {
            asm("vfmadd231ps %2, %1, %0" : "+x"(z) : "x"(x), "xm"(y));
          } else {
            asm("vfmadd231pd %2, %1, %0" : "+x"(z) : "x"(x), "xm"(y));
          }
          return z;
        },
        a, b, c);
  }
#endif
  return a * b + c;
}

// The same, where b and c are wanted again: the result takes a's register.
template <typename Isa, typename A>
RF_INLINE Vec<A> scale_shift(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<Isa, Avx512>) {
    if constexpr (sizeof(A) == sizeof(float)) {
      asm("vfmadd213ps %2, %1, %0" : "+v"(a) : "v"(b), "vm"(c));
    } else {
      asm("vfmadd213pd %2, %1, %0" : "+v"(a) : "v"(b), "vm"(c));
    }
    return a;
  }
#endif
  return fma<Isa, A>(a, b, c);
}

// The gradient of the ReLU, or with both arguments the same the ReLU: value where preactivation > 0
// or is NaN, else 0; see relu and relu_backward of formulas.h. By instructions of this set's size,
// as the compiler compares larger vectors element by element.
template <typename Isa, typename A>
RF_INLINE Vec<A> passed_by_relu(Vec<A> value, Vec<A> preactivation) {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<Isa, Avx512>) {
    return by_part<Isa, A>(
        [](auto v, auto n) __attribute__((always_inline)) {
          auto mask = n;
          if constexpr (std::is_same_v<Isa, Avx2>) {
            if constexpr (sizeof(A) == sizeof(float)) {
              asm("vcmpnleps %1, %0, %0" : "+x"(mask) : "x"(decltype(n){}));
            } else {
              asm("vcmpnlepd %1, %0, %0" : "+x"(mask) : "x"(decltype(n){}));
            }
          } else if constexpr (sizeof(A) == sizeof(float)) {
            asm("cmpnleps %1, %0" : "+x"(mask) : "x"(decltype(n){}));
          } else {
            asm("cmpnlepd %1, %0" : "+x"(mask) : "x"(decltype(n){}));
          }
          typedef Bits<A> Mask __attribute__((vector_size(sizeof(n))));
          return reinterpret<decltype(n)>(reinterpret<Mask>(v) & reinterpret<Mask>(mask));
        },
        value, preactivation);
  }
#endif
  return relu_backward(value, preactivation);
}

// Store a whole vector past the caches, which saves reading the line first; p is aligned to the
// bytes stored. Inline assembly, as an intrinsic would have to be inlined from a function that is
// already compiled for its instruction set. Call stream_fence() before other threads may read.
template <typename Isa, typename T>
RF_INLINE void stream(T* p, Vec<Acc<T>> value) {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<Isa, Baseline>) {
    typedef float Line __attribute__((vector_size(64)));
    typedef float HalfLine __attribute__((vector_size(32)));
    struct Halves {
      HalfLine low, high;
    };
    if constexpr (sizeof(T) < sizeof(Acc<T>)) {
      const auto half = reinterpret<HalfLine>(narrow(value, T{}));
      asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<HalfLine*>(p)) : "v"(half));
    } else if constexpr (std::is_same_v<Isa, Avx512>) {
      asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<Line*>(p)) : "v"(reinterpret<Line>(value)));
    } else {
      const auto halves = reinterpret<Halves>(value);
      asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<HalfLine*>(p)) : "x"(halves.low));
      asm("vmovntps %1, %0" : "=m"(*(reinterpret_cast<HalfLine*>(p) + 1)) : "x"(halves.high));
    }
    return;
  }
#endif
  store(p, value);
}

RF_INLINE void stream_fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

#if defined(__x86_64__)

#define RF_AVX512_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define RF_AVX2_FEATURES "avx2,fma"

template <typename Kernel, typename... Args>
__attribute__((target(RF_AVX512_FEATURES), noinline)) void run_avx512(Args... args) {
  Kernel::template run<Avx512>(args...);
}

template <typename Kernel, typename... Args>
__attribute__((target(RF_AVX2_FEATURES), noinline)) void run_avx2(Args... args) {
  Kernel::template run<Avx2>(args...);
}

#endif

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this machine, or the lower one that RESNEST_FUSED_CPU_CAPABILITY
// (baseline, avx2, avx512) names.
Capability capability();
const char* capability_name(Capability capability);

template <typename Kernel, typename... Args>
RF_INLINE void dispatch(Args... args) {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::kAvx512:
      return run_avx512<Kernel>(args...);
    case Capability::kAvx2:
      return run_avx2<Kernel>(args...);
    case Capability::kBaseline:
      break;
  }
#endif
  Kernel::template run<Baseline>(args...);
}

}  // namespace resnest_fused::cpu
