// What sm_90 and later have of their own: clusters, whose blocks reach each other's shared memory,
// and copies into shared memory that need no thread meanwhile.
#pragma once

#include <cooperative_groups.h>

#include <cuda/barrier>

#include "cuda/device.cuh"

// Kernels for clusters have no body where the GPU has none, or nvcc comes without these barriers.
// The planner does not pick them there (`Device::cluster_blocks`). A compiler for another processor
// takes the code for a GPU that has them, or with RF_OLDER_GPU for one that has not.
#if !defined(__CUDACC__) || defined(__cccl_lib_local_barrier_arrive_tx)
#define RF_KNOWS_CLUSTERS 1
#else
#define RF_KNOWS_CLUSTERS 0
#endif
#if defined(__CUDACC__) || defined(RF_OLDER_GPU)
#if RF_KNOWS_CLUSTERS && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RF_HAS_CLUSTERS 1
#else
#define RF_HAS_CLUSTERS 0
#endif
#else
#define RF_HAS_CLUSTERS 1
#endif

namespace resnest_fused::cuda {

#if RF_HAS_CLUSTERS

using Cluster = cooperative_groups::cluster_group;

// Put a value at the same place of every block's shared memory.
template <typename A>
__device__ __forceinline__ void put_in_all(const Cluster& cluster, A* at, A value) {
  const int blocks = static_cast<int>(cluster.num_blocks());
  for (int rank = 0; rank < blocks; ++rank) {
    *cluster.map_shared_rank(at, rank) = value;
  }
}

// Copies into shared memory that all threads of the block can wait for; its place is there, too.
struct Arrival {
  ::cuda::barrier<::cuda::thread_scope_block> barrier;

  // One thread says how many bytes will come;
  __device__ __forceinline__ void expect(int bytes) {
    init(&barrier, 1);
#if defined(__CUDACC__)
    // For those that copy without threads: they see the barrier as it is now.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    static_cast<void>(::cuda::device::barrier_arrive_tx(barrier, 1, bytes));
  }
  // it copies them, a multiple of 16 from and to one;
  template <typename T>
  __device__ __forceinline__ void copy(T* to, const T* from, int bytes) {
    ::cuda::device::memcpy_async_tx(
        to, from, ::cuda::aligned_size_t<16>(static_cast<size_t>(bytes)), barrier);
  }
  // behind a barrier of the block every thread may wait;
  __device__ __forceinline__ void wait() {
    barrier.wait_parity(false);
#if defined(__CUDACC__)
    asm volatile("" ::: "memory");  // the wait does not tell the compiler that memory changes
#endif
  }
  // and behind one more, one thread lets the place be used again.
  __device__ __forceinline__ void end() {
#if defined(__CUDACC__)
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(&barrier));
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(at) : "memory");
#endif
  }
};

#endif

}  // namespace resnest_fused::cuda
