// What the planner is tuned with: measured costs, and limits that no kernel is compiled with.
#pragma once

#include <cstdint>

namespace resnest_fused::cuda {

// Pixel chunks of a sample in NHWC: enough blocks for a single sample, few partial sums to add.
constexpr int64_t kMaxChunks = 8;
constexpr int64_t kMinChunkPixels = 32;
// Time that a launch costs beyond its bytes: the gap between two kernels of one stream.
constexpr double kLaunchMicroseconds = 2.5;
// Time from the end of a phase to the start of the next within the persistent launch.
constexpr double kHandoverMicroseconds = 1.5;
// The part of L2 in which data stay until they are read again, other traffic passing through it.
constexpr double kUsableL2 = 0.6;
// Blocks of the persistent launch for a multiprocessor. More than fit do no harm: they find no
// tickets left.
constexpr int64_t kPersistentBlocks = 4;

}  // namespace resnest_fused::cuda
