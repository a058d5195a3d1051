// Evaluation in one launch: its launch.
#include "cuda/dispatch.h"
#include "cuda/persistent.cuh"

namespace resnest_fused::cuda {

template <typename T>
void persistent(cudaStream_t stream, const Launch& planned, Form form,
                const PersistentArgs<T>& args) {
  for_map<T>(form, args.pool.sizes, args.pool.tiling,
             [&](auto nhwc, auto radix, auto vector, auto prologue) {
               if constexpr (radix() == kPersistentRadix) {
                 launch(stream, persistent_kernel<T, nhwc(), radix(), vector(), prologue()>,
                        planned, args);
               } else {
                 throw std::logic_error("resnest_fused: no persistent kernel for this call");
               }
             });
}

template void persistent(cudaStream_t, const Launch&, Form, const PersistentArgs<float>&);
template void persistent(cudaStream_t, const Launch&, Form, const PersistentArgs<__half>&);
template void persistent(cudaStream_t, const Launch&, Form, const PersistentArgs<__nv_bfloat16>&);

}  // namespace resnest_fused::cuda
