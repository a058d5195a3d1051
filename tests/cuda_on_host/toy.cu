// Small kernels, right and wrong ones, that show what the runtime does: used by
// test_cuda_runtime.py through ctypes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuda/atomic>

namespace {

constexpr unsigned kWarp = 32;

using Ref = cuda::atomic_ref<unsigned, cuda::thread_scope_device>;

template <typename T>
__device__ T* shared() {
  return reinterpret_cast<T*>(resnest_fused::cuda::shared_memory());
}

// out[b] = the sum of this block's elements of x; the barrier may be missing.
template <bool kBarrier>
__global__ void __launch_bounds__(1024) sum_blocks(const float* x,  // (gridDim.x, blockDim.x)
                                                   float* out) {    // (gridDim.x)
  float* const of_warps = shared<float>();
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned mask = kWarp / 2; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, mask);
  }
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = sum;
  }
  if (kBarrier) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
      total += of_warps[warp];
    }
    out[blockIdx.x] = total;
  }
}

// Pass `pass` of item `item` adds 1 to what the pass before made of the item beside it. Blocks take
// tickets, and wait for lower ones only.
__global__ void relay(unsigned* counters,  // 1 ticket, items * passes flags; all 0
                      float* values,       // (passes + 1, items)
                      unsigned items, unsigned passes, bool acquires) {
  unsigned* const ticket = shared<unsigned>();
  for (;;) {
    if (threadIdx.x == 0) {
      *ticket = Ref(counters[0]).fetch_add(1, cuda::memory_order_relaxed);
    }
    __syncthreads();
    const unsigned mine = *ticket;
    __syncthreads();
    if (mine >= items * passes) {
      return;
    }
    const unsigned pass = mine / items, item = mine % items, source = (item + 1) % items;
    if (pass > 0) {
      if (threadIdx.x == 0) {
        const auto order = acquires ? cuda::memory_order_acquire : cuda::memory_order_relaxed;
        Ref flag(counters[1 + (pass - 1) * items + source]);
        while (flag.load(order) == 0) {
          __nanosleep(20);
        }
      }
      __syncthreads();
    }
    for (unsigned i = threadIdx.x; i < kWarp; i += blockDim.x) {
      values[((pass + 1) * items + item) * kWarp + i] =
          values[(pass * items + source) * kWarp + i] + 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      Ref(counters[1 + pass * items + item]).store(1, cuda::memory_order_release);
    }
  }
}

// Lane 0 gives its warp's sum of x to its other lanes through shared memory.
template <bool kSyncWarp>
__global__ void share_in_warp(const double* x, double* out) {
  double sum = x[threadIdx.x];
  for (unsigned mask = kWarp / 2; mask > 0; mask /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, mask);
  }
  double* const of_warp = shared<double>() + threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    *of_warp = sum;
  }
  if (kSyncWarp) {
    __syncwarp();
  } else {
    __shfl_xor_sync(0xffffffff, 0, 1);  // waits for the warp, but orders no memory
  }
  out[threadIdx.x] = *of_warp;
}

// Half of the threads end before the barrier that the others use.
__global__ void end_early(float* out) {
  if (threadIdx.x >= blockDim.x / 2) {
    return;
  }
  shared<float>()[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared<float>()[blockDim.x / 2 - 1 - threadIdx.x];
}

// Where this thread is, by linear index.
__global__ void indices(int* out) {  // (grid, block, 4)
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  reinterpret_cast<int4*>(out)[block * blockDim.x * blockDim.y + thread] =
      make_int4(blockIdx.x, blockIdx.y, threadIdx.x, threadIdx.y);
}

__global__ void read_shared(float* out, unsigned index) {
  out[threadIdx.x] = shared<float>()[index];
}

// Every block writes where every block writes.
__global__ void one_place(float* out) {
  if (threadIdx.x == 0) {
    out[0] = 1;
  }
}

__global__ void copy_vectors(const float* x, float* out) {
  reinterpret_cast<float4*>(out)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];
}

__global__ void wait_forever(unsigned* flag, bool sleeps) {
  while (Ref(*flag).load(cuda::memory_order_acquire) == 0) {
    if (sleeps) {
      __nanosleep(20);
    }
  }
}

// Half of the threads wait where the others do not come.
__global__ void half_at_shuffle() {
  if (threadIdx.x % 2) {
    __shfl_xor_sync(0xffffffff, 1, 1);
  } else {
    __syncthreads();
  }
}

