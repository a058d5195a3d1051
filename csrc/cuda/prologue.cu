// The prologue: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

RF_LAUNCH(prepare, Prepare)
RF_LAUNCH(combine, CombineArgs)
RF_LAUNCH(prologue_backward, PrologueBackwardArgs)

template <typename T>
void statistics(cudaStream_t stream, const Launch& planned, bool nhwc,
                const StatisticsArgs<T>& args) {
  for_layout<T>(nhwc, args.tiling, [&](auto is_nhwc, auto vector) {
    launch(stream, statistics_kernel<T, is_nhwc(), vector()>, planned, args);
  });
}
template void statistics(cudaStream_t, const Launch&, bool, const StatisticsArgs<float>&);
template void statistics(cudaStream_t, const Launch&, bool, const StatisticsArgs<double>&);
template void statistics(cudaStream_t, const Launch&, bool, const StatisticsArgs<__half>&);
template void statistics(cudaStream_t, const Launch&, bool, const StatisticsArgs<__nv_bfloat16>&);

}  // namespace resnest_fused::cuda
