// Runs one function of the CPU's vectors on data from the standard input and writes the results to
// the standard output. It is compiled for one instruction set, of which RF_SET is the name and
// RF_REGISTER_BYTES the size of a register.
//
// It needs no torch, so it also runs where there is none. test_vectors.py says what must come out.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cpu/kernels/memory.h"
#include "cpu/kernels/rows.h"
#include "formulas.h"

namespace resnest_fused::cpu::RF_SET {
namespace {

using Bytes = std::vector<char>;

template <typename T>
std::vector<T> elements(const Bytes& bytes) {
  std::vector<T> result(bytes.size() / sizeof(T));
  std::memcpy(result.data(), bytes.data(), result.size() * sizeof(T));
  return result;
}

// To(from), a vector at a time; both are as long, in multiples of the widest vector.
template <typename To, typename From>
struct Convert {
  static void run(const From* from, int64_t count, To* to) {
    using V = Vec<float>;
    for (int64_t i = 0; i < count; i += kLanes<V>) {
      store(to + i, load<V>(from + i));
    }
  }
};

template <typename To, typename From>
Bytes convert(const Bytes& input) {
  const auto from = elements<From>(input);
  Bytes result(from.size() * sizeof(To));
  Convert<To, From>::run(from.data(), static_cast<int64_t>(from.size()),
                         reinterpret_cast<To*>(result.data()));
  return result;
}

// The first element alone, from each place.
template <typename T>
struct LoadOne {
  static void run(const T* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = load_one<Vec<float>>(from + i);
    }
  }
};

template <typename T>
Bytes load_ones(const Bytes& input) {
  const auto from = elements<T>(input);
  Bytes result(from.size() * sizeof(float));
  LoadOne<T>::run(from.data(), static_cast<int64_t>(from.size()),
                  reinterpret_cast<float*>(result.data()));
  return result;
}

// f(a, b, c) for three rows of `count` elements.
template <typename A, typename F>
struct Map3 {
  static void run(const A* rows, int64_t count, A* to) {
    using V = Vec<A>;
    for (int64_t i = 0; i < count; i += kLanes<V>) {
      store(to + i,
            F::of(load<V>(rows + i), load<V>(rows + count + i), load<V>(rows + 2 * count + i)));
    }
  }
};

template <typename A, typename F>
Bytes map3(const Bytes& input) {
  const auto rows = elements<A>(input);
  Bytes result(input.size() / 3);
  Map3<A, F>::run(rows.data(), static_cast<int64_t>(rows.size() / 3),
                  reinterpret_cast<A*>(result.data()));
  return result;
}

#define RF_FUNCTION(Name, expression)      \
  struct Name {                            \
    template <typename V>                  \
    static RF_INLINE V of(V a, V b, V c) { \
      (void)b, (void)c;                    \
      return expression;                   \
    }                                      \
  };
RF_FUNCTION(Fma, fma(a, b, c))
RF_FUNCTION(Larger, larger(a, b))
RF_FUNCTION(Relu, relu(a))
RF_FUNCTION(ReluBackward, relu_backward(a, b))
RF_FUNCTION(Exp, exp_nonpositive(a))
RF_FUNCTION(Broadcast, broadcast<V>(a[0]))

// For each eight vectors: sum_lanes of each, and sum_lanes_of 1, 2, 4 and 8 of them.
template <typename A>
struct SumLanes {
  static void run(const A* from, int64_t count, std::vector<double>* to) {
    using V = Vec<A>;
    for (int64_t i = 0; i + 8 * kLanes<V> <= count; i += 8 * kLanes<V>) {
      for (int k = 0; k < 8; ++k) {
        to->push_back(sum_lanes(load<V>(from + i + k * kLanes<V>)));
      }
      several<V, 1>(from + i, to);
      several<V, 2>(from + i, to);
      several<V, 4>(from + i, to);
      several<V, 8>(from + i, to);
    }
  }

