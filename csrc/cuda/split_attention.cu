// All phases on CUDA: what each of the planned launches is given.
#include "cuda/run.h"
#include "kernels.h"

namespace resnest_fused::cuda {
namespace {

FcSizes fc_sizes(const Workload& w) {
  return {w.radix, w.channels, w.inter, w.channels / w.cardinality, w.inter / w.cardinality};
}

[[noreturn]] void refuse(const Launch& planned) {
  throw std::logic_error(std::string("resnest_fused: kernel ") + planned.name +
                         " is not of this pass");
}

template <typename T>
void forward(const Context& context, const Map& map, const Mlp& mlp, const Tensor& out,
             const TrainResults* train) {
  using A = Acc<T>;
  Workload w = workload_of(map, train ? Pass::kTrain : Pass::kEval, {&map.x, &out});
  w.bn1_batch_stats = mlp.bn1.batch_stats;
  const Plan plan = make_plan(context.device, w);
  const ForwardWorkspace space(context.device, w, plan);
  const Run<T> run(context, map, w, plan, plan.workspace_bytes);
  const cudaStream_t stream = context.stream;
  const Tiling& tiling = plan.tiling;

  const FcSizes sizes = fc_sizes(w);
  const Prologue<A> prologue = run.prologue_at(space.prologue, false);
  Norm<A> bn0 = norm_of<A>(map.bn0);
  if (w.batch_stats) {
    bn0.mean = parameter(train->bn0_mean);
    bn0.var = parameter(train->bn0_var);
  }
  const Norm<A> bn1 = norm_of<A>(mlp.bn1);
  const bool whole = tiling.chunks == 1;  // the pool's sums are over all pixels
  const A per_pixel = A(1) / static_cast<A>(w.pixels);
  A* const gap = train ? data<A>(train->gap) : run.at(space.gap);
  A* const partial = run.at(space.partial);
  A* const hidden = train ? data<A>(train->hidden) : nullptr;
  A* const u = run.at(space.u);
  A* const attention = train ? data<A>(train->attention) : run.at(space.attention);

  for (const Launch& step : launches_of(context.device, w, plan)) {
    switch (step.kernel) {
      case Kernel::kStatistics:
        run.take_statistics(step, run.at(space.statistics));
        break;
      case Kernel::kCombine:
        run.combine(step, run.at(space.statistics), train->bn0_mean, train->bn0_var);
        break;
      case Kernel::kPool:
        pool<T>(stream, step, run.form,
                {run.sizes, tiling, step.blocks, const_data<T>(map.x), bn0, prologue,
                 whole ? per_pixel : A(1), whole ? gap : partial,
                 run.template at<unsigned>(space.counters)});
        break;
      case Kernel::kAttention: {
        const bool normalises = w.bn1_batch_stats;
        cuda::attention<A>(
            stream, step,
            {run.stages(forward_items(context.device, w, plan), space.counters),
             {w.batch, tiling.chunks, w.channels, partial, per_pixel, gap},
             {sizes, w.batch, gap, parameter(mlp.fc1_weight), parameter(mlp.fc1_bias), bn1, hidden,
              normalises ? nullptr : u},
             {{w.batch, w.inter, hidden, nullptr, 1, 1, 1,
               std::max(static_cast<double>(w.batch), 1.0)},
              bn1,
              normalises ? data<A>(train->bn1_mean) : nullptr,
              normalises ? data<A>(train->bn1_var) : nullptr,
              u},
             {sizes, w.batch, u, parameter(mlp.fc2_weight), parameter(mlp.fc2_bias), attention}});
        break;
      }
      case Kernel::kRecombine:
        recombine<T>(stream, step, run.form,
                     {run.sizes, plan.recombine_tiling, step.blocks, const_data<T>(map.x), prologue,
                      attention, data<T>(out)});
        break;
      case Kernel::kOnChip:
        if constexpr (!std::is_same_v<T, double>) {
          on_chip<T>(stream, step, run.form,
                     {run.sizes, tiling, plan.on_chip, sizes, w.batch, const_data<T>(map.x), bn0,
                      per_pixel, parameter(mlp.fc1_weight), parameter(mlp.fc1_bias), bn1,
                      parameter(mlp.fc2_weight), parameter(mlp.fc2_bias), data<T>(out)});
          break;
        }
        [[fallthrough]];
      default:
        refuse(step);
    }
  }
}

template <typename T>
void backward(const Context& context, const Map& map, const Mlp& mlp, const Tensor& dout,
              const SavedArguments& saved, const GradientResults& grads) {
  using A = Acc<T>;
  const Tensor& dx = is_needed(grads.dx) ? grads.dx : dout;
  Workload w = workload_of(map, Pass::kBackward, {&map.x, &dout, &dx, &saved.attention});
  w.bn1_batch_stats = mlp.bn1.batch_stats;
  const bool dx_loses = w.batch_stats && is_needed(grads.dx);
  w.wanted = {
      is_needed(grads.dx), dx_loses || is_needed(grads.dbn0_weight) || is_needed(grads.dbn0_bias),
      is_needed(grads.dfc1_weight), is_needed(grads.dfc2_weight), is_needed(grads.dfc2_bias)};
  const Plan plan = make_plan(context.device, w);
  const BackwardWorkspace space(w, plan);
  const Run<T> run(context, map, w, plan, space.bytes);
  const cudaStream_t stream = context.stream;
  const FcSizes sizes = fc_sizes(w);
  const Prologue<A> prologue = run.prologue_at(space.prologue, dx_loses);
  const Norm<A> bn0 = norm_of<A>(map.bn0);
  A* const sums = run.at(space.sums);
  A* const dlogits = run.at(space.dlogits);
  A* const dhidden = run.at(space.dhidden);
  A* const u = run.at(space.u);
  A* const dgap = w.wanted.x || w.wanted.bn0 ? run.at(space.dgap) : nullptr;

  for (const Launch& step : launches_of(context.device, w, plan)) {
    switch (step.kernel) {
      case Kernel::kPoolBackward:
        pool_backward<T>(
            stream, step, run.form,
            {run.sizes, plan.tiling, step.blocks, const_data<T>(dout), const_data<T>(map.x), bn0,
             prologue, run.at(space.partial), run.template at<unsigned>(space.counters)});
        break;
      case Kernel::kAttentionBackward:
        attention_backward<A>(
            stream, step,
            {run.stages(backward_items(context.device, w), space.counters),
             {w.batch, plan.tiling.chunks, w.radix, w.channels, sizes.group_channels, w.relu,
              run.at(space.partial), bn0, prologue.invstd, sums, run.at(space.dattention),
              const_data<A>(saved.attention), dlogits},
             {sizes, w.batch, dlogits, parameter(mlp.fc2_weight), dhidden},
             {w.batch, w.inter, mlp.bn1.batch_stats, norm_of<A>(mlp.bn1),
              const_data<A>(saved.hidden), dhidden, u, result(grads.dbn1_weight),
              result(grads.dbn1_bias), result(grads.dfc1_bias)},
             {sizes, w.batch, const_data<A>(saved.gap), u, dlogits, dhidden,
              parameter(mlp.fc1_weight), result(grads.dfc1_weight), result(grads.dfc2_weight),
              result(grads.dfc2_bias), dgap},
             {w.batch, w.radix, w.channels, static_cast<double>(w.pixels), sums,
              const_data<A>(saved.attention), dgap, result(grads.dbn0_weight),
              result(grads.dbn0_bias), prologue}});
        break;
      case Kernel::kRecombineBackward:
        recombine_backward<T>(stream, step, run.form,
                              {run.sizes, plan.recombine_tiling, step.blocks, const_data<T>(dout),
                               const_data<T>(map.x), prologue, const_data<A>(saved.attention), dgap,
                               A(1) / static_cast<A>(w.pixels), data<T>(dx)});
        break;
      default:
        refuse(step);
    }
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
