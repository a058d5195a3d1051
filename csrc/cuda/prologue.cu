// The prologue: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

template <typename A>
void prepare(const Context& context, const Prepare<A>& args) {
  launch(
      context, prepare_kernel<A>,
      prepare_launch(context.device, args.prologue.scale ? args.features : 0, args.counter_count),
      args);
}

template <typename T>
void statistics(const Context& context, bool nhwc, const StatisticsArgs<T>& args) {
  for_layout<T>(nhwc, args.tiling, [&](auto is_nhwc, auto vector) {
    launch(context, statistics_kernel<T, is_nhwc(), vector()>,
           statistics_launch(args.tiling, args.blocks, is_nhwc(), sizeof(Acc<T>)), args);
  });
}

template <typename A>
void combine(const Context& context, const CombineArgs<A>& args) {
  launch(context, combine_kernel<A>, combine_launch(context.device, args.partial.features), args);
}

template <typename A>
void prologue_backward(const Context& context, const PrologueBackwardArgs<A>& args) {
  launch(context, prologue_backward_kernel<A>,
         prologue_backward_launch(context.device, args.radix * args.channels), args);
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
