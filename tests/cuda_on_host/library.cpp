// The CUDA kernels' ops on the CPU, for a device that the tests set.
#include <string_view>

#include "calls.h"
#include "cuda/context.h"
#include "kernels.h"

namespace resnest_fused::cuda {
namespace {

Device device{};

}  // namespace

Context context_of(const Tensor&) { return {device, nullptr, nullptr}; }

// Sets one property of the device; false when there is none of that name.
extern "C" __attribute__((visibility("default"))) bool device_on_host_set(const char* name,
                                                                          int64_t value) {
  const struct {
    std::string_view name;
    int64_t& property;
  } properties[] = {
      {"multiprocessors", device.multiprocessors},
      {"threads_per_block", device.threads_per_block},
      {"threads_per_multiprocessor", device.threads_per_multiprocessor},
      {"registers_per_multiprocessor", device.registers_per_multiprocessor},
      {"shared_per_block", device.shared_per_block},
      {"shared_per_block_optin", device.shared_per_block_optin},
      {"shared_per_multiprocessor", device.shared_per_multiprocessor},
      {"grid_blocks", device.grid_blocks},
      {"cluster_blocks", device.cluster_blocks},
      {"architecture", device.architecture},
      {"driver", device.driver},
  };
  for (const auto& [known, property] : properties) {
    if (known == name) {
      property = value;
#if defined(RF_OLDER_GPU)
      device.architecture = std::min<int64_t>(device.architecture, 75);  // that of this code
#endif
      return true;
    }
  }
  return false;
}

}  // namespace resnest_fused::cuda

STABLE_TORCH_LIBRARY(resnest_fused_on_host, m) { resnest_fused::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(resnest_fused_on_host, CPU, m) {
  resnest_fused::implement_ops<resnest_fused::Calls<resnest_fused::cuda::Kernels>>(m);
}
