// The launch planner: from a device and a problem to tiles, strategy, workspace and launches.
//
// Pure arithmetic for the host, which needs neither CUDA nor a GPU. What decides the order of a sum
// (`Tiling` without its counts, `kProductThreads`) depends on the device and on the shape of a
// sample but never on the batch, so that in evaluation a sample's result does not either.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "prologue_sums.h"

namespace resnest_fused::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t power_of_two_at_least(int64_t n) {
  int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

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

// What a plan depends on.
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
  bool relu;         // with the prologue
  bool bn0;          // and with bn0 in it
  bool batch_stats;  // bn0 takes the batch's own statistics
  bool bn1_batch_stats;

  int64_t features() const { return radix * channels; }
  int64_t acc_size() const { return element_size == 8 ? 8 : 4; }
};

// How blocks and their threads share a map. A block works on one sample.
//   NCHW: `lanes` threads share the pixels of a channel; threads/lanes channels a block.
//   NHWC: `lanes` threads stand side by side along the channels, a vector each; threads/lanes of
//         these rows share the pixels of a chunk.
struct Tiling {
  int32_t threads;
  int32_t lanes;
  int32_t vector;          // elements a thread loads at a time: 16 bytes of them, or 1
  int32_t channel_blocks;  // blocks along the channels
  int32_t chunk_pixels;    // pixels of a chunk: all in NCHW
  int32_t chunks;          // chunks of a sample, each with partial sums of its own: 1 in NCHW

  int64_t blocks_per_sample() const { return int64_t{channel_blocks} * chunks; }
};

enum class Strategy : int32_t {
  // A launch for each phase; in evaluation samples go through all phases in chunks that fit L2.
  kLaunches,
  // Evaluation only: one launch, whose blocks take tickets for pieces of all phases.
  kPersistent,
};

// Threads of the blocks that work on maps, and of those that multiply matrices. At most
// kRegisters registers a thread let kBlocksPerMultiprocessor such blocks be resident on every
// architecture from sm_75 on (65,536 registers, 1,024 threads).
constexpr int64_t kMapThreads = 256;
constexpr int64_t kProductThreads = 256;
constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kRegisters = 128;
// Columns and row lanes of the blocks that add up over rows.
constexpr int64_t kColumnThreads = 256;
constexpr int64_t kColumns = 8;
// The tile of a matrix product that a block takes.
constexpr int64_t kTileRows = 32;
constexpr int64_t kTileColumns = 16;
constexpr int kTileSize = kTileRows * kTileColumns;
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
constexpr int64_t kWarp = 32;
// Kernels count in 32 bits the blocks of a map, its channels, and the pixels of a sample, of which
// their loops step a little beyond the last.
constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostPixels = int64_t{1} << 30;
constexpr int64_t kMostChannels = int64_t{1} << 30;
// Groups of samples between whose pool and recombine the persistent kernel runs: x of one more than
// this many must stay in L2.
constexpr int64_t kGroupsBetween = 2;

struct Plan {
  Strategy strategy;
  Tiling tiling;
  int64_t product_threads;
  int64_t column_threads;
  int64_t group;              // samples that go through the phases together
  int64_t persistent_blocks;  // the persistent launch's grid; else 0
  int64_t workspace_bytes;
  int64_t launches;         // of the whole call, if its batch is not empty
  int64_t predicted_bytes;  // read from and written to device memory
  double predicted_microseconds;

  int64_t groups(int64_t batch) const { return ceil_div(batch, group); }
};

// `count` in 32 bits, unless it is more than the kernels can count.
inline int32_t counted(int64_t count, int64_t most) {
  if (count > most) {
    throw std::invalid_argument("x: too many elements for one call; split the batch");
  }
  return static_cast<int32_t>(count);
}

inline int64_t map_threads(const Device& device) {
  int64_t threads = kMapThreads;
  while (threads > device.threads_per_block) {
    threads /= 2;
  }
  return threads;
}

