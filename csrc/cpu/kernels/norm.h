// Batch normalisation on the CPU: its parameters in the accumulator's type, and sums over rows of
// per-feature data, as its statistics and gradients need them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/kernels/vector.h"
#include "cpu/parallel.h"

namespace resnest_fused::cpu::RF_SET {

// Filled in for every case: the identity without a norm, gamma 1 and beta 0 where not affine.
template <typename A>
struct Norm {
  std::vector<A> mean;    // (F)
  std::vector<A> invstd;  // (F)
  std::vector<A> gamma;   // (F)
  std::vector<A> beta;    // (F)

  void set_statistics(const A* new_mean /* (F) */, const A* var /* (F) */, double eps) {
    for (size_t f = 0; f < mean.size(); ++f) {
      mean[f] = new_mean[f];
      invstd[f] = A(1) / std::sqrt(var[f] + static_cast<A>(eps));
    }
  }
};

// Features whose sums over rows are on the stack at a time: in float64, as in PyTorch's batch
// normalisation on the CPU.
constexpr int64_t kFeatureBlock = 64;

// Clear the sums and call add(row, f, f - first) for rows ascending and features f in [first,
// last).
template <int kSums, typename F>
RF_INLINE void sum_block(int64_t rows, int64_t first, int64_t last,
                         double (&sums)[kSums][kFeatureBlock], F add) {
  for (int k = 0; k < kSums; ++k) {
    std::fill_n(sums[k], kFeatureBlock, 0.0);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t f = first; f < last; ++f) {
      add(row, f, f - first);
    }
  }
}

// Rows of means and of sums of squared deviations from them, each over some elements. Every
// `per_sample`-th row stands for `last_count` elements, the others for `count`.
template <typename A>
struct PartialStatistics {
  const A* mean;     // (rows, F)
  const A* squares;  // (rows, F), or null where each row is a single element
  int64_t rows;
  int64_t per_sample;
  double count;
  double last_count;

  double row_count(int64_t row) const { return (row + 1) % per_sample == 0 ? last_count : count; }
  double total() const {
    const auto samples = static_cast<double>(rows / per_sample);
    return samples * (static_cast<double>(per_sample - 1) * count + last_count);
  }
};

// Mean and biased variance of features [begin, end) over all elements, in two passes over the rows;
// zeros over no elements.
template <typename A>
void combine_statistics(const PartialStatistics<A>& partial, int64_t features, int64_t begin,
                        int64_t end, A* mean /* (F) */, A* var /* (F) */) {
  const double scale = 1.0 / std::max(partial.total(), 1.0);
  for (int64_t first = begin; first < end; first += kFeatureBlock) {
    const int64_t last = std::min(first + kFeatureBlock, end);
    double sums[1][kFeatureBlock], means[kFeatureBlock];
    sum_block(partial.rows, first, last, sums,
              [&](int64_t row, int64_t f, int64_t at) __attribute__((always_inline)) {
                sums[0][at] += partial.row_count(row) * partial.mean[row * features + f];
              });
    for (int64_t at = 0; at < last - first; ++at) {
      means[at] = sums[0][at] * scale;
      mean[first + at] = static_cast<A>(means[at]);
    }
    sum_block(partial.rows, first, last, sums,
              [&](int64_t row, int64_t f, int64_t at) __attribute__((always_inline)) {
                const int64_t e = row * features + f;
                const double centered = partial.mean[e] - means[at];
                sums[0][at] += partial.row_count(row) * (centered * centered);
                sums[0][at] += partial.squares ? partial.squares[e] : A{};
              });
    for (int64_t at = 0; at < last - first; ++at) {
      var[first + at] = static_cast<A>(sums[0][at] * scale);
    }
  }
}

// The same for all features, shared among the threads.
template <typename A>
void combine_statistics(const PartialStatistics<A>& partial, int64_t features, A* mean /* (F) */,
                        A* var /* (F) */) {
  parallel_items(features, 4 * partial.rows * static_cast<int64_t>(sizeof(A)),
                 [&](int64_t begin, int64_t end) {
                   combine_statistics(partial, features, begin, end, mean, var);
                 });
}

}  // namespace resnest_fused::cpu::RF_SET
