// The device and the stream that a call runs on.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "cuda/plan.h"
#include "problem.h"

namespace resnest_fused::cuda {

struct Context {
  Device device;
  Choice choice;  // of the strategy in evaluation
  cudaStream_t stream;
  std::shared_ptr<void> guard;  // while it lives, x's device is the current one
};

// x's device, made the current one, and its current stream.
Context context_of(const Tensor& x);

}  // namespace resnest_fused::cuda