// Chunks of the same size, but for the last; none of them is empty.
inline void set_chunks(Tiling& t, int64_t pixels, int64_t at_most) {
  counted(pixels, kMostPixels);
  t.chunk_pixels = static_cast<int32_t>(std::max<int64_t>(ceil_div(pixels, at_most), 1));
  t.chunks = static_cast<int32_t>(ceil_div(pixels, t.chunk_pixels));
}

inline Tiling make_tiling(const Device& device, const Workload& w) {
  counted(w.channels, kMostChannels);
  const int64_t threads = map_threads(device);
  const int64_t whole = 16 / w.element_size;
  // float64 takes one simple path.
  const int64_t together = w.channels_last ? w.channels : w.channels * w.pixels;
  const bool vectors = w.aligned && w.element_size < 8 && together % whole == 0;
  Tiling t{};
  t.threads = static_cast<int32_t>(threads);
  t.vector = static_cast<int32_t>(vectors ? whole : 1);
  if (w.channels_last) {
    const int64_t needed = ceil_div(w.channels, t.vector);
    t.channel_blocks = static_cast<int32_t>(ceil_div(needed, kWarp));
    t.lanes = static_cast<int32_t>(ceil_div(needed, t.channel_blocks));
    const int64_t chunks = std::clamp<int64_t>(w.pixels / kMinChunkPixels, 1, kMaxChunks);
    set_chunks(t, w.pixels, chunks);
  } else {
    // About four vectors of each split for a thread.
    const int64_t lanes = power_of_two_at_least(ceil_div(w.pixels * w.element_size, 4 * 16));
    t.lanes = static_cast<int32_t>(std::clamp<int64_t>(lanes, 8, threads));
    t.channel_blocks = static_cast<int32_t>(ceil_div(w.channels, threads / t.lanes));
    set_chunks(t, w.pixels, 1);
  }
  return t;
}

// x for bn0's batch statistics: one split of all features; in NHWC, where the pixels of the batch
// lie one behind the other, as one sample.
inline Workload statistics_map(Workload w) {
  w.channels = w.features();
  w.radix = 1;
  if (w.channels_last) {
    w.pixels *= w.batch;
    w.batch = 1;
  }
  return w;
}

// In NHWC in as many chunks as occupy every multiprocessor: the statistics may depend on the batch.
inline Tiling statistics_tiling(const Device& device, const Workload& w) {
  const Workload map = statistics_map(w);
  Tiling t = make_tiling(device, map);
  if (map.channels_last) {
    const int64_t wanted = ceil_div(4 * device.multiprocessors, t.channel_blocks);
    const int64_t chunks = std::clamp<int64_t>(map.pixels / kMinChunkPixels, 1, wanted);
    set_chunks(t, map.pixels, chunks);
  }
  return t;
}

// Blocks of a map of so many samples.
inline int64_t map_blocks(const Tiling& t, int64_t samples) {
  return counted(samples * t.blocks_per_sample(), kMostBlocks);
}

// Blocks of `groups` matrix products.
inline int64_t product_blocks(int64_t rows, int64_t columns, int64_t groups) {
  return ceil_div(rows, kTileRows) * ceil_div(columns, kTileColumns) * groups;
}
inline int64_t hidden_blocks(const Workload& w, int64_t samples) {
  return product_blocks(samples, w.inter / w.cardinality, w.cardinality);
}
inline int64_t attention_blocks(const Workload& w, int64_t samples) {
  return product_blocks(samples, w.channels / w.cardinality, w.cardinality);
}

// Blocks of the launch of the weights' gradients, by what they compute.
struct GradientBlocks {
  int64_t fc2, fc1, gap, bias;

