// Stages of one launch that need each other's results: what would else be a launch each.
//
// A stage has items, a block for each. Tickets from a counter hand them out in the order of their
// stages, whichever order blocks start in. An item that needs what a stage before it gives waits
// until all items of that one are done. These have lower tickets: blocks that run have taken them.
// So no wait is for ever, however few blocks run at a time.
//
// The counters are zero at first: an earlier launch of the same call sees to that (`open_stages`).
#pragma once

#include <cuda/atomic>

#include "cuda/device.cuh"
#include "cuda/tiling.h"

namespace resnest_fused::cuda {

using Counter = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>;

// For the launch before: makes the counters ready.
__device__ __forceinline__ void open_stages(unsigned* counters) {
  if (counters && blockIdx.x == 0 && threadIdx.x < kCounters) {
    counters[threadIdx.x] = 0;
  }
}

// In all functions every thread of the block takes part.
template <int kStages>
struct Stages {
  unsigned items[kStages];
  unsigned* counters;  // (kCounters): items taken, then those done by stage

  // The block's stage, and its item of that one. Shared memory: a counter. A block takes one item
  // and no more: in a loop the compiler would keep what all stages have in common in registers.
  __device__ __forceinline__ int take(int64_t& item) const {
    if (threadIdx.x == 0) {
      *shared<unsigned>() = Counter(counters[0]).fetch_add(1, ::cuda::memory_order_relaxed);
    }
    __syncthreads();
    unsigned ticket = *shared<unsigned>();
    __syncthreads();
    int stage = 0;
    while (stage + 1 < kStages && ticket >= items[stage]) {
      ticket -= items[stage++];
    }
    item = ticket;
    return stage;
  }

  // Wait until a stage before the block's own is done. Meanwhile a thread polls without acquiring,
  // which would empty the L1 of its neighbours.
  __device__ __forceinline__ void wait_for(int stage) const {
    if (items[stage] > 0) {
      if (threadIdx.x == 0) {
        const Counter done(counters[1 + stage]);
        while (done.load(::cuda::memory_order_relaxed) != items[stage]) {
          __nanosleep(20);
        }
        done.load(::cuda::memory_order_acquire);
      }
      __syncthreads();
    }
  }

  // The block's item of this stage is done: what it wrote is there for those that wait.
  __device__ __forceinline__ void done(int stage) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      Counter(counters[1 + stage]).fetch_add(1, ::cuda::memory_order_release);
    }
  }
};

}  // namespace resnest_fused::cuda
