// Huge pages behind fresh results.
#include "cpu/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace resnest_fused::cpu {
namespace {

// Fresh memory of this size comes page by page from the kernel; huge pages cost a fifth of it.
constexpr int64_t kHugePageThreshold = 4 * 1024 * 1024;

}  // namespace

void advise_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const auto bytes = static_cast<uintptr_t>(fresh.numel()) * fresh.element_size();
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (bytes >= kHugePageThreshold && first < last) {
    // Only advice: where the kernel does not take it, nothing changes.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)fresh;
#endif
}

}  // namespace resnest_fused::cpu