  int64_t all() const { return fc2 + fc1 + gap + bias; }
};
inline GradientBlocks gradient_blocks(int64_t batch, int64_t radix, int64_t cardinality,
                                      int64_t channels, int64_t inter) {
  const int64_t outputs = radix * channels / cardinality;
  const int64_t group_channels = channels / cardinality, group_inter = inter / cardinality;
  return {product_blocks(outputs, group_inter, cardinality),
          product_blocks(group_inter, group_channels, cardinality),
          product_blocks(batch, group_channels, cardinality), ceil_div(radix * channels, kColumns)};
}

// Shared memory in bytes of `sum_over_share`,
constexpr int64_t share_sums_bytes(const Tiling& t, bool nhwc, int64_t sums, int64_t acc_size) {
  return (nhwc ? t.threads * t.vector : ceil_div(t.threads, kWarp)) * sums * acc_size;
}
// of `sum_over_rows`,
constexpr int64_t row_sums_bytes(int64_t threads, int64_t sums) {
  return threads * sums * static_cast<int64_t>(sizeof(double));
}
// and of `multiply_tile`.
constexpr int64_t product_bytes(int64_t threads, int64_t acc_size) {
  return threads / kWarp * kTileSize * acc_size;
}

// A kernel's launch. The grid may have fewer blocks: kernels walk over them.
struct Launch {
  const char* name;
  int64_t blocks;
  int64_t threads;
  int64_t shared_bytes;
};

// Every kernel's launch; `blocks` are those of the map or of the products.
inline Launch prepare_launch(const Device& device, int64_t features, int64_t counters) {
  const int64_t threads = map_threads(device);
  return {"prepare", ceil_div(std::max(features, counters), threads), threads, 0};
}
inline Launch statistics_launch(const Tiling& t, int64_t blocks, bool nhwc, int64_t acc_size) {
  return {"statistics", blocks, t.threads, share_sums_bytes(t, nhwc, 1, acc_size)};
}
inline Launch combine_launch(const Device& device, int64_t features) {
  const int64_t threads = map_threads(device);
  return {"combine", ceil_div(features, kColumns), threads, row_sums_bytes(threads, 1)};
}
inline Launch pool_launch(const Tiling& t, int64_t blocks, bool nhwc, int64_t acc_size) {
  return {"pool", blocks, t.threads, share_sums_bytes(t, nhwc, 1, acc_size)};
}
inline Launch pool_finish_launch(const Device& device, int64_t batch, int64_t channels) {
  const int64_t threads = map_threads(device);
  return {"pool_finish", ceil_div(batch * channels, threads), threads, 0};
}
inline Launch hidden_launch(const Plan& plan, int64_t blocks, int64_t acc_size) {
  const int64_t threads = plan.product_threads;
  return {"hidden", blocks, threads, product_bytes(threads, acc_size)};
}
inline Launch batch_norm_launch(const Plan& plan, int64_t inter) {
  const int64_t threads = plan.column_threads;
  return {"batch_norm", ceil_div(inter, kColumns), threads, row_sums_bytes(threads, 1)};
}
inline Launch attention_launch(const Plan& plan, int64_t blocks, int64_t acc_size) {
  const int64_t threads = plan.product_threads;
  return {"attention", blocks, threads, product_bytes(threads, acc_size)};
}
inline Launch recombine_launch(const Tiling& t, int64_t blocks) {
  return {"recombine", blocks, t.threads, 0};
}
inline Launch persistent_launch(const Plan& plan, bool nhwc, int64_t acc_size) {
  const int64_t threads = plan.product_threads;
  return {
      "persistent", plan.persistent_blocks, threads,
      std::max(share_sums_bytes(plan.tiling, nhwc, 1, acc_size), product_bytes(threads, acc_size))};
}
inline Launch pool_backward_launch(const Tiling& t, int64_t blocks, bool nhwc, bool prologue,
                                   int64_t acc_size) {
  return {"pool_backward", blocks, t.threads,
          share_sums_bytes(t, nhwc, prologue ? kPrologueSums : 1, acc_size)};
}
inline Launch pool_backward_finish_launch(const Device& device, int64_t batch, int64_t channels) {
  const int64_t threads = map_threads(device);
  return {"pool_backward_finish", ceil_div(batch * channels, threads), threads, 0};
}
inline Launch hidden_gradient_launch(const Plan& plan, int64_t blocks, int64_t acc_size) {
  const int64_t threads = plan.product_threads;
  return {"hidden_gradient", blocks, threads, product_bytes(threads, acc_size)};
}
inline Launch batch_norm_backward_launch(const Plan& plan, int64_t inter) {
  const int64_t threads = plan.column_threads;
  return {"batch_norm_backward", ceil_div(inter, kColumns), threads, row_sums_bytes(threads, 2)};
}
inline Launch gradients_launch(const Plan& plan, const GradientBlocks& blocks, int64_t acc_size) {
  const int64_t threads = plan.product_threads;
  return {"gradients", blocks.all(), threads,
          std::max(product_bytes(threads, acc_size), row_sums_bytes(threads, 1))};
}
inline Launch prologue_backward_launch(const Device& device, int64_t features) {
  const int64_t threads = map_threads(device);
  return {"prologue_backward", ceil_div(features, kColumns), threads, row_sums_bytes(threads, 2)};
}
inline Launch recombine_backward_launch(const Tiling& t, int64_t blocks) {
  return {"recombine_backward", blocks, t.threads, 0};
}

