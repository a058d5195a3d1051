// The part of CUDA C++ and of its runtime API that csrc/cuda and the tests of this runtime use, for
// a C++ compiler: kernels are plain functions, and a launch runs them on the CPU (runtime.cpp).
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// --- vector types, aligned as in CUDA: a misaligned access is undefined behaviour here too

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

// --- inside a kernel

using std::max;
using std::min;

extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;

namespace cuda_on_host {

void sync_block();
void sync_warp(unsigned mask);
// What lane `lane ^ lane_mask` of this warp gives.
uint64_t exchange(unsigned mask, uint64_t bits, unsigned lane_mask);
// Lets others run, where a thread waits in a loop for what they do.
void spin();
// The same, once a thread has loaded often: a loop around a load may be such a one.
void count_load();
// Which of its mistakes a build of mistakes.py makes.
extern int64_t mistake;

}  // namespace cuda_on_host

namespace resnest_fused::cuda {

// This block's dynamic shared memory.
unsigned char* shared_memory();

}  // namespace resnest_fused::cuda

inline void __syncthreads() { cuda_on_host::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffff) { cuda_on_host::sync_warp(mask); }
inline void __nanosleep(unsigned) { cuda_on_host::spin(); }

template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = cuda_on_host::exchange(mask, bits, static_cast<unsigned>(lane_mask));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// --- outside

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

// There is one stream: a launch returns when the kernel has ended.
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// For a launch that failed: what the last one to fail died of.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();

namespace cuda_on_host {

cudaError_t launch(const cudaLaunchConfig_t& config, void (*run_thread)(const void* kernel),
                   const void* kernel);

}  // namespace cuda_on_host

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto call = [kernel, values = std::tuple<Parameters...>(arguments...)] {
    std::apply(kernel, values);
  };
  using Call = decltype(call);
  return cuda_on_host::launch(
      *config, [](const void* one) { (*static_cast<Call*>(one))(); }, &call);
}
