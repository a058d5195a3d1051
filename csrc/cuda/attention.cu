// Phase 2, attention: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

template <typename A>
void hidden(cudaStream_t stream, const Launch& planned, const HiddenArgs<A>& args) {
  launch(stream, hidden_kernel<A>, planned, args);
}

template <typename A>
void batch_norm(cudaStream_t stream, const Launch& planned, const BatchNormArgs<A>& args) {
  launch(stream, batch_norm_kernel<A>, planned, args);
}

template <typename A>
void attention(cudaStream_t stream, const Launch& planned, const AttentionArgs<A>& args) {
  launch(stream, attention_kernel<A>, planned, args);
}

template <typename A>
void hidden_gradient(cudaStream_t stream, const Launch& planned,
                     const HiddenGradientArgs<A>& args) {
  launch(stream, hidden_gradient_kernel<A>, planned, args);
}

template <typename A>
void batch_norm_backward(cudaStream_t stream, const Launch& planned,
                         const BatchNormBackwardArgs<A>& args) {
  launch(stream, batch_norm_backward_kernel<A>, planned, args);
}

template <typename A>
void gradients(cudaStream_t stream, const Launch& planned, const GradientsArgs<A>& args) {
  launch(stream, gradients_kernel<A>, planned, args);
}

#define RF_INSTANTIATE(A)                                                                      \
  template void hidden<A>(cudaStream_t, const Launch&, const HiddenArgs<A>&);                  \
  template void batch_norm<A>(cudaStream_t, const Launch&, const BatchNormArgs<A>&);           \
  template void attention<A>(cudaStream_t, const Launch&, const AttentionArgs<A>&);            \
  template void hidden_gradient<A>(cudaStream_t, const Launch&, const HiddenGradientArgs<A>&); \
  template void batch_norm_backward<A>(cudaStream_t, const Launch&,                            \
                                       const BatchNormBackwardArgs<A>&);                       \
  template void gradients<A>(cudaStream_t, const Launch&, const GradientsArgs<A>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
