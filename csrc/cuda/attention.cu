// Phase 2, attention: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

RF_LAUNCH(attention, AttentionArgs)
RF_LAUNCH(attention_backward, AttentionBackwardArgs)

}  // namespace resnest_fused::cuda
