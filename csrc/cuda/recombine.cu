// Phase 3, recombine: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

template <typename T>
void recombine(const Context& context, Form form, const RecombineArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(context, recombine_kernel<T, nhwc(), radix(), vector(), prologue()>,
           recombine_launch(args.tiling, args.blocks), args);
  });
}

template <typename T>
void recombine_backward(const Context& context, Form form, const RecombineBackwardArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(context, recombine_backward_kernel<T, nhwc(), radix(), vector(), prologue()>,
           recombine_backward_launch(args.tiling, args.blocks), args);
  });
}

#define RF_INSTANTIATE(T)                                                    \
  template void recombine<T>(const Context&, Form, const RecombineArgs<T>&); \
  template void recombine_backward<T>(const Context&, Form, const RecombineBackwardArgs<T>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(__half)
RF_INSTANTIATE(__nv_bfloat16)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
