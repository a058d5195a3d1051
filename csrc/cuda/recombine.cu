// Phase 3, recombine: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

RF_LAUNCH_ON_MAP(recombine, RecombineArgs)
RF_LAUNCH_ON_MAP(recombine_backward, RecombineBackwardArgs)

}  // namespace resnest_fused::cuda
