// What every kernel needs of the device: element types, vectors, shared memory, sums over threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/tiling.h"

// A compiler for another processor takes the code for a GPU that has them, or with RF_OLDER_GPU for
// one that has not.
#if defined(__CUDACC__) ? defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 : !defined(RF_OLDER_GPU)
#define RF_HAS_EARLY_LAUNCHES 1
#else
#define RF_HAS_EARLY_LAUNCHES 0
#endif

namespace resnest_fused::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// From sm_90 on a launch's blocks may start before the launch before it has ended, which takes as
// long as a small kernel. How every kernel begins: they wait until it has, and what it wrote is
// there.
__device__ __forceinline__ void wait_for_launch_before() {
#if RF_HAS_EARLY_LAUNCHES
  cudaGridDependencySynchronize();
#endif
}
// And of a kernel with another one of ours behind it: once all blocks are here, those of the next
// launch may start. What somebody else launches next starts when all has ended.
__device__ __forceinline__ void begin_next_launch() {
#if RF_HAS_EARLY_LAUNCHES
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// The type in which sums are kept.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds once.
template <typename T, typename A>
__device__ __forceinline__ T narrow(A value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// Elements that one instruction loads or stores. The compiler would take copies of the struct apart
// into its elements, so loads and stores are of words of the same size. nvcc 13.0 splits even
// stores of words in the loops over a run-time radix, so a store names its instruction. That one
// leaves L2 to maps that are read again, as those that are written are not.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T values[kCount];
};

template <size_t kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load(const T* from) {
  using Word = typename WordOf<sizeof(T) * kCount>::Type;
  const Word word = *reinterpret_cast<const Word*>(from);
  Vector<T, kCount> vector;
  memcpy(&vector, &word, sizeof(word));
  return vector;
}

// An element in the type of sums. One instruction takes a bfloat16 out of its word; by itself the
// compiler has two.
template <typename T, int kCount>
__device__ __forceinline__ Acc<T> widen(const Vector<T, kCount>& vector, int element) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kCount > 1) {
    unsigned word;
    memcpy(&word, &vector.values[element / 2 * 2], sizeof(word));
    word = element % 2 ? word & 0xffff0000u : word << 16;
    float value;
    memcpy(&value, &word, sizeof(value));
    return value;
  } else {
    return widen(vector.values[element]);
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T, kCount>& vector) {
  using Word = typename WordOf<sizeof(T) * kCount>::Type;
  Word word;
  memcpy(&word, &vector, sizeof(word));
  __stcs(reinterpret_cast<Word*>(to), word);
}

// The same into shared memory.
template <int kCount, typename T>
__device__ __forceinline__ void store_shared(T* to, const Vector<T, kCount>& vector) {
  using Word = typename WordOf<sizeof(T) * kCount>::Type;
  Word word;
  memcpy(&word, &vector, sizeof(word));
  *reinterpret_cast<Word*>(to) = word;
}

#if defined(__CUDACC__)
// The block's dynamic shared memory, 16-byte aligned. Kernels reach it only through here, so that a
// runtime for another processor can provide it.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#endif

template <typename A>
__device__ __forceinline__ A* shared() {
  return reinterpret_cast<A*>(shared_memory());
}

enum class Dtype : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

// f(data) with a pointer of the dtype: float32, or that of a map with sums in A.
template <typename A, typename Void, typename F>
__device__ __forceinline__ auto with_dtype(Void* data, Dtype dtype, F f) {
  const auto as = [&](auto tag) {
    using T = decltype(tag);
    return f(static_cast<std::conditional_t<std::is_const_v<Void>, const T*, T*>>(data));
  };
  if (dtype == Dtype::kFloat) {
    return as(float{});
  }
  if constexpr (std::is_same_v<A, double>) {
    return as(double{});
  } else {
    return dtype == Dtype::kHalf ? as(__half{}) : as(__nv_bfloat16{});
  }
}

// Tensors whose dtype is known only at run time: a parameter,
struct Parameter {
  const void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::kFloat;

  template <typename A>
  __device__ __forceinline__ A at(int64_t i) const {
    return with_dtype<A>(data, dtype,
                         [&](const auto* values) { return static_cast<A>(widen(values[i])); });
  }

  template <typename A>
  __device__ __forceinline__ A at_or(int64_t i, A otherwise) const {
    return data ? at<A>(i) : otherwise;
  }
};

// and a parameter's gradient.
struct Result {
  void* data = nullptr;  // null: not wanted
  Dtype dtype = Dtype::kFloat;

  template <typename A>
  __device__ __forceinline__ void put(int64_t i, A value) const {
    if (data) {
      with_dtype<A>(data, dtype, [&](auto* values) {
        values[i] = narrow<std::remove_reference_t<decltype(*values)>>(value);
      });
    }
  }
};

// The sum of `kSums` values over `lanes` neighbouring threads, a power of two, which all get it.
// Every thread of the block must call. More lanes than a warp has use the block's shared memory:
// kSums values a warp.
template <int kSums, typename A>
__device__ __forceinline__ void sum_over_lanes(A (&sums)[kSums], int lanes) {
  for (int apart = (lanes < kWarp ? lanes : static_cast<int>(kWarp)) / 2; apart > 0; apart /= 2) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      sums[s] += __shfl_xor_sync(kWholeWarp, sums[s], apart);
    }
  }
  if (lanes > kWarp) {
    A* const of_warps = shared<A>();
    const int warp = static_cast<int>(threadIdx.x) / static_cast<int>(kWarp);
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        of_warps[warp * kSums + s] = sums[s];
      }
    }
    __syncthreads();
    const int warps = lanes / static_cast<int>(kWarp), first = warp / warps * warps;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      A total = 0;
      for (int w = 0; w < warps; ++w) {
        total += of_warps[(first + w) * kSums + s];
      }
      sums[s] = total;
    }
    __syncthreads();
  }
}

}  // namespace resnest_fused::cuda
