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
// What a lane of this warp gives, and which lane this thread is.
uint64_t exchange(unsigned mask, uint64_t bits, unsigned from_lane);
unsigned lane();
// The block's cluster: its blocks, and an address in the shared memory of one of them.
void sync_cluster();
unsigned block_rank();
unsigned cluster_blocks();
unsigned char* in_block(unsigned char* address, int rank);
// Launches run one after the other here. One that may begin early has to say that it waits.
void wait_for_launch_before();
// Copies into shared memory that arrive when a thread waits for them (runtime.cpp).
void* begin_arrivals(ptrdiff_t expected);
void arrive(void* arrivals, ptrdiff_t threads, ptrdiff_t bytes);
void copy_later(void* arrivals, void* to, const void* from, size_t bytes);
void wait_for_arrivals(void* arrivals, bool parity);
// A thread's own: copies join a group when they are committed, and are there when the thread waits
// for all groups but the last few.
void copy_async(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(size_t but_groups);
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

inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() { cuda_on_host::wait_for_launch_before(); }

template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int from_lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = cuda_on_host::exchange(mask, bits, static_cast<unsigned>(from_lane));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return __shfl_sync(mask, value, static_cast<int>(cuda_on_host::lane()) ^ lane_mask);
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

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;

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
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError();

namespace cuda_on_host {

cudaError_t launch(const cudaLaunchConfig_t& config, void (*run_thread)(const void* kernel),
                   const void* kernel, const void* function);
cudaError_t opt_in(const void* function, int shared_bytes);

}  // namespace cuda_on_host

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize
             ? cuda_on_host::opt_in(reinterpret_cast<const void*>(kernel), value)
             : cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto call = [kernel, values = std::tuple<Parameters...>(arguments...)] {
    std::apply(kernel, values);
  };
  using Call = decltype(call);
  return cuda_on_host::launch(
      *config, [](const void* one) { (*static_cast<Call*>(one))(); }, &call,
      reinterpret_cast<const void*>(kernel));
}
