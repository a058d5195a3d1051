// All phases on CUDA: the order of the launches.
#include "cuda/kernels.h"
#include "cuda/persistent.cuh"
#include "cuda/run.h"

namespace resnest_fused::cuda {
namespace {

FcSizes fc_sizes(const Workload& w) { return {w.radix, w.cardinality, w.channels, w.inter}; }

// What the forward passes from phase to phase for samples [first, first + samples): the arrays of
// training start at the batch's first sample, those of the workspace at the group's.
template <typename T>
struct Forward {
  using A = Acc<T>;

  Forward(const Run<T>& run, const Plan& plan, const ForwardWorkspace& space, const Mlp& mlp,
          const TrainResults* train, const Prologue<A>& prologue, const Tensor& out, int64_t first,
          int64_t samples)
      : run(run), plan(plan), train(train), samples(samples) {
    const Workload& w = run.work;
    const Tiling& tiling = plan.tiling;
    const int64_t map_of_sample = w.channels * w.pixels;
    const T* const x = const_data<T>(run.map.x) + first * w.radix * map_of_sample;
    const A per_pixel = A(1) / static_cast<A>(w.pixels);
    const bool whole = tiling.chunks == 1;  // the pool's sums are over all pixels
    A* const gap = train ? data<A>(train->gap) : nullptr;
    A* const partial = whole && train ? gap : run.at(space.partial);
    A* const a = train ? data<A>(train->attention) : run.at(space.attention);
    A* const u = run.at(space.u);
    const bool bn1_of_batch = mlp.bn1.batch_stats;
    pool = {run.sizes, tiling, run.blocks(samples), x, prologue, whole ? per_pixel : A(1), partial};
    finish = {samples, tiling.chunks, w.channels, partial, per_pixel, gap};
    const Pooled<A> pooled = whole || train
                                 ? Pooled<A>{whole ? partial : gap, 1, w.channels, A(1)}
                                 : Pooled<A>{partial, tiling.chunks, w.channels, per_pixel};
    hidden = {fc_sizes(w),
              samples,
              hidden_blocks(w, samples),
              pooled,
              parameter(mlp.fc1_weight),
              parameter(mlp.fc1_bias),
              norm_of<A>(mlp.bn1),
              train ? data<A>(train->hidden) : nullptr,
              bn1_of_batch ? nullptr : u};
    if (bn1_of_batch) {
      batch_norm = {{samples, w.inter, hidden.hidden, nullptr, 1, 1},
                    hidden.bn1,
                    data<A>(train->bn1_mean),
                    data<A>(train->bn1_var),
                    u};
    }
    attention = {fc_sizes(w),
                 samples,
                 attention_blocks(w, samples),
                 u,
                 parameter(mlp.fc2_weight),
                 parameter(mlp.fc2_bias),
                 a};
    recombine = {run.sizes,
                 tiling,
                 run.blocks(samples),
                 x,
                 prologue,
                 a,
                 data<T>(out) + first * map_of_sample};
  }

  // One launch after the other.
  void by_launches() const {
    cuda::pool<T>(run.context, run.form, pool);
    if (train && plan.tiling.chunks > 1) {
      pool_finish<A>(run.context, finish);
    }
    cuda::hidden<A>(run.context, plan, hidden);
    if (batch_norm.u) {
      cuda::batch_norm<A>(run.context, plan, batch_norm);
    }
    cuda::attention<A>(run.context, plan, attention);
    cuda::recombine<T>(run.context, run.form, recombine);
  }

  // All at once.
  void persistently(unsigned* counters) const {
    const Workload& w = run.work;
    if constexpr (sizeof(T) < 8) {
      persistent<T>(run.context, plan, run.form,
                    {pool, hidden, attention, recombine, w.batch, plan.group, plan.groups(w.batch),
                     run.blocks(plan.group), hidden_blocks(w, plan.group),
                     attention_blocks(w, plan.group), counters});
    }
  }

