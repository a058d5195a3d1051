// Scratch memory.
#pragma once

#include <cstdint>
#include <memory>

namespace resnest_fused::cpu {

template <typename A>
std::unique_ptr<A[]> uninitialized(int64_t count) {
  return std::make_unique_for_overwrite<A[]>(static_cast<size_t>(count));
}

}  // namespace resnest_fused::cpu
