// The launch planner: from a device and a call to tiles, strategy, workspace and launches.
//
// Arithmetic on the host, which needs neither CUDA nor a GPU. What decides the order of a sum
// (`Tiling` without its counts, `kProductThreads`) depends on the device and on the shape of a
// sample. It never depends on the batch: in evaluation a sample's result does not either.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/tiling.h"

namespace resnest_fused::cuda {

struct Device {
  int64_t multiprocessors;
  int64_t threads_per_block;  // at least a warp
  int64_t threads_per_multiprocessor;
  int64_t registers_per_multiprocessor;
  int64_t shared_per_block;  // bytes, without opting in to more
  int64_t shared_per_multiprocessor;
  int64_t grid_blocks;  // the largest grid along x
  int64_t l2_bytes;
  int64_t bytes_per_microsecond;  // of device memory
};

enum class Pass : int32_t { kEval, kTrain, kBackward };

// The gradients whose kernels a backward launches only if they are wanted.
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

enum class Strategy : int32_t {
  // A launch for each phase; in evaluation samples go through all phases in chunks that fit L2.
  kLaunches,
  // Evaluation only: one launch, whose blocks take tickets for pieces of all phases.
  kPersistent,
};

// The strategies that a caller may ask for; kFastest lets the planner choose.
enum class Choice : int32_t { kFastest, kLaunches, kPersistent };

struct Plan {
  Strategy strategy;
  Tiling tiling;
  int64_t batch_chunk;        // samples that go through the phases together
  int64_t persistent_blocks;  // the persistent launch's grid; else 0
  int64_t workspace_bytes;
  int64_t launches;         // of the whole call, if its batch is not empty
  int64_t predicted_bytes;  // read from and written to device memory
  double predicted_microseconds;

  int64_t batch_chunks(int64_t batch) const { return (batch + batch_chunk - 1) / batch_chunk; }
  // The persistent launch counts tickets taken, and for each chunk the pieces done of three phases.
  int64_t counters(int64_t batch) const {
    return strategy == Strategy::kPersistent ? 1 + 3 * batch_chunks(batch) : 0;
  }
};

// In evaluation the fastest of three ways: a launch a phase for all samples; the same for chunks of
// samples whose x fits L2; the persistent launch. Training and backward have one way.
Plan make_plan(const Device& device, const Workload& w, Choice choice = Choice::kFastest);

// The launches of a call in their order, without those that have no blocks.
std::vector<Launch> launches_of(const Device& device, const Workload& w, const Plan& plan);

// The launch of one kernel for samples [first, first + samples).
Launch launch_of(const Device& device, const Workload& w, const Plan& plan, Kernel kernel,
                 int64_t first, int64_t samples);

Tiling make_tiling(const Device& device, const Workload& w);

// The map x as bn0's batch statistics see it: one split of all features. In NHWC it is one sample,
// as the pixels of the batch lie one behind the other.
Workload statistics_map(Workload w);
// In NHWC as many chunks as occupy every multiprocessor: the statistics may depend on the batch.
Tiling statistics_tiling(const Device& device, const Workload& w);
// Rows of partial statistics: a chunk has one.
int64_t statistics_rows(const Device& device, const Workload& w);

// `count` in 32 bits, unless it is more than the kernels can count.
int32_t counted(int64_t count, int64_t most);

// Blocks of a map of so many samples, and of the two FCs' products.
int64_t map_blocks(const Tiling& t, int64_t samples);
int64_t hidden_blocks(const Workload& w, int64_t samples);
int64_t attention_blocks(const Workload& w, int64_t samples);
GradientBlocks gradient_blocks(const Workload& w);

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
  int64_t prologue;    // (6, R*C)
  int64_t statistics;  // (2, rows, R*C)
  int64_t partial;     // (samples, chunks, C)
  int64_t u;           // (samples, I)
  int64_t attention;   // (samples, R, C); in evaluation
  int64_t counters;    // of the persistent launch

  ForwardWorkspace(const Device& device, const Workload& w, const Plan& plan);
};

struct BackwardWorkspace : Workspace {
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
