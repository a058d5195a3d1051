// Running statistics: the launch.
#include "cuda/dispatch.h"

namespace resnest_fused::cuda {

RF_LAUNCH(update_running_statistics, RunningArgs)

}  // namespace resnest_fused::cuda
