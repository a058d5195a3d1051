// How a kernel is launched: on the call's device and stream, with errors named. Like the files of
// kernels it includes no torch header, which nvcc would read once for every architecture.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/plan.h"

namespace resnest_fused::cuda {

// The device and the stream that a call runs on.
struct Context {
  Device device;
  Choice choice;  // of the strategy in evaluation
  cudaStream_t stream;
  std::shared_ptr<void> guard;  // while it lives, x's device is the current one
};

inline void check_launch(cudaError_t error, const Launch& planned, int64_t grid) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that the next call does not find it
    throw std::runtime_error(std::string("resnest_fused: kernel ") + planned.name +
                             " could not be launched with " + std::to_string(grid) + " blocks of " +
                             std::to_string(planned.threads) + " threads and " +
                             std::to_string(planned.shared_bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
  }
}

// Launch the kernel as planned, with as many of its blocks as a grid may have.
template <typename Args>
void launch(const Context& context, void (*kernel)(Args), const Launch& planned, const Args& args) {
  if (planned.blocks == 0) {
    return;
  }
  const int64_t grid = std::min(planned.blocks, context.device.grid_blocks);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(planned.threads));
  config.dynamicSmemBytes = static_cast<size_t>(planned.shared_bytes);
  config.stream = context.stream;
  check_launch(cudaLaunchKernelEx(&config, kernel, args), planned, grid);
}

}  // namespace resnest_fused::cuda
