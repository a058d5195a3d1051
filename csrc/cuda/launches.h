// The kernels' launches, by phase: each picks the kernel compiled for the call and its grid.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/launch.h"
#include "cuda/pool.cuh"
#include "cuda/prologue.cuh"
#include "cuda/recombine.cuh"

namespace resnest_fused::cuda {

// What decides which of a map's kernels runs, beside radix and vector.
struct Form {
  bool nhwc;
  bool prologue;
};

// Phase 1 and the prologue.
template <typename A>
void prepare(const Context& context, const Prepare<A>& args);
template <typename T>
void statistics(const Context& context, bool nhwc, const StatisticsArgs<T>& args);
template <typename A>
void combine(const Context& context, const CombineArgs<A>& args);
template <typename A>
void prologue_backward(const Context& context, const PrologueBackwardArgs<A>& args);
template <typename T>
void pool(const Context& context, Form form, const PoolArgs<T>& args);
template <typename A>
void pool_finish(const Context& context, const PoolFinishArgs<A>& args);
template <typename T>
void pool_backward(const Context& context, Form form, const PoolBackwardArgs<T>& args);
template <typename A>
void pool_backward_finish(const Context& context, const PoolBackwardFinishArgs<A>& args);

// Phase 2.
template <typename A>
void hidden(const Context& context, const Plan& plan, const HiddenArgs<A>& args);
template <typename A>
void batch_norm(const Context& context, const Plan& plan, const BatchNormArgs<A>& args);
template <typename A>
void attention(const Context& context, const Plan& plan, const AttentionArgs<A>& args);
template <typename A>
void hidden_gradient(const Context& context, const Plan& plan, const HiddenGradientArgs<A>& args);
template <typename A>
void batch_norm_backward(const Context& context, const Plan& plan,
                         const BatchNormBackwardArgs<A>& args);
// Fills in the blocks of what is wanted.
template <typename A>
void gradients(const Context& context, const Plan& plan, GradientsArgs<A> args);

// Phase 3.
template <typename T>
void recombine(const Context& context, Form form, const RecombineArgs<T>& args);
template <typename T>
void recombine_backward(const Context& context, Form form, const RecombineBackwardArgs<T>& args);

// All phases at once.
template <typename T>
struct PersistentArgs;
template <typename T>
void persistent(const Context& context, const Plan& plan, Form form, const PersistentArgs<T>& args);

}  // namespace resnest_fused::cuda