// What a call needs beside its arguments and results: offsets in bytes into one allocation.
struct Workspace {
  int64_t bytes = 0;

  // Room for `count` elements of `size` bytes, at a multiple of 16.
  int64_t take(int64_t count, int64_t size) {
    const int64_t offset = bytes;
    bytes += ceil_div(count * size, 16) * 16;
    return offset;
  }
};

// The arrays of prologue.cuh's Prologue, one behind the other, where there is a bn0.
constexpr int64_t kPrologueArrays = 6;

struct ForwardWorkspace : Workspace {
  int64_t prologue;    // (6, R*C)
  int64_t statistics;  // (2, rows, R*C)
  int64_t partial;     // (samples, chunks, C)
  int64_t u;           // (samples, I)
  int64_t attention;   // (samples, R, C); in evaluation
  int64_t counters;    // (1 + 3 * groups); of the persistent launch
  int64_t counter_count;

  ForwardWorkspace(const Device& device, const Workload& w, const Plan& plan) {
    const bool persistent = plan.strategy == Strategy::kPersistent;
    const bool eval = w.pass == Pass::kEval;
    const int64_t samples = eval && !persistent ? plan.group : w.batch;
    const int64_t rows =
        w.batch_stats ? statistics_map(w).batch * statistics_tiling(device, w).chunks : 0;
    counter_count = persistent ? 1 + 3 * plan.groups(w.batch) : 0;
    const int64_t size = w.acc_size();
    prologue = take(w.bn0 ? kPrologueArrays * w.features() : 0, size);
    statistics = take(2 * rows * w.features(), size);
    partial =
        take(eval || plan.tiling.chunks > 1 ? samples * plan.tiling.chunks * w.channels : 0, size);
    u = take(samples * w.inter, size);
    attention = take(eval ? samples * w.features() : 0, size);
    counters = take(counter_count, sizeof(uint32_t));
  }
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

  BackwardWorkspace(const Workload& w, const Plan& plan) {
    const int64_t size = w.acc_size(), maps = w.batch * w.features();
    prologue = take(w.bn0 ? kPrologueArrays * w.features() : 0, size);
    partial = take(plan.tiling.chunks * (w.relu ? 4 : 1) * maps, size);
    sums = take(w.relu ? 4 * maps : 0, size);
    dattention = take(maps, size);
    dlogits = take(maps, size);
    dhidden = take(w.batch * w.inter, size);
    u = take(w.batch * w.inter, size);
    dgap = take(w.batch * w.channels, size);
  }
};

