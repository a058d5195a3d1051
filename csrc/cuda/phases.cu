// Single phases on CUDA: what each of their launches is given.
#include "cuda/run.h"
#include "kernels.h"

namespace resnest_fused::cuda {

void Kernels::batch_statistics(const Map& map, const Tensor& mean, const Tensor& var) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Workload w = workload_of(map, Pass::kTrain, {&map.x});
    const int64_t rows = statistics_rows(context.device, w);
    const Run<T> run(context, map, w, make_plan(context.device, w),
                     2 * rows * w.features() * w.acc_size());
    run.take_statistics(run.of(Kernel::kStatistics), run.at(0));
    run.combine(run.of(Kernel::kCombine), run.at(0), mean, var);
  });
}

void Kernels::pool(const Map& map, const Tensor& gap) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const Workload w = workload_of(map, Pass::kTrain, {&map.x});
    const Plan plan = make_plan(context.device, w);
    const ForwardWorkspace space(context.device, w, plan);
    const Run<T> run(context, map, w, plan, space.bytes);
    const int64_t chunks = plan.tiling.chunks;
    A* const partial = chunks == 1 ? data<A>(gap) : run.at(space.partial);
    const A per_pixel = A(1) / static_cast<A>(w.pixels);
    const Launch planned = run.of(Kernel::kPool);
    cuda::pool<T>(context.stream, planned, run.form,
                  {run.sizes,
                   plan.tiling,
                   planned.blocks,
                   const_data<T>(map.x),
                   norm_of<A>(map.bn0),
                   {},
                   chunks == 1 ? per_pixel : A(1),
                   partial,
                   run.template at<unsigned>(space.counters)});
    if (chunks > 1) {
      ForwardItems items{};
      items[ForwardStage::kGap] = sample_channel_items(context.device, w);
      AttentionArgs<A> args{};
      args.stages = run.stages(items, space.counters);
      args.gap = {w.batch, chunks, w.channels, partial, per_pixel, data<A>(gap)};
      cuda::attention<A>(context.stream,
                         launch_of_stages(context.device, w, Kernel::kAttention, items), args);
    }
  });
}

void Kernels::recombine(const Map& map, const Tensor& attention, const Tensor& out) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const Workload w = workload_of(map, Pass::kTrain, {&map.x, &attention, &out});
    const Run<T> run(context, map, w, make_plan(context.device, w),
                     kPrologueArrays * w.features() * w.acc_size());
    const Prologue<A> prologue = run.prologue_at(0, false);
    const Launch planned = run.of(Kernel::kRecombine);
    run.prepare(run.of(Kernel::kPrepare), prologue);
    cuda::recombine<T>(context.stream, planned, run.form,
                       {run.sizes, run.plan.recombine_tiling, planned.blocks, const_data<T>(map.x),
                        prologue, const_data<A>(attention), data<T>(out)});
  });
}

void Kernels::pool_backward(const Map& map, const Tensor& dout, const Tensor& dattention,
                            const Tensor& sums) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const Workload w = workload_of(map, Pass::kBackward, {&map.x, &dout});
    const Plan plan = make_plan(context.device, w);
    const int64_t chunks = plan.tiling.chunks, kinds = w.relu ? kPrologueSums : 1;
    Workspace space;
    const int64_t counters = space.take(kCounters, sizeof(unsigned));
    const int64_t parameters = space.take(kPrologueArrays * w.features(), w.acc_size());
    const int64_t partial = space.take(w.batch * chunks * kinds * w.features(), w.acc_size());
    const Run<T> run(context, map, w, plan, space.bytes);
    const Prologue<A> prologue = run.prologue_at(parameters, false);
    const Norm<A> bn0 = norm_of<A>(map.bn0);
    const Launch planned = run.of(Kernel::kPoolBackward);
    cuda::pool_backward<T>(
        context.stream, planned, run.form,
        {run.sizes, plan.tiling, planned.blocks, const_data<T>(dout), const_data<T>(map.x), bn0,
         prologue, run.at(partial), run.template at<unsigned>(counters)});
    BackwardItems items{};
    items[BackwardStage::kLogits] = sample_channel_items(context.device, w);
    AttentionBackwardArgs<A> args{};
    args.stages = run.stages(items, counters);
    args.logits = {
        w.batch,         chunks, w.radix,         w.channels,    w.channels,          w.relu,
        run.at(partial), bn0,    prologue.invstd, data<A>(sums), data<A>(dattention), nullptr,
        nullptr};
    attention_backward<A>(context.stream,
                          launch_of_stages(context.device, w, Kernel::kAttentionBackward, items),
                          args);
  });
}

