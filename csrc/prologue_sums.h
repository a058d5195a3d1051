// The sums over pixels that the pool's backward computes if there is a prologue, on every device.
//
// For each (b, r, c), with m = [bn0(x) > 0] and g = dout, the sums are
//   S1 = sum_p m g,   S2 = sum_p m,   S3 = sum_p m xhat g,   S4 = sum_p m xhat
// Stored in this order as (B, 4, R, C), they give the gradients
//   dattention = gamma S3 + beta S1
//   dgamma     = sum_b (attention S3 + dgap/HW S4)
//   dbeta      = sum_b (attention S1 + dgap/HW S2)
#pragma once

#include <cstdint>

namespace resnest_fused {

inline constexpr int64_t kPrologueSums = 4;

}  // namespace resnest_fused
