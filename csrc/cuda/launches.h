// The kernels' launches, by phase: each picks the kernel compiled for the call.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/launch.h"
#include "cuda/on_chip.cuh"
#include "cuda/pool.cuh"
#include "cuda/prologue.cuh"
#include "cuda/recombine.cuh"
#include "cuda/running.cuh"

namespace resnest_fused::cuda {

// Which of a map's kernels runs, beside radix and vector.
struct Form {
  bool nhwc;
  bool prologue;
};

// Phase 1 and the prologue.
template <typename A>
void prepare(cudaStream_t stream, const Launch& planned, const Prepare<A>& args);
template <typename T>
void statistics(cudaStream_t stream, const Launch& planned, bool nhwc,
                const StatisticsArgs<T>& args);
template <typename A>
void combine(cudaStream_t stream, const Launch& planned, const CombineArgs<A>& args);
template <typename A>
void prologue_backward(cudaStream_t stream, const Launch& planned,
                       const PrologueBackwardArgs<A>& args);
template <typename T>
void pool(cudaStream_t stream, const Launch& planned, Form form, const PoolArgs<T>& args);
template <typename T>
void pool_backward(cudaStream_t stream, const Launch& planned, Form form,
                   const PoolBackwardArgs<T>& args);

// Phase 2.
template <typename A>
void attention(cudaStream_t stream, const Launch& planned, const AttentionArgs<A>& args);
template <typename A>
void attention_backward(cudaStream_t stream, const Launch& planned,
                        const AttentionBackwardArgs<A>& args);

// Phase 3.
template <typename T>
void recombine(cudaStream_t stream, const Launch& planned, Form form, const RecombineArgs<T>& args);
template <typename T>
void recombine_backward(cudaStream_t stream, const Launch& planned, Form form,
                        const RecombineBackwardArgs<T>& args);

// All phases of an evaluation.
template <typename T>
void on_chip(cudaStream_t stream, const Launch& planned, Form form, const OnChipArgs<T>& args);

// After a forward.
template <typename A>
void update_running_statistics(cudaStream_t stream, const Launch& planned,
                               const RunningArgs<A>& args);

}  // namespace resnest_fused::cuda