void Kernels::prologue_backward(const Problem& problem, const Tensor& sums, const Tensor& attention,
                                const Tensor& dgap, const Tensor& dweight, const Tensor& dbias) {
  const Context context = context_of(sums);
  for_dtype(problem.dtype, [&](auto tag) {
    using A = Acc<decltype(tag)>;
    Workload w{};
    w.batch = problem.batch;
    w.radix = problem.radix;
    w.channels = problem.channels;
    const Launch planned = launch_of(context.device, w, {}, Kernel::kPrologueBackward);
    cuda::prologue_backward<A>(context.stream, planned,
                               {problem.batch,
                                problem.radix,
                                problem.channels,
                                static_cast<double>(problem.pixels()),
                                const_data<A>(sums),
                                const_data<A>(attention),
                                const_data<A>(dgap),
                                result(dweight),
                                result(dbias),
                                {}});
  });
}

void Kernels::recombine_backward(const Map& map, const Tensor& dout, const Tensor& attention,
                                 const Tensor& dgap, const std::optional<Tensor>& mean_dz,
                                 const std::optional<Tensor>& mean_dz_xhat, const Tensor& dx) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const Workload w = workload_of(map, Pass::kBackward, {&map.x, &dout, &attention, &dgap, &dx});
    const Run<T> run(context, map, w, make_plan(context.device, w),
                     kPrologueArrays * w.features() * w.acc_size());
    const bool loses = mean_dz.has_value();
    const Prologue<A> prologue = run.prologue_at(0, loses);
    const Launch planned = run.of(Kernel::kRecombineBackward);
    run.prepare(run.of(Kernel::kPrepare), prologue, loses ? const_data<A>(*mean_dz) : nullptr,
                loses ? const_data<A>(*mean_dz_xhat) : nullptr);
    cuda::recombine_backward<T>(
        context.stream, planned, run.form,
        {run.sizes, run.plan.recombine_tiling, planned.blocks, const_data<T>(dout),
         const_data<T>(map.x), prologue, const_data<A>(attention), const_data<A>(dgap),
         A(1) / static_cast<A>(w.pixels), data<T>(dx)});
  });
}

void Kernels::update_running_statistics(const Tensor& x, const Running (&norms)[2]) {
  const auto norm_of = [](const Running& norm) -> RunningNorm {
    const bool counts = norm.num_batches_tracked.has_value();
    const auto values = [](const std::optional<Tensor>& running, const std::optional<Tensor>& batch,
                           double correction) -> RunningValues {
      return {parameter(running), result(*running), parameter(batch), correction};
    };
    const bool runs = norm.features > 0 && norm.elements > 0;
    return {runs ? norm.features : 0,
            runs ? values(norm.running_mean, norm.mean, 1.0) : RunningValues{},
            runs ? values(norm.running_var, norm.var, norm.correction()) : RunningValues{},
            counts ? data<int64_t>(*norm.num_batches_tracked) : nullptr,
            norm.momentum.value_or(0),
            !norm.momentum.has_value()};
  };
  const Context context = context_of(x);
  for_dtype(x.scalar_type(), [&](auto tag) {
    const Launch planned = launch_of(context.device, {}, {}, Kernel::kUpdateRunningStatistics);
    cuda::update_running_statistics<Acc<decltype(tag)>>(context.stream, planned,
                                                        {{norm_of(norms[0]), norm_of(norms[1])}});
  });
}

}  // namespace resnest_fused::cuda
