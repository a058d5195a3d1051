// The ops' registration for CUDA tensors.
#include "calls.h"
#include "kernels.h"

STABLE_TORCH_LIBRARY_IMPL(resnest_fused, CUDA, m) {
  resnest_fused::implement_ops<resnest_fused::Calls<resnest_fused::cuda::Kernels>>(m);
}
