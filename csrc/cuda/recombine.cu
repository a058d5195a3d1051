// Phase 3, recombine: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

template <typename T>
void recombine(cudaStream_t stream, const Launch& planned, Form form,
               const RecombineArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(stream, recombine_kernel<T, nhwc(), radix(), vector(), prologue()>, planned, args);
  });
}

template <typename T>
void recombine_backward(cudaStream_t stream, const Launch& planned, Form form,
                        const RecombineBackwardArgs<T>& args) {
  for_map<T>(form, args.sizes, args.tiling, [&](auto nhwc, auto radix, auto vector, auto prologue) {
    launch(stream, recombine_backward_kernel<T, nhwc(), radix(), vector(), prologue()>, planned,
           args);
  });
}

#define RF_INSTANTIATE(T)                                                                 \
  template void recombine<T>(cudaStream_t, const Launch&, Form, const RecombineArgs<T>&); \
  template void recombine_backward<T>(cudaStream_t, const Launch&, Form,                  \
                                      const RecombineBackwardArgs<T>&);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(__half)
RF_INSTANTIATE(__nv_bfloat16)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cuda
