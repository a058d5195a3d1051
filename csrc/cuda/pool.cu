// Phase 1, pool: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

template <typename T>
void pool(cudaStream_t stream, const Launch& planned, Form form, const PoolArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(stream, pool_kernel<T, nhwc(), radix(), vector(), prologue()>, planned, args);
  });
}

template <typename A>
void pool_finish(cudaStream_t stream, const Launch& planned, const PoolFinishArgs<A>& args) {
  launch(stream, pool_finish_kernel<A>, planned, args);
}

template <typename T>
void pool_backward(cudaStream_t stream, const Launch& planned, Form form,
                   const PoolBackwardArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(stream, pool_backward_kernel<T, nhwc(), radix(), vector(), prologue()>, planned, args);
  });
}

template <typename A>
void pool_backward_finish(cudaStream_t stream, const Launch& planned,
                          const PoolBackwardFinishArgs<A>& args) {
  launch(stream, pool_backward_finish_kernel<A>, planned, args);
}

#define RF_INSTANTIATE(T)                                                       \
  template void pool<T>(cudaStream_t, const Launch&, Form, const PoolArgs<T>&); \
  template void pool_backward<T>(cudaStream_t, const Launch&, Form, const PoolBackwardArgs<T>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(__half)
RF_INSTANTIATE(__nv_bfloat16)
#undef RF_INSTANTIATE

#define RF_INSTANTIATE(A)                                                              \
  template void pool_finish<A>(cudaStream_t, const Launch&, const PoolFinishArgs<A>&); \
  template void pool_backward_finish<A>(cudaStream_t, const Launch&,                   \
                                        const PoolBackwardFinishArgs<A>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
