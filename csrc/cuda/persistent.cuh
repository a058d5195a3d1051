// Evaluation in one launch: blocks take tickets for pieces of all phases. So recombine finds in L2
// what the pool has read, and no block waits for a launch.
//
// Samples go through the phases in batch chunks. The tickets of step s are, in their order, for
//   pool of chunk s,  recombine of chunk s - 2,  attention of chunk s - 1,  hidden of chunk s.
// A piece waits for the whole phase before it of its own chunk, all of which have lower tickets.
// Tickets are taken in order by blocks that run: the lowest unfinished one never waits in vain,
// however many blocks are resident.
//
// Bytes: R units read from device memory and R from L2, 1 written.
#pragma once

#include <cuda/atomic>

#include "cuda/attention.cuh"
#include "cuda/recombine.cuh"

namespace resnest_fused::cuda {

template <typename T>
struct PersistentArgs {
  PoolArgs<T> pool;
  HiddenArgs<Acc<T>> hidden;
  AttentionArgs<Acc<T>> attention;
  RecombineArgs<T> recombine;
  int64_t batch;
  int64_t batch_chunk;  // samples
  int64_t batch_chunks;
  int64_t map_blocks;        // of a whole chunk
  int64_t hidden_blocks;     // of a whole chunk
  int64_t attention_blocks;  // of a whole chunk
  unsigned* counters;        // (1 + 3 * chunks), zeros: tickets taken; of each chunk, pieces done
};

using Counter = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>;

// Before a piece: wait until all threads of this block can read what `target` pieces have written.
__device__ __forceinline__ void wait_for(unsigned* done, int64_t target) {
  if (threadIdx.x == 0) {
    while (Counter(*done).load(::cuda::memory_order_acquire) < static_cast<unsigned>(target)) {
      __nanosleep(40);
    }
  }
  __syncthreads();
}

// Behind a piece: let those that wait read what all threads of this block have written.
__device__ __forceinline__ void count(unsigned* done) {
  __syncthreads();
  if (threadIdx.x == 0) {
    Counter(*done).fetch_add(1u, ::cuda::memory_order_release);
  }
}

template <typename T, bool kNhwc, int kRadix, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kBlocksPerMultiprocessor)
    persistent_kernel(PersistentArgs<T> args) {
  const int64_t per_step = 2 * args.map_blocks + args.attention_blocks + args.hidden_blocks;
  const int64_t tickets = per_step * (args.batch_chunks + kBatchChunksBetween);
  const int64_t per_sample = args.pool.tiling.channel_blocks * int64_t{args.pool.tiling.chunks};
  const int64_t all_blocks = args.batch * per_sample;
  unsigned* const pooled = args.counters + 1;
  unsigned* const hidden_done = pooled + args.batch_chunks;
  unsigned* const attention_done = hidden_done + args.batch_chunks;
  for (;;) {
    if (threadIdx.x == 0) {
      *shared<unsigned>() = Counter(*args.counters).fetch_add(1u, ::cuda::memory_order_relaxed);
    }
    __syncthreads();
    const int64_t ticket = *shared<unsigned>();
    __syncthreads();
    if (ticket >= tickets) {
      return;
    }
    const int64_t step = ticket / per_step;
    int64_t piece = ticket - step * per_step;
    const auto exists = [&](int64_t chunk) { return chunk >= 0 && chunk < args.batch_chunks; };
    if (piece < args.map_blocks) {
      if (exists(step)) {
        const int64_t block = step * args.map_blocks + piece;
        if (block < all_blocks) {
          pool_block<T, kNhwc, kRadix, kVector, kPrologue>(args.pool, block);
        }
        count(pooled + step);
      }
      continue;
    }
    piece -= args.map_blocks;
    if (piece < args.map_blocks) {
      const int64_t chunk = step - 2;
      const int64_t block = chunk * args.map_blocks + piece;
      if (exists(chunk) && block < all_blocks) {
        wait_for(attention_done + chunk, args.attention_blocks);
        recombine_block<T, kNhwc, kRadix, kVector, kPrologue>(args.recombine, block);
      }
      continue;
    }
    piece -= args.map_blocks;
    const bool is_attention = piece < args.attention_blocks;
    const int64_t chunk = is_attention ? step - 1 : step;
    if (!exists(chunk)) {
      continue;
    }
    const int64_t first = chunk * args.batch_chunk;
    const int64_t samples = min(args.batch_chunk, args.batch - first);
    if (is_attention) {
      wait_for(hidden_done + chunk, args.hidden_blocks);
      AttentionArgs<Acc<T>> of_chunk = args.attention;
      of_chunk.batch = samples;
      of_chunk.u += first * of_chunk.sizes.inter;
      of_chunk.attention += first * of_chunk.sizes.features();
      attention_block(of_chunk, piece);
      count(attention_done + chunk);
    } else {
      piece -= args.attention_blocks;
      wait_for(pooled + chunk, args.map_blocks);
      HiddenArgs<Acc<T>> of_chunk = args.hidden;
      of_chunk.batch = samples;
      of_chunk.gap.partial += first * of_chunk.gap.chunks * of_chunk.gap.channels;
      of_chunk.u += first * of_chunk.sizes.inter;
      hidden_block(of_chunk, piece);
      count(hidden_done + chunk);
    }
  }
}

}  // namespace resnest_fused::cuda
