// Work shared among the threads of torch's own pool, in pieces worth a thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

namespace resnest_fused::cpu {

// Below this a second thread costs more than it brings: waking it takes 2 to 5 us, in which one
// core moves about 64 KB from L2.
inline constexpr int64_t kBytesPerThread = 64 * 1024;

// The threads that share the work: torch.get_num_threads().
inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// From so many items per thread on no thread has more than 1.2 times the mean.
inline constexpr int64_t kItemsPerThread = 5;

// Call f(begin, end) on pieces of [0, items) that cover it once. The pieces depend on the number of
// threads, so a work item's result must not depend on its piece. An exception from f is thrown
// here, of several that from the first piece.
template <typename F>
void parallel_items(int64_t items, int64_t bytes_per_item, const F& f) {
  const int64_t grain =
      std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(bytes_per_item, 1));
  if (items <= grain) {
    if (items > 0) {
      f(0, items);
    }
    return;
  }
  // Caught on the thread that threw: on its way through parallel_for, which is C underneath, an
  // exception would lose its type and its message.
  std::mutex mutex;
  std::exception_ptr exception;
  int64_t thrown_at = items;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (begin < thrown_at) {
        thrown_at = begin;
        exception = std::current_exception();
      }
    }
  });
  if (exception) {
    std::rethrow_exception(exception);
  }
}

}  // namespace resnest_fused::cpu
