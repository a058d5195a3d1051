// Loads and stores of vectors, for every stored dtype and any alignment: whole, in part, and past
// the caches.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels/half.h"
#include "cpu/kernels/vector.h"

namespace resnest_fused::cpu::RF_SET {

// kLanes elements, widened.
template <typename V, typename T>
RF_INLINE V load(const T* p) {
  if constexpr (std::is_same_v<T, Element<V>>) {
    V value;
    std::memcpy(&value, p, sizeof value);
    return value;
  } else {
    HalfBits<V> bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen<V>(bits, T{});
  }
}

template <typename T, typename V>
RF_INLINE void store(T* p, V value) {
  if constexpr (std::is_same_v<T, Element<V>>) {
    std::memcpy(p, &value, sizeof value);
  } else {
    const HalfBits<V> bits = narrow(value, T{});
    std::memcpy(p, &bits, sizeof bits);
  }
}

// One element, widened.
template <typename V, typename T>
RF_INLINE Element<V> load_one(const T* p) {
  if constexpr (std::is_same_v<T, Element<V>>) {
    return *p;
  } else {
    return widen<V>(HalfBits<V>{} + p->bits, T{})[0];
  }
}

// Which lanes of a vector at some place of a row the row has: all of them, or the first n. Code for
// both is written once, with the kind as a template argument.
struct Whole {};
struct First {
  int64_t n;
};

template <typename V, typename T>
RF_INLINE V load(const T* p, Whole) {
  return load<V>(p);
}
// Zeros in the other lanes.
template <typename V, typename T>
RF_INLINE V load(const T* p, First lanes) {
  T elements[kLanes<V>] = {};
  for (int64_t i = 0; i < lanes.n; ++i) {
    elements[i] = p[i];
  }
  return load<V>(elements);
}

template <typename T, typename V>
RF_INLINE void store(T* p, V value, Whole) {
  store(p, value);
}
template <typename T, typename V>
RF_INLINE void store(T* p, V value, First lanes) {
  T elements[kLanes<V>];
  store(elements, value);
  for (int64_t i = 0; i < lanes.n; ++i) {
    p[i] = elements[i];
  }
}

// All lanes where the row has them, else the first `count`.
template <typename V, typename T>
RF_INLINE V load_lanes(const T* p, int64_t count) {
  return count >= kLanes<V> ? load<V>(p) : load<V>(p, First{count});
}

template <typename T, typename V>
RF_INLINE void store_lanes(T* p, V value, int64_t count) {
  if (count >= kLanes<V>) {
    store(p, value);
  } else {
    store(p, value, First{count});
  }
}

// Call f(i, lanes) for each vector of a row of `count` elements, i being where it starts.
template <typename V, typename F>
RF_INLINE void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes<V> <= count; i += kLanes<V>) {
    f(i, Whole{});
  }
  if (i < count) {
    f(i, First{count - i});
  }
}

// Ones in the last `count` lanes, zeros in the others.
template <typename V>
RF_INLINE Bits<V> last_lanes(int64_t count) {
  using Word = Element<Bits<V>>;
  static constexpr auto kMask = [] {
    std::array<Word, 2 * kLanes<V>> mask{};
    std::fill(mask.begin() + kLanes<V>, mask.end(), ~Word{0});
    return mask;
  }();
  Bits<V> mask;
  std::memcpy(&mask, kMask.data() + count, sizeof mask);
  return mask;
}

template <typename V>
RF_INLINE V masked(V value, Bits<V> mask) {
  return reinterpret<V>(reinterpret<Bits<V>>(value) & mask);
}

// At least so many bytes lie between what is asked for and what is used.
constexpr int64_t kAheadBytes = 8 * 1024;

// Asks for memory ahead of its use, where the processor does not foresee it: several streams too
// short to be noticed, or a descending one. Each step of a loop asks for a share, as there are only
// so many requests that the processor has under way.
template <typename T>
class Ahead {
 public:
  // From `next` on; null: nothing is asked for.
  explicit Ahead(const T* next) : next_(next) {}

  // With kElements more used, ask for as many.
  template <int64_t kElements>
  RF_INLINE void step() {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (!next_) {
      return;
    }
    if constexpr (kElements < kLine) {
      if (reinterpret_cast<uintptr_t>(next_) % 64 < kElements * sizeof(T)) {
        __builtin_prefetch(next_, 0, 2);
      }
    } else {
      for (int64_t i = 0; i < kElements; i += kLine) {
        __builtin_prefetch(next_ + i, 0, 2);
      }
    }
    next_ += kElements;
  }

 private:
  const T* next_;
};

// What follows a tile of `count` elements, whose rows lie side by side.
template <typename T>
RF_INLINE Ahead<T> ahead_of_tile(bool wanted, const T* tile, int64_t count) {
  return Ahead<T>(wanted ? tile + std::max<int64_t>(count, kAheadBytes / sizeof(T)) : nullptr);
}

// What follows a row of `count` elements where rows are walked in descending order: the rows
// before it.
template <typename T>
RF_INLINE Ahead<T> ahead_of_row(bool wanted, const T* row, int64_t count) {
  constexpr int64_t kElements = kAheadBytes / sizeof(T);
  return Ahead<T>(wanted ? row - (kElements + count - 1) / count * count : nullptr);
}

#if defined(__x86_64__)
template <typename V>
RF_INLINE void stream_register(void* p, V value) {
  if constexpr (sizeof value == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), reinterpret<__m128i>(value));
#if RF_REGISTER_BYTES >= 32
  } else if constexpr (sizeof value == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret<__m256i>(value));
#endif
#if RF_REGISTER_BYTES == 64
  } else if constexpr (sizeof value == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret<__m512i>(value));
#endif
  } else {
    std::memcpy(p, &value, sizeof value);
  }
}
#endif

// Store past the caches, which saves reading the line first; p is aligned to the bytes stored. Call
// stream_fence() before other threads may read.
template <typename T, typename V>
RF_INLINE void stream(T* p, V value) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, Element<V>>) {
    stream_register(p, value);
  } else {
    stream_register(p, narrow(value, T{}));
  }
#else
  store(p, value);
#endif
}

RF_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace resnest_fused::cpu::RF_SET
