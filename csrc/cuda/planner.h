// The launch planner: from a device and a call to tiles, workspace and launches.
//
// Arithmetic on the host, which needs neither CUDA nor a GPU. Without batch statistics a sample's
// result does not depend on its batch. So what decides the order of a sum there (`Tiling` without
// its counts, `kProductThreads`) depends on the device and on the shape of a sample.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/tiling.h"

namespace resnest_fused::cuda {

struct Device {
  int64_t multiprocessors;
  int64_t threads_per_block;  // at least a warp
  int64_t threads_per_multiprocessor;
  int64_t registers_per_multiprocessor;
  int64_t shared_per_block;        // bytes, without opting in to more
  int64_t shared_per_block_optin;  // bytes, with opting in
  int64_t shared_per_multiprocessor;
  int64_t grid_blocks;     // the largest grid along x
  int64_t cluster_blocks;  // the largest cluster that may be launched; 1: it has none
  int64_t architecture;    // that the code which runs is written for, as in 90
  int64_t driver;          // the newest CUDA that the driver knows, as in 12030

  // Threads work on while their copies into shared memory come (line.cuh).
  bool async_copies() const { return architecture >= 80; }
  // A launch may begin while the one before it still runs (device.cuh), also in a CUDA graph.
  bool early_launches() const { return architecture >= 90 && driver >= 12030; }
};

enum class Pass : int32_t { kEval, kTrain, kBackward };

// The gradients for which a backward works only if they are wanted.
struct Wanted {
  bool x, bn0, fc1_weight, fc2_weight, fc2_bias;
};

// What a plan depends on beside the device.
struct Workload {
  Pass pass;
  int64_t batch;
  int64_t radix;
  int64_t cardinality;
  int64_t channels;
  int64_t inter;
  int64_t pixels;
  int64_t element_size;  // of x, in bytes
  bool channels_last;
  bool aligned;      // every map starts at a multiple of 16 bytes
  bool relu;         // there is a prologue
  bool bn0;          // it has a bn0
  bool batch_stats;  // bn0 takes the batch's own statistics
  bool bn1_batch_stats;
  Wanted wanted;  // of a backward

  int64_t features() const { return radix * channels; }
  int64_t acc_size() const { return element_size == 8 ? 8 : 4; }
};

struct Plan {
  Tiling tiling;            // of what sums over pixels
  Tiling recombine_tiling;  // of what does not
  OnChip on_chip;           // of an evaluation in one launch
  int64_t workspace_bytes;
};

Plan make_plan(const Device& device, const Workload& w);

// The launches of a call in their order, without those that have no grid.
std::vector<Launch> launches_of(const Device& device, const Workload& w, const Plan& plan);

// The launch of one kernel.
Launch launch_of(const Device& device, const Workload& w, const Plan& plan, Kernel kernel);

// The tiling of sums that must not depend on the batch.
Tiling sample_tiling(const Device& device, const Workload& w);

// The map x as bn0's batch statistics see it: one split of all features. In NHWC it is one sample,
// as the pixels of the batch lie one behind the other.
Workload statistics_map(Workload w);
Tiling statistics_tiling(const Device& device, const Workload& w);
// Rows of partial statistics: a chunk has one.
int64_t statistics_rows(const Device& device, const Workload& w);

// `count` in 32 bits, unless it is more than the kernels can count.
int32_t counted(int64_t count, int64_t most);

// Blocks of a map of so many samples.
int64_t map_blocks(const Tiling& t, int64_t samples);

// How a device keeps an evaluation's x on chip, if it can.
OnChip on_chip_plan(const Device& device, const Workload& w);

// How many items the stages of phase 2 have, and the launch of those.
using ForwardItems = std::array<int64_t, ForwardStage::kCount>;
using BackwardItems = std::array<int64_t, BackwardStage::kCount>;
int64_t sample_channel_items(const Device& device, const Workload& w);  // a thread for each (b, c)
ForwardItems forward_items(const Device& device, const Workload& w, const Plan& plan);
BackwardItems backward_items(const Device& device, const Workload& w);
Launch launch_of_stages(const Device& device, const Workload& w, Kernel kernel,
                        std::span<const int64_t> items);

// The memory that a call needs beside its arguments and results: offsets in bytes into one
// allocation.
struct Workspace {
  int64_t bytes = 0;

  // Room for `count` elements of `size` bytes, at a multiple of 16.
  int64_t take(int64_t count, int64_t size);
};

// The arrays of prologue.cuh's Prologue, one behind the other, where there is a bn0.
constexpr int64_t kPrologueArrays = 6;

struct ForwardWorkspace : Workspace {
  int64_t counters;    // (kCounters)
  int64_t prologue;    // (6, R*C)
  int64_t statistics;  // (2, rows, R*C)
  int64_t partial;     // (B, chunks, C); of several chunks
  int64_t gap;         // (B, C); in evaluation
  int64_t u;           // (B, I)
  int64_t attention;   // (B, R, C); in evaluation

  ForwardWorkspace(const Device& device, const Workload& w, const Plan& plan);
};

struct BackwardWorkspace : Workspace {
  int64_t counters;    // (kCounters)
  int64_t prologue;    // (6, R*C)
  int64_t partial;     // (B, chunks, 4 or 1, R, C)
  int64_t sums;        // (B, 4, R, C); with a prologue
  int64_t dattention;  // (B, R, C)
  int64_t dlogits;     // (B, K, R, C/K)
  int64_t dhidden;     // (B, I)
  int64_t u;           // (B, I)
  int64_t dgap;        // (B, C)

  BackwardWorkspace(const Workload& w, const Plan& plan);
};

}  // namespace resnest_fused::cuda
