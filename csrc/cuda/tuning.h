// What the planner is tuned with, and no kernel is compiled with.
#pragma once

#include <cstdint>

namespace resnest_fused::cuda {

// Chunks of a sample's pixels in NHWC. They give one sample enough blocks, and few partial sums:
// with more than kMaxChunks each has at least kLongChunkPixels.
constexpr int64_t kMaxChunks = 8;
constexpr int64_t kMinChunkPixels = 32;
constexpr int64_t kLongChunkPixels = 128;
// Blocks for each multiprocessor that chunks are to give where they may depend on the batch. Few
// blocks read few coefficients and leave few partial sums; those of statistics are all resident.
// In NHWC a backward reads dout once for each split: what a block reads again has to be in L2
// still. H100, bf16, 256 samples: with 4, 64@56 takes 9 % longer than with 16 in each pass of the
// backward.
constexpr int64_t kStatisticsBlocks = 2;
constexpr int64_t kForwardBlocks = 4;
constexpr int64_t kBackwardBlocks = 4;

// In NCHW: bytes of a slab, at most: four vectors of each thread where a sample's sums must not
// depend on its batch, as a few samples need blocks, too; else eight, as each block has
// instructions that do not depend on its size.
constexpr int64_t kSampleSlabBytes = kMapThreads * 4 * 16;
constexpr int64_t kSlabBytes = kMapThreads * 8 * 16;
// And threads of a channel there, at least.
constexpr int64_t kSampleLanes = 4;

// Bytes of a multiprocessor's shared memory that CUDA keeps for each block, and more than any has.
constexpr int64_t kReservedShared = 1024;
constexpr int64_t kMostShared = int64_t{1} << 20;

}  // namespace resnest_fused::cuda