  const Run<T>& run;
  const Plan& plan;
  const TrainResults* train;
  int64_t samples;
  PoolArgs<T> pool;
  PoolFinishArgs<A> finish;
  HiddenArgs<A> hidden;
  BatchNormArgs<A> batch_norm{};
  AttentionArgs<A> attention;
  RecombineArgs<T> recombine;
};

template <typename T>
void forward(const Context& context, const Map& map, const Mlp& mlp, const Tensor& out,
             const TrainResults* train) {
  using A = Acc<T>;
  Workload w = workload_of(map, train ? Pass::kTrain : Pass::kEval, {&map.x, &out});
  w.bn1_batch_stats = mlp.bn1.batch_stats;
  const Plan plan = make_plan(context.device, w, context.choice);
  const ForwardWorkspace space(context.device, w, plan);
  const Run<T> run(context, map, w, space.bytes);
  const Prologue<A> prologue = run.prologue_at(space.prologue, false);
  unsigned* const counters = run.template at<unsigned>(space.counters);
  if (w.batch_stats) {
    run.take_statistics(run.at(space.statistics), prologue, train->bn0_mean, train->bn0_var);
  } else {
    run.prepare(prologue, nullptr, nullptr, counters, space.counter_count);
  }
  const auto group = [&](int64_t first, int64_t samples) {
    return Forward<T>(run, plan, space, mlp, train, prologue, out, first, samples);
  };
  if (plan.strategy == Strategy::kPersistent) {
    group(0, w.batch).persistently(counters);
    return;
  }
  for (int64_t first = 0; first < std::max<int64_t>(w.batch, 1); first += plan.group) {
    group(first, std::min(plan.group, w.batch - first)).by_launches();
  }
}

template <typename T>
void backward(const Context& context, const Map& map, const Mlp& mlp, const Tensor& dout,
              const SavedArguments& saved, const GradientResults& grads) {
  using A = Acc<T>;
  const Tensor& dx = is_needed(grads.dx) ? grads.dx : dout;
  const Workload w = workload_of(map, Pass::kBackward, {&map.x, &dout, &dx, &saved.attention});
  const Plan plan = make_plan(context.device, w);
  const BackwardWorkspace space(w, plan);
  const Run<T> run(context, map, w, space.bytes);
  const FcSizes sizes = fc_sizes(w);
  const bool dx_loses = w.batch_stats && is_needed(grads.dx);
  const Prologue<A> prologue = run.prologue_at(space.prologue, dx_loses);
  run.prepare(prologue);

  pool_backward<T>(context, run.form,
                   {run.sizes, plan.tiling, run.blocks(w.batch), const_data<T>(dout),
                    const_data<T>(map.x), prologue, run.at(space.partial)});
  pool_backward_finish<A>(
      context,
      {w.batch, plan.tiling.chunks, w.radix, w.channels, w.channels / w.cardinality, w.relu,
       run.at(space.partial), norm_of<A>(map.bn0), prologue.invstd, run.at(space.sums),
       run.at(space.dattention), const_data<A>(saved.attention), run.at(space.dlogits)});

  const bool needs_bn0 = dx_loses || is_needed(grads.dbn0_weight) || is_needed(grads.dbn0_bias);
  A* const dhidden = run.at(space.dhidden);
  hidden_gradient<A>(context, plan,
                     {sizes, w.batch, hidden_blocks(w, w.batch), run.at(space.dlogits),
                      parameter(mlp.fc2_weight), dhidden});
  batch_norm_backward<A>(
      context, plan,
      {w.batch, w.inter, mlp.bn1.batch_stats, norm_of<A>(mlp.bn1), const_data<A>(saved.hidden),
       dhidden, run.at(space.u), result(grads.dbn1_weight), result(grads.dbn1_bias),
       result(grads.dfc1_bias)});
  GradientsArgs<A> products{};
  products.sizes = sizes;
  products.batch = w.batch;
  products.gap = const_data<A>(saved.gap);
  products.u = run.at(space.u);
  products.dlogits = run.at(space.dlogits);
  products.dhidden = dhidden;
  products.fc1_weight = parameter(mlp.fc1_weight);
  products.dfc1_weight = result(grads.dfc1_weight);
  products.dfc2_weight = result(grads.dfc2_weight);
  products.dfc2_bias = result(grads.dfc2_bias);
  products.dgap = is_needed(grads.dx) || needs_bn0 ? run.at(space.dgap) : nullptr;
  gradients<A>(context, plan, products);

  if (needs_bn0) {
    prologue_backward<A>(
        context, {w.batch, w.radix, w.channels, static_cast<double>(w.pixels), run.at(space.sums),
                  const_data<A>(saved.attention), run.at(space.dgap), result(grads.dbn0_weight),
                  result(grads.dbn0_bias), prologue});
  }
  if (is_needed(grads.dx)) {
    recombine_backward<T>(context, run.form,
                          {run.sizes, plan.tiling, run.blocks(w.batch), const_data<T>(dout),
                           const_data<T>(map.x), prologue, const_data<A>(saved.attention),
                           run.at(space.dgap), A(1) / static_cast<A>(w.pixels), data<T>(dx)});
  }
}

}  // namespace

void Kernels::forward(const Map& map, const Mlp& mlp, const Tensor& out,
                      const TrainResults* train) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype,
            [&](auto tag) { cuda::forward<decltype(tag)>(context, map, mlp, out, train); });
}

void Kernels::backward(const Map& map, const Mlp& mlp, const Tensor& dout,
                       const SavedArguments& saved, const GradientResults& grads) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    cuda::backward<decltype(tag)>(context, map, mlp, dout, saved, grads);
  });
}

}  // namespace resnest_fused::cuda
