// Phase 1, pool: launches.
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace resnest_fused::cuda {
namespace {

int64_t elementwise_blocks(const Context& context, int64_t count) {
  return ceil_div(count, map_threads(context.device));
}

}  // namespace

template <typename T>
void pool(const Context& context, Form form, const PoolArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(context, "pool", pool_kernel<T, nhwc(), radix(), vector(), prologue()>, args.blocks,
           args.tiling.threads, share_sums_bytes(args.tiling, nhwc(), 1, sizeof(Acc<T>)), args);
  });
}

template <typename A>
void pool_finish(const Context& context, const PoolFinishArgs<A>& args) {
  launch(context, "pool_finish", pool_finish_kernel<A>,
         elementwise_blocks(context, args.batch * args.channels), map_threads(context.device), 0,
         args);
}

template <typename T>
void pool_backward(const Context& context, Form form, const PoolBackwardArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(context, "pool_backward", pool_backward_kernel<T, nhwc(), radix(), vector(), prologue()>,
           args.blocks, args.tiling.threads,
           share_sums_bytes(args.tiling, nhwc(), prologue() ? kPrologueSums : 1, sizeof(Acc<T>)),
           args);
  });
}

template <typename A>
void pool_backward_finish(const Context& context, const PoolBackwardFinishArgs<A>& args) {
  launch(context, "pool_backward_finish", pool_backward_finish_kernel<A>,
         elementwise_blocks(context, args.batch * args.channels), map_threads(context.device), 0,
         args);
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
