// The device and the stream of a call, from CUDA and torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <unordered_map>

#include "cuda/cluster.cuh"
#include "cuda/context.h"

// In libtorch_cuda; torch's header declares it only where USE_CUDA is defined.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);

namespace resnest_fused::cuda {
namespace {

int64_t attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
  STD_TORCH_CHECK(error == cudaSuccess, "resnest_fused: CUDA device ", index,
                  " does not tell its properties: ", cudaGetErrorString(error));
  return value;
}

int64_t driver_version() {
  int version = 0;
  const cudaError_t error = cudaDriverGetVersion(&version);
  STD_TORCH_CHECK(
      error == cudaSuccess,
      "resnest_fused: the CUDA driver does not tell its version: ", cudaGetErrorString(error));
  return version;
}

__global__ void __launch_bounds__(kMapThreads) probe_kernel() {}

// The architecture that the code which runs on a GPU is written for, as in 90. It may be PTX for an
// older one than the GPU.
int architecture(int index) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  STD_TORCH_CHECK(error == cudaSuccess, "resnest_fused: its CUDA kernels do not run on device ",
                  index, ": ", cudaGetErrorString(error));
  return attributes.ptxVersion;
}

// Blocks of the clusters that kernels are launched in; 1: none. A part of a GPU may have no room
// for one, whose blocks may take all of a multiprocessor's shared memory.
int64_t largest_cluster(int index, int64_t shared_bytes) {
  constexpr unsigned kBlocks = 8;  // as many as every whole device with clusters can launch
  if (!RF_KNOWS_CLUSTERS || architecture(index) < 90 ||
      attribute(cudaDevAttrClusterLaunch, index) == 0) {
    return 1;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kBlocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(static_cast<unsigned>(kMapThreads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  const bool asked =
      cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes)) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, probe_kernel, &config) == cudaSuccess;
  cudaGetLastError();  // so that the next call does not find it
  return asked && clusters > 0 ? kBlocks : 1;
}

Device read_device(int index) {
  Device device{};
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.threads_per_block = attribute(cudaDevAttrMaxThreadsPerBlock, index);
  device.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, index);
  device.registers_per_multiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor, index);
  device.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlock, index);
  device.shared_per_block_optin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  device.grid_blocks = attribute(cudaDevAttrMaxGridDimX, index);
  device.cluster_blocks = largest_cluster(index, device.shared_per_block_optin);
  device.architecture = architecture(index);
  device.driver = driver_version();
  return device;
}

// The device's properties, kept: asking for them takes longer than a launch.
const Device& known_device(int index) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> devices;
  const std::lock_guard lock(mutex);
  const auto found = devices.find(index);
  return found != devices.end() ? found->second
                                : devices.emplace(index, read_device(index)).first->second;
}

}  // namespace

Context context_of(const Tensor& x) {
  const int32_t index = x.get_device_index();
  auto guard = std::make_shared<torch::stable::accelerator::DeviceGuard>(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return {known_device(index), static_cast<cudaStream_t>(stream), std::move(guard)};
}

}  // namespace resnest_fused::cuda
