// Running statistics on CUDA, of both norms in one launch.
#pragma once

#include "cuda/device.cuh"
#include "formulas.h"

namespace resnest_fused::cuda {

// One of a norm's two statistics.
struct RunningValues {
  Parameter before;  // (F)
  Result after;      // (F), the same memory
  Parameter batch;   // (F)
  double correction;

  template <typename A>
  __device__ __forceinline__ void update(int64_t f, A momentum) const {
    const A of_batch = batch.at<A>(f) * static_cast<A>(correction);
    after.put(f, running_statistic(before.at<A>(f), of_batch, momentum));
  }
};

struct RunningNorm {
  int64_t features;  // 0 where no statistics are updated
  RunningValues mean, var;
  int64_t* num_batches_tracked;  // null: not counted
  double momentum;               // of a norm that is not cumulative
  bool cumulative;
};

// One block, as all features must see the count before it changes, and as both norms may be the
// same one.
template <typename A>
struct RunningArgs {
  RunningNorm norms[2];
};

template <typename A>
__global__ void __launch_bounds__(kColumnThreads)
    update_running_statistics_kernel(RunningArgs<A> args) {
  wait_for_launch_before();
  for (const RunningNorm& norm : args.norms) {
    const int64_t batches = norm.num_batches_tracked ? *norm.num_batches_tracked + 1 : 1;
    const A momentum =
        norm.cumulative ? A(1) / static_cast<A>(batches) : static_cast<A>(norm.momentum);
    __syncthreads();
    if (norm.num_batches_tracked && threadIdx.x == 0) {
      *norm.num_batches_tracked = batches;
    }
    for (int64_t f = threadIdx.x; f < norm.features; f += blockDim.x) {
      norm.mean.update(f, momentum);
      norm.var.update(f, momentum);
    }
    __syncthreads();
  }
}

}  // namespace resnest_fused::cuda
