// Phase 2, attention: launches.
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace resnest_fused::cuda {
template <typename A>
void hidden(const Context& context, const Plan& plan, const HiddenArgs<A>& args) {
  launch(context, "hidden", hidden_kernel<A>, args.blocks, plan.product_threads,
         product_shared_bytes(plan.product_threads, sizeof(A)), args);
}

template <typename A>
void batch_norm(const Context& context, const Plan& plan, const BatchNormArgs<A>& args) {
  launch(context, "batch_norm", batch_norm_kernel<A>, ceil_div(args.hidden.features, kColumns),
         plan.column_threads, row_sums_bytes(plan.column_threads, 1), args);
}

template <typename A>
void attention(const Context& context, const Plan& plan, const AttentionArgs<A>& args) {
  launch(context, "attention", attention_kernel<A>, args.blocks, plan.product_threads,
         product_shared_bytes(plan.product_threads, sizeof(A)), args);
}

template <typename A>
void hidden_gradient(const Context& context, const Plan& plan, const HiddenGradientArgs<A>& args) {
  launch(context, "hidden_gradient", hidden_gradient_kernel<A>, args.blocks, plan.product_threads,
         product_shared_bytes(plan.product_threads, sizeof(A)), args);
}

template <typename A>
void batch_norm_backward(const Context& context, const Plan& plan,
                         const BatchNormBackwardArgs<A>& args) {
  launch(context, "batch_norm_backward", batch_norm_backward_kernel<A>,
         ceil_div(args.inter, kColumns), plan.column_threads,
         row_sums_bytes(plan.column_threads, 2), args);
}

template <typename A>
void gradients(const Context& context, const Plan& plan, GradientsArgs<A> args) {
  const FcSizes& s = args.sizes;
  const int64_t features = s.radix * s.channels, outputs = features / s.cardinality;
  const int64_t inter = s.inter / s.cardinality, channels = s.channels / s.cardinality;
  args.fc2_blocks = args.dfc2_weight.data ? product_blocks(outputs, inter, s.cardinality) : 0;
  args.fc1_blocks = args.dfc1_weight.data ? product_blocks(inter, channels, s.cardinality) : 0;
  args.gap_blocks = args.dgap ? product_blocks(args.batch, channels, s.cardinality) : 0;
  args.bias_blocks = args.dfc2_bias.data ? ceil_div(features, kColumns) : 0;
  launch(context, "gradients", gradients_kernel<A>,
         args.fc2_blocks + args.fc1_blocks + args.gap_blocks + args.bias_blocks,
         plan.product_threads, product_shared_bytes(plan.product_threads, sizeof(A)), args);
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
