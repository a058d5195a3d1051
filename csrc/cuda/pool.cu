// Phase 1, pool: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

RF_LAUNCH_ON_MAP(pool, PoolArgs)
RF_LAUNCH_ON_MAP(pool_backward, PoolBackwardArgs)

}  // namespace resnest_fused::cuda