// The persistent kernel is compiled for radix 2, that of nearly all published models; the launches
// for any.
constexpr int64_t kPersistentRadix = 2;

inline bool has_persistent_kernel(const Tiling& t, const Workload& w) {
  return t.vector > 1 && w.radix == kPersistentRadix;
}

// Its pieces of all phases, of which those of groups before the first and behind the last are
// empty.
inline int64_t persistent_tickets(const Workload& w, const Plan& plan) {
  const int64_t of_group = 2 * map_blocks(plan.tiling, plan.group) +
                           attention_blocks(w, plan.group) + hidden_blocks(w, plan.group);
  return of_group * (plan.groups(w.batch) + kGroupsBetween);
}

// The strategies that a caller may ask for; kFastest lets the planner choose.
enum class Choice : int32_t { kFastest, kLaunches, kPersistent };

// In evaluation, the fastest of: one launch a phase for all samples; the same for groups of samples
// whose x fits L2; the persistent launch. Training and backward have one way.
inline Plan make_plan(const Device& device, const Workload& w, Choice choice = Choice::kFastest) {
  Plan plan{};
  plan.strategy = Strategy::kLaunches;
  plan.tiling = make_tiling(device, w);
  plan.product_threads = plan.column_threads = plan.tiling.threads;
  map_blocks(plan.tiling, w.batch);  // can be counted
  const int64_t batch = std::max<int64_t>(w.batch, 1);
  const int64_t unit = w.batch * w.channels * w.pixels * w.element_size;
  const int64_t x_of_sample = w.features() * w.pixels * w.element_size;
  const auto with = [&](Plan candidate, int64_t group, int64_t launches, int64_t units) {
    candidate.group = group;
    candidate.launches = launches;
    candidate.predicted_bytes = units * unit;
    candidate.predicted_microseconds = static_cast<double>(launches) * kLaunchMicroseconds +
                                       static_cast<double>(candidate.predicted_bytes) /
                                           static_cast<double>(device.bytes_per_microsecond);
    return candidate;
  };
  const int64_t prologue = w.bn0 ? 1 : 0;
  if (w.pass == Pass::kBackward) {
    // pool, its finish, du, bn1, the gradients, recombine; bn0's parameters and its gradients.
    plan = with(plan, batch, 6 + 2 * prologue, (w.relu ? 3 : 2) * w.radix + 2);
    plan.workspace_bytes = BackwardWorkspace(w, plan).bytes;
    return plan;
  }
  if (w.pass == Pass::kTrain) {
    // pool and its finish, hidden, attention, recombine; bn0's parameters; bn0's and bn1's
    // statistics.
    const int64_t finish = plan.tiling.chunks > 1 ? 1 : 0;
    const int64_t of_batch = (w.batch_stats ? 1 : 0) + (w.bn1_batch_stats ? 1 : 0);
    plan =
        with(plan, batch, 4 + finish + prologue + of_batch, (w.batch_stats ? 3 : 2) * w.radix + 1);
    plan.workspace_bytes = ForwardWorkspace(device, w, plan).bytes;
    return plan;
  }
  const int64_t l2 = static_cast<int64_t>(kUsableL2 * static_cast<double>(device.l2_bytes));
  const auto balanced = [&](int64_t most) {
    return ceil_div(batch, ceil_div(batch, std::clamp<int64_t>(most, 1, batch)));
  };
  const auto units = [&](int64_t resident) {
    return (resident * x_of_sample <= l2 ? 1 : 2) * w.radix + 1;
  };
  const auto in_groups = [&](int64_t group) {
    return with(plan, group, 4 * ceil_div(w.batch, group) + prologue, units(group));
  };
  const Plan at_once = in_groups(batch), in_chunks = in_groups(balanced(l2 / x_of_sample));
  const Plan by_launches =
      in_chunks.predicted_microseconds < at_once.predicted_microseconds ? in_chunks : at_once;

  const int64_t group = balanced(l2 / (kGroupsBetween + 1) / x_of_sample);
  Plan persistent = with(plan, group, 2, units(std::min(batch, (kGroupsBetween + 1) * group)));
  persistent.strategy = Strategy::kPersistent;
  persistent.predicted_microseconds += 3 * kHandoverMicroseconds;
  const int64_t tickets = persistent_tickets(w, persistent);
  persistent.persistent_blocks = std::min(device.multiprocessors * kPersistentBlocks, tickets);
  // Each block takes a ticket beyond the last.
  const bool countable =
      tickets + persistent.persistent_blocks <= std::numeric_limits<uint32_t>::max();
  const bool possible = has_persistent_kernel(plan.tiling, w) && countable;
  if (choice == Choice::kPersistent && !possible) {
    throw std::invalid_argument(
        "the persistent launch takes radix 2 in vectors of 16 bytes, and less than 2^32 pieces");
  }
  const bool faster = persistent.predicted_microseconds < by_launches.predicted_microseconds;
  const bool chosen =
      choice == Choice::kFastest ? possible && faster : choice == Choice::kPersistent;
  plan = chosen ? persistent : by_launches;
  plan.workspace_bytes = ForwardWorkspace(device, w, plan).bytes;
  return plan;
}

