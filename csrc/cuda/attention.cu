// Phase 2, attention: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

template <typename A>
void hidden(const Context& context, const Plan& plan, const HiddenArgs<A>& args) {
  launch(context, hidden_kernel<A>, hidden_launch(plan, args.blocks, sizeof(A)), args);
}

template <typename A>
void batch_norm(const Context& context, const Plan& plan, const BatchNormArgs<A>& args) {
  launch(context, batch_norm_kernel<A>, batch_norm_launch(plan, args.hidden.features), args);
}

template <typename A>
void attention(const Context& context, const Plan& plan, const AttentionArgs<A>& args) {
  launch(context, attention_kernel<A>, attention_launch(plan, args.blocks, sizeof(A)), args);
}

template <typename A>
void hidden_gradient(const Context& context, const Plan& plan, const HiddenGradientArgs<A>& args) {
  launch(context, hidden_gradient_kernel<A>, hidden_gradient_launch(plan, args.blocks, sizeof(A)),
         args);
}

template <typename A>
void batch_norm_backward(const Context& context, const Plan& plan,
                         const BatchNormBackwardArgs<A>& args) {
  launch(context, batch_norm_backward_kernel<A>, batch_norm_backward_launch(plan, args.inter),
         args);
}

template <typename A>
void gradients(const Context& context, const Plan& plan, GradientsArgs<A> args) {
  const FcSizes& s = args.sizes;
  const GradientBlocks every =
      gradient_blocks(args.batch, s.radix, s.cardinality, s.channels, s.inter);
  args.blocks = {args.dfc2_weight.data ? every.fc2 : 0, args.dfc1_weight.data ? every.fc1 : 0,
                 args.dgap ? every.gap : 0, args.dfc2_bias.data ? every.bias : 0};
  launch(context, gradients_kernel<A>, gradients_launch(plan, args.blocks, sizeof(A)), args);
}

#define RF_INSTANTIATE(A)                                                                      \
  template void hidden<A>(const Context&, const Plan&, const HiddenArgs<A>&);                  \
  template void batch_norm<A>(const Context&, const Plan&, const BatchNormArgs<A>&);           \
  template void attention<A>(const Context&, const Plan&, const AttentionArgs<A>&);            \
  template void hidden_gradient<A>(const Context&, const Plan&, const HiddenGradientArgs<A>&); \
  template void batch_norm_backward<A>(const Context&, const Plan&,                            \
                                       const BatchNormBackwardArgs<A>&);                       \
  template void gradients<A>(const Context&, const Plan&, GradientsArgs<A>);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
