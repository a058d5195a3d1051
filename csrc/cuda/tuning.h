// What the planner is tuned with, and no kernel is compiled with.
#pragma once

#include <cstdint>
#include <span>

#include "cuda/tiling.h"

namespace resnest_fused::cuda {

// The defaults are for the GPUs of benchmarks/model.py; tuning.cpp has the ranges. Every value
// within these gives a right plan.
struct Tuning {
  // Chunks of a sample's pixels in NHWC. They give one sample enough blocks, and few partial sums:
  // with more than `chunks` each has at least `long_chunk_pixels`.
  int64_t chunks = 8;
  int64_t chunk_pixels = 32;
  int64_t long_chunk_pixels = 128;
  // Blocks for each multiprocessor, where they may depend on the batch: as many as are resident on
  // every GPU, so that all run at a time. Few blocks read few coefficients and leave few partial
  // sums. Of statistics, and of the other kernels in NHWC and in NCHW.
  int64_t statistics_blocks = 2;
  int64_t line_blocks = 2;
  int64_t slab_blocks = 3;
  // In NCHW: vectors that a thread takes of each split, while threads of a channel are as few, and
  // bytes of a slab, at most: so many vectors of each thread where a sample's sums must not depend
  // on its batch, as a few samples need blocks, too; else twice as many, as each block has
  // instructions that do not depend on its size.
  int64_t thread_vectors = 4;
  int64_t sample_slab_bytes = kMapThreads * 4 * 16;
  int64_t slab_bytes = kMapThreads * 8 * 16;
  // And threads of a channel there, at least; a power of two.
  int64_t sample_lanes = 4;
  // Samples that a cluster of blocks keeps on chip in evaluation, at most; 0: it keeps none.
  int64_t on_chip_samples = kHeldSamples;
  // 1: from sm_90 on a launch may begin while the one before it ends; 0: it may not.
  int64_t early_launches = 1;
};

// The defaults, with what the file named by the environment variable RESNEST_FUSED_CUDA_TUNING has
// instead: lines `name = value`, and comments behind a #. It is read once, when this is loaded.
// Throws std::runtime_error, at each call, if anything in the file is wrong or it cannot be read.
const Tuning& tuning();

// A value of the tuning by its name, with its range.
struct Tunable {
  const char* name;
  int64_t Tuning::* value;
  int64_t least;
  int64_t most;
  bool power_of_two = false;
};
std::span<const Tunable> tunables();

// Bytes of a multiprocessor's shared memory that CUDA keeps for each block, and more than any has.
constexpr int64_t kReservedShared = 1024;
constexpr int64_t kMostShared = int64_t{1} << 20;

}  // namespace resnest_fused::cuda
