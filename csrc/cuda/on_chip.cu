// Evaluation in one launch: its launch.
#include "cuda/dispatch.h"
#include "cuda/on_chip.cuh"

namespace resnest_fused::cuda {

// Only with vectors, and in at most 32 bits: for the rest there are launches of one phase each.
template <typename T>
void on_chip(cudaStream_t stream, const Launch& planned, Form form, const OnChipArgs<T>& args) {
  for_flag(form.nhwc, [&](auto nhwc) {
    for_flag(form.prologue, [&](auto prologue) {
      constexpr int kVector = vector_elements(nhwc(), sizeof(T));
      launch(stream, on_chip_kernel<T, nhwc(), kVector, prologue()>, planned, args);
    });
  });
}
template void on_chip(cudaStream_t, const Launch&, Form, const OnChipArgs<float>&);
template void on_chip(cudaStream_t, const Launch&, Form, const OnChipArgs<__half>&);
template void on_chip(cudaStream_t, const Launch&, Form, const OnChipArgs<__nv_bfloat16>&);

}  // namespace resnest_fused::cuda
