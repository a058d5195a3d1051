// How a kernel is launched: on the call's stream, with errors named. Like the files of kernels it
// includes no torch header, which nvcc would read once for every architecture.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/tiling.h"

namespace resnest_fused::cuda {

inline void check_launch(cudaError_t error, const Launch& planned) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that the next call does not find it
    throw std::runtime_error(std::string("resnest_fused: kernel ") + planned.name +
                             " could not be launched with " + std::to_string(planned.grid) +
                             " blocks of " + std::to_string(planned.threads) + " threads and " +
                             std::to_string(planned.shared_bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
  }
}

// Let a kernel have its shared memory, and rather that than L1. A device keeps it: a thread does it
// once. Other threads, which launch the kernel too, do the same.
template <typename Args>
void allow_shared(void (*kernel)(Args), const Launch& planned) {
  static thread_local std::map<std::pair<int, void (*)(Args)>, int64_t> allowed;
  int device = 0;
  check_launch(cudaGetDevice(&device), planned);
  int64_t& limit = allowed[{device, kernel}];
  if (limit != planned.shared_limit) {
    const auto set = [&](cudaFuncAttribute attribute, int value) {
      check_launch(cudaFuncSetAttribute(kernel, attribute, value), planned);
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(planned.shared_limit));
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    limit = planned.shared_limit;
  }
}

// Launch the kernel as planned; nothing without a grid.
template <typename Args>
void launch(cudaStream_t stream, void (*kernel)(Args), const Launch& planned, const Args& args) {
  if (planned.grid == 0) {
    return;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(planned.grid));
  config.blockDim = dim3(static_cast<unsigned>(planned.threads));
  config.dynamicSmemBytes = static_cast<size_t>(planned.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (planned.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(planned.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (planned.early) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (planned.shared_limit > 0) {
    allow_shared(kernel, planned);
  }
  check_launch(cudaLaunchKernelEx(&config, kernel, args), planned);
}

}  // namespace resnest_fused::cuda