// The launches of a call in their order, those without blocks left out; of a backward that gives
// every gradient.
inline std::vector<Launch> launches_of(const Device& device, const Workload& w, const Plan& plan) {
  const Tiling& t = plan.tiling;
  const bool nhwc = w.channels_last;
  const int64_t acc = w.acc_size(), features = w.features();
  std::vector<Launch> launches;
  const auto add = [&](const Launch& launch) {
    if (launch.blocks > 0) {
      launches.push_back(launch);
    }
  };
  const auto prepare = [&](int64_t counters) {
    add(prepare_launch(device, w.bn0 ? features : 0, counters));
  };
  const auto forward = [&](int64_t samples) {
    const int64_t blocks = map_blocks(t, samples);
    add(pool_launch(t, blocks, nhwc, acc));
    if (w.pass == Pass::kTrain && t.chunks > 1) {
      add(pool_finish_launch(device, samples, w.channels));
    }
    add(hidden_launch(plan, hidden_blocks(w, samples), acc));
    if (w.bn1_batch_stats) {
      add(batch_norm_launch(plan, w.inter));
    }
    add(attention_launch(plan, attention_blocks(w, samples), acc));
    add(recombine_launch(t, blocks));
  };

  if (w.pass == Pass::kBackward) {
    const int64_t blocks = map_blocks(t, w.batch);
    prepare(0);
    add(pool_backward_launch(t, blocks, nhwc, w.relu, acc));
    add(pool_backward_finish_launch(device, w.batch, w.channels));
    add(hidden_gradient_launch(plan, hidden_blocks(w, w.batch), acc));
    add(batch_norm_backward_launch(plan, w.inter));
    add(gradients_launch(
        plan, gradient_blocks(w.batch, w.radix, w.cardinality, w.channels, w.inter), acc));
    if (w.bn0) {
      add(prologue_backward_launch(device, features));
    }
    add(recombine_backward_launch(t, blocks));
    return launches;
  }
  if (w.batch_stats) {
    const Tiling of_features = statistics_tiling(device, w);
    const int64_t blocks = map_blocks(of_features, statistics_map(w).batch);
    add(statistics_launch(of_features, blocks, nhwc, acc));
    add(combine_launch(device, features));
  } else {
    prepare(ForwardWorkspace(device, w, plan).counter_count);
  }
  if (plan.strategy == Strategy::kPersistent) {
    add(persistent_launch(plan, nhwc, acc));
    return launches;
  }
  for (int64_t first = 0; first < std::max<int64_t>(w.batch, 1); first += plan.group) {
    forward(std::min(plan.group, w.batch - first));
  }
  return launches;
}

}  // namespace resnest_fused::cuda