  template <typename V, int kCount>
  static RF_INLINE void several(const A* from, std::vector<double>* to) {
    V sums[kCount];
    A totals[kCount];
    for (int k = 0; k < kCount; ++k) {
      sums[k] = load<V>(from + k * kLanes<V>);
    }
    sum_lanes_of<kCount>(sums, totals);
    to->insert(to->end(), totals, totals + kCount);
  }
};

template <typename A>
Bytes sum_lanes_bytes(const Bytes& input) {
  const auto from = elements<A>(input);
  std::vector<double> sums;
  SumLanes<A>::run(from.data(), static_cast<int64_t>(from.size()), &sums);
  const char* begin = reinterpret_cast<const char*>(sums.data());
  return {begin, begin + sums.size() * sizeof(double)};
}

// Of two vectors' elements, for each count from 1 to all lanes, five rows of a vector: the first
// elements loaded; the second vector's as the rest of a row; what `keep` leaves of the first vector
// behind a vector, and at the row's start; and the first elements stored over the second vector.
// Then the first vector streamed.
template <typename T>
struct Parts {
  static void run(const T* from, std::vector<T>* to) {
    using V = Vec<Acc<T>>;
    const V whole = load<V>(from);
    for (int64_t n = 1; n <= kLanes<V>; ++n) {
      append(load<V>(from, First{n}), to);
      append(load_part<V>(from + kLanes<V>, Rest{n, true}), to);
      append(keep(whole, Rest{n, true}), to);
      append(keep(whole, Rest{n, false}), to);
      T stored[kLanes<V>];
      std::memcpy(stored, from + kLanes<V>, sizeof stored);
      store(stored, whole, First{n});
      to->insert(to->end(), stored, stored + kLanes<V>);
    }
    alignas(V) T streamed[kLanes<V>];
    stream(streamed, whole);
    stream_fence();
    to->insert(to->end(), streamed, streamed + kLanes<V>);
  }

  template <typename V>
  static RF_INLINE void append(V value, std::vector<T>* to) {
    T stored[kLanes<V>];
    store(stored, value);
    to->insert(to->end(), stored, stored + kLanes<V>);
  }
};

template <typename T>
Bytes parts(const Bytes& input) {
  const auto from = elements<T>(input);
  std::vector<T> rows;
  Parts<T>::run(from.data(), &rows);
  const char* begin = reinterpret_cast<const char*>(rows.data());
  return {begin, begin + rows.size() * sizeof(T)};
}

struct Width {
  static void run(int64_t* bytes) { *bytes = kRegisterBytes; }
};

Bytes width(const Bytes&) {
  int64_t bytes = 0;
  Width::run(&bytes);
  const char* begin = reinterpret_cast<const char*>(&bytes);
  return {begin, begin + sizeof bytes};
}

const std::map<std::string, std::function<Bytes(const Bytes&)>> kFunctions{
    {"width", width},
    {"widen float16", convert<float, Half>},
    {"widen bfloat16", convert<float, BFloat16>},
    {"narrow float16", convert<Half, float>},
    {"narrow bfloat16", convert<BFloat16, float>},
    {"load_one float16", load_ones<Half>},
    {"load_one bfloat16", load_ones<BFloat16>},
    {"fma float32", map3<float, Fma>},
    {"fma float64", map3<double, Fma>},
    {"larger float32", map3<float, Larger>},
    {"larger float64", map3<double, Larger>},
    {"relu float32", map3<float, Relu>},
    {"relu float64", map3<double, Relu>},
    {"relu_backward float32", map3<float, ReluBackward>},
    {"relu_backward float64", map3<double, ReluBackward>},
    {"exp_nonpositive float32", map3<float, Exp>},
    {"exp_nonpositive float64", map3<double, Exp>},
    {"broadcast float32", map3<float, Broadcast>},
    {"broadcast float64", map3<double, Broadcast>},
    {"sum_lanes float32", sum_lanes_bytes<float>},
    {"sum_lanes float64", sum_lanes_bytes<double>},
    {"parts float32", parts<float>},
    {"parts float64", parts<double>},
    {"parts bfloat16", parts<BFloat16>},
    {"parts float16", parts<Half>},
};

}  // namespace
}  // namespace resnest_fused::cpu::RF_SET

// Arguments: the function, and "flush" if the processor is to take subnormal numbers for zero.
int main(int count, char** arguments) {
  using namespace resnest_fused::cpu::RF_SET;
#if defined(__x86_64__)
  if (count > 2) {
    _mm_setcsr(_mm_getcsr() | 0x8040);
  }
#endif
  Bytes input;
  for (int c = std::getchar(); c != EOF; c = std::getchar()) {
    input.push_back(static_cast<char>(c));
  }
  const auto result = kFunctions.at(arguments[1])(input);
  return std::fwrite(result.data(), 1, result.size(), stdout) == result.size() ? 0 : 1;
}