__global__ void split_warp() {
  if (threadIdx.x % 2) {
    __shfl_xor_sync(0xffffffff, 1, 1);
  } else {
    __syncwarp();
  }
}

__global__ void shuffle_in_half_warp() { __shfl_xor_sync(0xffffffff, 1, 1); }

__global__ void name_half_warp() { __syncwarp(0xffff); }

__global__ void convert(const float* from,        // (count)
                        uint16_t* to_half,        // (count)
                        uint16_t* to_bfloat16) {  // (count)
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const __half half = __float2half_rn(from[i]);
  const __nv_bfloat16 bfloat16 = __float2bfloat16_rn(from[i]);
  std::memcpy(to_half + i, &half, 2);
  std::memcpy(to_bfloat16 + i, &bfloat16, 2);
}

__global__ void widen(const uint16_t* from,  // (count)
                      float* of_half,        // (count)
                      float* of_bfloat16) {  // (count)
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  __half half;
  __nv_bfloat16 bfloat16;
  std::memcpy(&half, from + i, 2);
  std::memcpy(&bfloat16, from + i, 2);
  of_half[i] = __half2float(half);
  of_bfloat16[i] = __bfloat162float(bfloat16);
}

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
};

template <typename... Parameters, typename... Arguments>
const char* run(const Shape& shape, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t last = cudaGetLastError();
  return last == error && cudaGetLastError() == cudaSuccess ? cudaGetErrorString(error)
                                                            : "another error was the last one";
}

}  // namespace

// Each returns what cudaGetErrorString says.
#define TOY extern "C" __attribute__((visibility("default"))) const char*

TOY toy_sum_blocks(unsigned grid, unsigned block, unsigned shared_bytes, const float* x, float* out,
                   bool barrier) {
  const Shape shape{{grid}, {block}, shared_bytes};
  return run(shape, barrier ? sum_blocks<true> : sum_blocks<false>, x, out);
}
TOY toy_relay(unsigned grid, unsigned block, unsigned* counters, float* values, unsigned items,
              unsigned passes, bool acquires) {
  return run({{grid}, {block}, 4}, relay, counters, values, items, passes, acquires);
}
TOY toy_share_in_warp(unsigned block, const double* x, double* out, bool sync) {
  const Shape shape{{1}, {block}, block / kWarp * sizeof(double)};
  return run(shape, sync ? share_in_warp<true> : share_in_warp<false>, x, out);
}
TOY toy_end_early(unsigned block, float* out) {
  return run({{1}, {block}, block / 2 * sizeof(float)}, end_early, out);
}
TOY toy_indices(unsigned grid_x, unsigned grid_y, unsigned block_x, unsigned block_y, int* out) {
  return run({{grid_x, grid_y}, {block_x, block_y}, 0}, indices, out);
}
TOY toy_read_shared(unsigned block, unsigned shared_bytes, float* out, unsigned index) {
  return run({{1}, {block}, shared_bytes}, read_shared, out, index);
}
TOY toy_one_place(unsigned grid, unsigned block, float* out) {
  return run({{grid}, {block}, 0}, one_place, out);
}
TOY toy_copy_vectors(unsigned block, const float* x, float* out) {
  return run({{1}, {block}, 0}, copy_vectors, x, out);
}
TOY toy_wait_forever(unsigned* flag, bool sleeps) {
  return run({{3}, {64}, 0}, wait_forever, flag, sleeps);
}
TOY toy_half_at_shuffle() { return run({{1}, {64}, 0}, half_at_shuffle); }
TOY toy_split_warp() { return run({{1}, {64}, 0}, split_warp); }
TOY toy_shuffle_in_half_warp() { return run({{1}, {48}, 0}, shuffle_in_half_warp); }
TOY toy_name_half_warp() { return run({{1}, {32}, 0}, name_half_warp); }
TOY toy_convert(unsigned grid, const float* from, uint16_t* to_half, uint16_t* to_bfloat16) {
  return run({{grid}, {64}, 0}, convert, from, to_half, to_bfloat16);
}
TOY toy_widen(unsigned grid, const uint16_t* from, float* of_half, float* of_bfloat16) {
  return run({{grid}, {64}, 0}, widen, from, of_half, of_bfloat16);
}
