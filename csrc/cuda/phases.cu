// Single phases on CUDA.
#include "cuda/kernels.h"
#include "cuda/run.h"

namespace resnest_fused::cuda {

void Kernels::batch_statistics(const Map& map, const Tensor& mean, const Tensor& var) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Workload w = workload_of(map, Pass::kTrain, {&map.x});
    const int64_t rows = statistics_map(w).batch * statistics_tiling(context.device, w).chunks;
    const Run<T> run(context, map, w, 2 * rows * w.features() * w.acc_size());
    run.take_statistics(run.at(0), {}, mean, var);
  });
}

void Kernels::pool(const Map& map, const Tensor& gap) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const Workload w = workload_of(map, Pass::kTrain, {&map.x});
    const Tiling tiling = make_tiling(context.device, w);
    const bool whole = tiling.chunks == 1;
    Workspace space;
    const int64_t parameters = space.take(kPrologueArrays * w.features(), w.acc_size());
    const int64_t partial =
        space.take(whole ? 0 : w.batch * tiling.chunks * w.channels, w.acc_size());
    const Run<T> run(context, map, w, space.bytes);
    const Prologue<A> prologue = run.prologue_at(parameters, false);
    const A per_pixel = A(1) / static_cast<A>(w.pixels);
    run.prepare(prologue);
    cuda::pool<T>(context, run.form,
                  {run.sizes, tiling, run.blocks(w.batch), const_data<T>(map.x), prologue,
                   whole ? per_pixel : A(1), whole ? data<A>(gap) : run.at(partial)});
    if (!whole) {
      pool_finish<A>(
          context, {w.batch, tiling.chunks, w.channels, run.at(partial), per_pixel, data<A>(gap)});
    }
  });
}

void Kernels::recombine(const Map& map, const Tensor& attention, const Tensor& out) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const Workload w = workload_of(map, Pass::kTrain, {&map.x, &attention, &out});
    const Run<T> run(context, map, w, kPrologueArrays * w.features() * w.acc_size());
    const Prologue<A> prologue = run.prologue_at(0, false);
    run.prepare(prologue);
    cuda::recombine<T>(context, run.form,
                       {run.sizes, run.tiling, run.blocks(w.batch), const_data<T>(map.x), prologue,
                        const_data<A>(attention), data<T>(out)});
  });
}

void Kernels::pool_backward(const Map& map, const Tensor& dout, const Tensor& dattention,
                            const Tensor& sums) {
  const Context context = context_of(map.x);
  for_dtype(map.problem.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = Acc<T>;
    const Workload w = workload_of(map, Pass::kBackward, {&map.x, &dout});
    const Tiling tiling = make_tiling(context.device, w);
    Workspace space;
    const int64_t parameters = space.take(kPrologueArrays * w.features(), w.acc_size());
    const int64_t kinds = w.relu ? kPrologueSums : 1;
    const int64_t partial =
        space.take(w.batch * tiling.chunks * kinds * w.features(), w.acc_size());
    const Run<T> run(context, map, w, space.bytes);
    const Prologue<A> prologue = run.prologue_at(parameters, false);
    run.prepare(prologue);
    cuda::pool_backward<T>(context, run.form,
                           {run.sizes, tiling, run.blocks(w.batch), const_data<T>(dout),
                            const_data<T>(map.x), prologue, run.at(partial)});
    pool_backward_finish<A>(context, {w.batch, tiling.chunks, w.radix, w.channels, w.channels,
                                      w.relu, run.at(partial), norm_of<A>(map.bn0), prologue.invstd,
                                      data<A>(sums), data<A>(dattention), nullptr, nullptr});
  });
}

void Kernels::prologue_backward(const Problem& problem, const Tensor& sums, const Tensor& attention,
                                const Tensor& dgap, const Tensor& dweight, const Tensor& dbias) {
  const Context context = context_of(sums);
  for_dtype(problem.dtype, [&](auto tag) {
    using A = Acc<decltype(tag)>;
    cuda::prologue_backward<A>(context, {problem.batch,
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
    const Run<T> run(context, map, w, kPrologueArrays * w.features() * w.acc_size());
    const bool loses = mean_dz.has_value();
    const Prologue<A> prologue = run.prologue_at(0, loses);
    run.prepare(prologue, loses ? const_data<A>(*mean_dz) : nullptr,
                loses ? const_data<A>(*mean_dz_xhat) : nullptr);
    cuda::recombine_backward<T>(
        context, run.form,
        {run.sizes, run.tiling, run.blocks(w.batch), const_data<T>(dout), const_data<T>(map.x),
         prologue, const_data<A>(attention), const_data<A>(dgap), A(1) / static_cast<A>(w.pixels),
         data<T>(dx)});
  });
}

}  // namespace resnest_fused::cuda
