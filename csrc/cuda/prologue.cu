// The prologue: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

template <typename A>
void prepare(cudaStream_t stream, const Launch& planned, const Prepare<A>& args) {
  launch(stream, prepare_kernel<A>, planned, args);
}

template <typename T>
void statistics(cudaStream_t stream, const Launch& planned, bool nhwc,
                const StatisticsArgs<T>& args) {
  for_layout<T>(nhwc, args.tiling, [&](auto is_nhwc, auto vector) {
    launch(stream, statistics_kernel<T, is_nhwc(), vector()>, planned, args);
  });
}

template <typename A>
void combine(cudaStream_t stream, const Launch& planned, const CombineArgs<A>& args) {
  launch(stream, combine_kernel<A>, planned, args);
}

template <typename A>
void prologue_backward(cudaStream_t stream, const Launch& planned,
                       const PrologueBackwardArgs<A>& args) {
  launch(stream, prologue_backward_kernel<A>, planned, args);
}

#define RF_INSTANTIATE(T) \
  template void statistics<T>(cudaStream_t, const Launch&, bool, const StatisticsArgs<T>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(__half)
RF_INSTANTIATE(__nv_bfloat16)
#undef RF_INSTANTIATE

#define RF_INSTANTIATE(A)                                                       \
  template void prepare<A>(cudaStream_t, const Launch&, const Prepare<A>&);     \
  template void combine<A>(cudaStream_t, const Launch&, const CombineArgs<A>&); \
  template void prologue_backward<A>(cudaStream_t, const Launch&, const PrologueBackwardArgs<A>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
