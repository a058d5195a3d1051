// Phase 2, attention: launches.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

RF_LAUNCH(hidden, HiddenArgs)
RF_LAUNCH(batch_norm, BatchNormArgs)
RF_LAUNCH(attention, AttentionArgs)
RF_LAUNCH(hidden_gradient, HiddenGradientArgs)
RF_LAUNCH(batch_norm_backward, BatchNormBackwardArgs)
RF_LAUNCH(gradients, GradientsArgs)

}  // namespace resnest_fused::cuda
