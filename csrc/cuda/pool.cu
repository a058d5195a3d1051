// Phase 1, pool: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

template <typename T>
void pool(const Context& context, Form form, const PoolArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(context, pool_kernel<T, nhwc(), radix(), vector(), prologue()>,
           pool_launch(args.tiling, args.blocks, nhwc(), sizeof(Acc<T>)), args);
  });
}

template <typename A>
void pool_finish(const Context& context, const PoolFinishArgs<A>& args) {
  launch(context, pool_finish_kernel<A>,
         pool_finish_launch(context.device, args.batch, args.channels), args);
}

template <typename T>
void pool_backward(const Context& context, Form form, const PoolBackwardArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(context, pool_backward_kernel<T, nhwc(), radix(), vector(), prologue()>,
           pool_backward_launch(args.tiling, args.blocks, nhwc(), prologue(), sizeof(Acc<T>)),
           args);
  });
}

template <typename A>
void pool_backward_finish(const Context& context, const PoolBackwardFinishArgs<A>& args) {
  launch(context, pool_backward_finish_kernel<A>,
         pool_backward_finish_launch(context.device, args.batch, args.channels), args);
}

#define RF_INSTANTIATE(T)                                          \
  template void pool<T>(const Context&, Form, const PoolArgs<T>&); \
  template void pool_backward<T>(const Context&, Form, const PoolBackwardArgs<T>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(__half)
RF_INSTANTIATE(__nv_bfloat16)
#undef RF_INSTANTIATE

#define RF_INSTANTIATE(A)                                                 \
  template void pool_finish<A>(const Context&, const PoolFinishArgs<A>&); \
  template void pool_backward_finish<A>(const Context&, const PoolBackwardFinishArgs<A>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
