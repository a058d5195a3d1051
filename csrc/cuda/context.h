// From a call's x to the device and the stream that its kernels are launched on.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "cuda/planner.h"
#include "problem.h"

namespace resnest_fused::cuda {

struct Context {
  Device device;
  cudaStream_t stream;
  std::shared_ptr<void> guard;  // while it lives, x's device is the current one
};

// x's device, made the current one, and its current stream.
Context context_of(const Tensor& x);

}  // namespace resnest_fused::cuda
