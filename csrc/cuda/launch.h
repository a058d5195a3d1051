// How a kernel is launched: on the call's stream, with errors named.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "cuda/context.h"

namespace resnest_fused::cuda {

// Launch as many of `blocks` blocks as a grid may have; kernels that may get fewer walk over them.
template <typename Args>
void launch(const Context& context, const char* name, void (*kernel)(Args), int64_t blocks,
            int64_t threads, int64_t shared_bytes, const Args& args) {
  if (blocks == 0) {
    return;
  }
  const int64_t grid = std::min(blocks, context.device.grid_blocks);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = context.stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that the next call does not find it
    STD_TORCH_CHECK(false, "resnest_fused: kernel ", name, " could not be launched with ", grid,
                    " blocks of ", threads, " threads and ", shared_bytes,
                    " bytes of shared memory: ", cudaGetErrorString(error));
  }
}

}  // namespace resnest_fused::cuda
