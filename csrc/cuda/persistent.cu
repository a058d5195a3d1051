// Evaluation in one launch: its launch.
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace resnest_fused::cuda {

template <typename T>
void persistent(const Context& context, const Plan& plan, Form form,
                const PersistentArgs<T>& args) {
  for_map<T>(form, args.pool.sizes, args.pool.tiling,
             [&](auto nhwc, auto radix, auto vector, auto prologue) {
               if constexpr (radix() == kPersistentRadix) {
                 const int64_t shared =
                     std::max(share_sums_bytes(args.pool.tiling, nhwc(), 1, sizeof(Acc<T>)),
                              product_shared_bytes(plan.product_threads, sizeof(Acc<T>)));
                 launch(context, "persistent",
                        persistent_kernel<T, nhwc(), radix(), vector(), prologue()>,
                        plan.persistent_blocks, plan.product_threads, shared, args);
               } else {
                 STD_TORCH_CHECK(false, "resnest_fused: no persistent kernel for this call");
               }
             });
}

#define RF_INSTANTIATE(T) \
  template void persistent<T>(const Context&, const Plan&, Form, const PersistentArgs<T>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(__half)
RF_INSTANTIATE(__nv_bfloat16)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
