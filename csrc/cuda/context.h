// From a call's x to the device and the stream that its kernels are launched on.
#pragma once

#include "cuda/launch.h"
#include "problem.h"

namespace resnest_fused::cuda {

// x's device, made the current one, and its current stream.
Context context_of(const Tensor& x);

}  // namespace resnest_fused::cuda
