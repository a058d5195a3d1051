// The prologue: launches.
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace resnest_fused::cuda {
namespace {

int64_t column_threads(const Context& context) { return map_threads(context.device); }

}  // namespace

template <typename A>
void prepare(const Context& context, const Prepare<A>& args) {
  const int64_t threads = map_threads(context.device);
  launch(context, "prepare", prepare_kernel<A>,
         ceil_div(std::max(args.prologue.scale ? args.features : 0, args.counter_count), threads),
         threads, 0, args);
}

template <typename T>
void statistics(const Context& context, bool nhwc, const StatisticsArgs<T>& args) {
  for_layout<T>(nhwc, args.tiling, [&](auto is_nhwc, auto vector) {
    launch(context, "statistics", statistics_kernel<T, is_nhwc(), vector()>, args.blocks,
           args.tiling.threads, share_sums_bytes(args.tiling, is_nhwc(), 2, sizeof(Acc<T>)), args);
  });
}

template <typename A>
void combine(const Context& context, const CombineArgs<A>& args) {
  launch(context, "combine", combine_kernel<A>, ceil_div(args.partial.features, kColumns),
         column_threads(context), row_sums_bytes(column_threads(context), 1), args);
}

template <typename A>
void prologue_backward(const Context& context, const PrologueBackwardArgs<A>& args) {
  launch(context, "prologue_backward", prologue_backward_kernel<A>,
         ceil_div(args.radix * args.channels, kColumns), column_threads(context),
         row_sums_bytes(column_threads(context), 2), args);
}

#define RF_INSTANTIATE(T) \
  template void statistics<T>(const Context&, bool, const StatisticsArgs<T>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(__half)
RF_INSTANTIATE(__nv_bfloat16)
#undef RF_INSTANTIATE

#define RF_INSTANTIATE(A)                                          \
  template void prepare<A>(const Context&, const Prepare<A>&);     \
  template void combine<A>(const Context&, const CombineArgs<A>&); \
  template void prologue_backward<A>(const Context&, const PrologueBackwardArgs<A>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
