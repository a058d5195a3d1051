// Huge pages behind fresh results.
#pragma once

#include "problem.h"

namespace resnest_fused::cpu {

// Ask for huge pages behind a large tensor that nothing has been written to yet.
void advise_huge_pages(const Tensor& fresh);

}  // namespace resnest_fused::cpu
