// What the planner is tuned with: costs, assumed until a GPU measures them, and limits that no
// kernel is compiled with.
#pragma once

#include <cstdint>

namespace resnest_fused::cuda {

// Chunks of a sample's pixels in NHWC. They give one sample enough blocks, and few partial sums.
constexpr int64_t kMaxChunks = 8;
constexpr int64_t kMinChunkPixels = 32;
// Time that a launch costs beyond its bytes: the gap between two kernels of one stream.
constexpr double kLaunchMicroseconds = 2.5;
// Time from the end of a phase to the start of the next within the persistent launch.
constexpr double kHandoverMicroseconds = 1.5;
// The part of L2 in which data stay until they are read again, while other traffic passes through.
constexpr double kUsableL2 = 0.6;
// Blocks of the persistent launch for each multiprocessor. Blocks that do not fit do no harm: they
// find no tickets left.
constexpr int64_t kPersistentBlocks = 4;

}  // namespace resnest_fused::cuda
