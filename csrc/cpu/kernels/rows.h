// Sums along a row of pixels of an NCHW map.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/kernels/memory.h"
#include "cpu/kernels/vector.h"

namespace resnest_fused::cpu::RF_SET {

// The elements of the last vector of a row, n of them, for `load_part` and `keep`.
struct Rest {
  int64_t n;
  bool behind_a_vector;  // at least a vector of the row lies before its end
};

template <typename V, typename T>
RF_INLINE V load_part(const T* p, Whole) {
  return load<V>(p);
}

// The elements with zeros around them. Behind a vector they are the last lanes of the vector that
// ends with the row: that is far cheaper than a load of the first, which goes through memory.
template <typename V, typename T>
RF_INLINE V load_part(const T* p, Rest rest) {
  return rest.behind_a_vector ? masked(load<V>(p + rest.n - kLanes<V>), last_lanes<V>(rest.n))
                              : load<V>(p, First{rest.n});
}

// Zeros again where load_part put them.
template <typename V>
RF_INLINE V keep(V value, Whole) {
  return value;
}
template <typename V>
RF_INLINE V keep(V value, Rest rest) {
  const auto lanes = last_lanes<V>(rest.behind_a_vector ? rest.n : kLanes<V> - rest.n);
  return masked(value, rest.behind_a_vector ? lanes : ~lanes);
}

// kSums sums at once, each in kChains independent vectors, which hide the latency of the adder.
template <typename V, int kSums, int kChains>
struct Sums {
  V chains[kChains][kSums];

  RF_INLINE void totals(Element<V> (&result)[kSums]) const {
    V sums[kSums];
    unroll<kSums>([&](auto k) __attribute__((always_inline)) {
      sums[k] = chains[0][k] + chains[1][k];
      unroll<kChains / 2 - 1>([&](auto pair) __attribute__((always_inline)) {
        sums[k] += chains[2 * pair + 2][k] + chains[2 * pair + 3][k];
      });
    });
    if constexpr (kSums == 1) {
      result[0] = static_cast<Element<V>>(sum_lanes(sums[0]));
    } else {
      sum_lanes_of<kSums>(sums, result);
    }
  }
};

// Over the row's [0, count), add(i, part, sums), which loads elements from i on with load_part.
template <typename V, int kSums, int kChains, typename Add>
RF_INLINE void accumulate(int64_t count, Sums<V, kSums, kChains>& sums, Add add) {
  constexpr int64_t kStep = kLanes<V>;
  int64_t i = 0;
  for (; i + kChains * kStep <= count; i += kChains * kStep) {
    unroll<kChains>([&](auto chain) __attribute__((always_inline)) {
      add(i + chain * kStep, Whole{}, sums.chains[chain]);
    });
  }
  for (; i + kStep <= count; i += kStep) {
    add(i, Whole{}, sums.chains[0]);
  }
  if (i < count) {
    add(i, Rest{count - i, count >= kStep}, sums.chains[1]);
  }
}

}  // namespace resnest_fused::cpu::RF_SET
