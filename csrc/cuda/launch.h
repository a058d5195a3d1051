// How a kernel is launched: on the call's stream, with errors named.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "cuda/context.h"

namespace resnest_fused::cuda {

// Launch the kernel as planned, with as many of its blocks as a grid may have.
template <typename Args>
void launch(const Context& context, void (*kernel)(Args), const Launch& planned, const Args& args) {
  const auto& [name, blocks, threads, shared_bytes] = planned;
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
