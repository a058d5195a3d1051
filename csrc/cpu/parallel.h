// Work shared among the threads of torch's own pool, in pieces worth a thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace resnest_fused::cpu {

// Below this a second thread costs more than it brings: waking it takes 2 to 5 us, in which one
// core moves about 64 KB from L2.
inline constexpr int64_t kBytesPerThread = 64 * 1024;

// Call f(begin, end) on pieces of [0, units) that cover it once; the pieces depend on the number
// of threads, so f must not let a unit's result depend on its piece.
template <typename F>
void parallel_units(int64_t units, int64_t bytes_per_unit, const F& f) {
  const int64_t grain =
      std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(bytes_per_unit, 1));
  if (units <= grain) {
    if (units > 0) {
      f(0, units);
    }
    return;
  }
  torch::stable::parallel_for(0, units, grain, f);
}

}  // namespace resnest_fused::cpu
