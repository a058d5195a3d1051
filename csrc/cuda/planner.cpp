// The launch planner: arithmetic.
#include "cuda/planner.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/tuning.h"
#include "prologue_sums.h"

namespace resnest_fused::cuda {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t power_of_two_at_least(int64_t n) {
  int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

// Threads of every block of a call.
int64_t block_threads(const Device& device) {
  int64_t threads = kMapThreads;
  while (threads > device.threads_per_block) {
    threads /= 2;
  }
  return threads;
}

// Chunks of one size, but for the last; none of them is empty.
void set_chunks(Tiling& t, int64_t pixels, int64_t at_most) {
  counted(pixels, kMostPixels);
  t.chunk_pixels = static_cast<int32_t>(std::max<int64_t>(ceil_div(pixels, at_most), 1));
  t.chunks = static_cast<int32_t>(ceil_div(pixels, t.chunk_pixels));
}

// Blocks of `groups` matrix products.
int64_t product_blocks(int64_t rows, int64_t columns, int64_t groups) {
  return ceil_div(rows, kTileRows) * ceil_div(columns, kTileColumns) * groups;
}

// Shared memory in bytes of `sum_over_share`,
int64_t share_sums_bytes(const Tiling& t, bool nhwc, int64_t sums, int64_t acc_size) {
  return (nhwc ? t.threads * t.vector : ceil_div(t.threads, kWarp)) * sums * acc_size;
}
// of `sum_over_rows`,
int64_t row_sums_bytes(int64_t threads, int64_t sums) {
  return threads * sums * static_cast<int64_t>(sizeof(double));
}
// and of `multiply_tile`.
int64_t product_bytes(int64_t threads, int64_t acc_size) {
  return threads / kWarp * kTileSize * acc_size;
}

// A call's kernels in the order of their launches: of_batch(kernel) for those of the whole batch,
// then of_chunk(kernel) for those of each chunk of it.
template <typename OfBatch, typename OfChunk>
void for_kernels(const Workload& w, const Plan& plan, const OfBatch& of_batch,
                 const OfChunk& of_chunk) {
  const auto visit_if = [](bool needed, const auto& visit, Kernel kernel) {
    if (needed) {
      visit(kernel);
    }
  };
  if (w.pass == Pass::kBackward) {
    visit_if(w.bn0, of_batch, Kernel::kPrepare);
    of_batch(Kernel::kPoolBackward);
    of_batch(Kernel::kPoolBackwardFinish);
    of_batch(Kernel::kHiddenGradient);
    of_batch(Kernel::kBatchNormBackward);
    of_batch(Kernel::kGradients);
    visit_if(w.wanted.bn0, of_batch, Kernel::kPrologueBackward);
    visit_if(w.wanted.x, of_batch, Kernel::kRecombineBackward);
    return;
  }
  const bool persistent = plan.strategy == Strategy::kPersistent;
  visit_if(w.batch_stats, of_batch, Kernel::kStatistics);
  visit_if(w.batch_stats, of_batch, Kernel::kCombine);
  visit_if((w.bn0 && !w.batch_stats) || persistent, of_batch, Kernel::kPrepare);
  if (persistent) {
    of_batch(Kernel::kPersistent);
    return;
  }
  of_chunk(Kernel::kPool);
  visit_if(w.pass == Pass::kTrain && plan.tiling.chunks > 1, of_chunk, Kernel::kPoolFinish);
  of_chunk(Kernel::kHidden);
  visit_if(w.bn1_batch_stats, of_chunk, Kernel::kBatchNorm);
  of_chunk(Kernel::kAttention);
  of_chunk(Kernel::kRecombine);
}

int64_t count_launches(const Workload& w, const Plan& plan) {
  int64_t of_batch = 0, of_chunk = 0;
  for_kernels(w, plan, [&](Kernel) { ++of_batch; }, [&](Kernel) { ++of_chunk; });
  return of_batch + plan.batch_chunks(w.batch) * of_chunk;
}

bool has_persistent_kernel(const Tiling& t, const Workload& w) {
  return t.vector > 1 && w.radix == kPersistentRadix;
}

// The persistent kernel's pieces of all phases. Those of chunks before the first and behind the
// last are empty.
int64_t persistent_tickets(const Workload& w, const Plan& plan) {
  const int64_t of_chunk = 2 * map_blocks(plan.tiling, plan.batch_chunk) +
                           attention_blocks(w, plan.batch_chunk) +
                           hidden_blocks(w, plan.batch_chunk);
  return of_chunk * (plan.batch_chunks(w.batch) + kBatchChunksBetween);
}

}  // namespace

int32_t counted(int64_t count, int64_t most) {
  if (count > most) {
    throw std::invalid_argument("x: too many elements for one call; split the batch");
  }
  return static_cast<int32_t>(count);
}

Tiling make_tiling(const Device& device, const Workload& w) {
  counted(w.channels, kMostChannels);
  const int64_t threads = block_threads(device);
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

Workload statistics_map(Workload w) {
  w.channels = w.features();
  w.radix = 1;
  if (w.channels_last) {
    w.pixels *= w.batch;
    w.batch = 1;
  }
  return w;
}

Tiling statistics_tiling(const Device& device, const Workload& w) {
  const Workload map = statistics_map(w);
  Tiling t = make_tiling(device, map);
  if (map.channels_last) {
    const int64_t wanted = ceil_div(4 * device.multiprocessors, t.channel_blocks);
    const int64_t chunks = std::clamp<int64_t>(map.pixels / kMinChunkPixels, 1, wanted);
    set_chunks(t, map.pixels, chunks);
  }
  return t;
}

int64_t statistics_rows(const Device& device, const Workload& w) {
  return statistics_map(w).batch * statistics_tiling(device, w).chunks;
}

int64_t map_blocks(const Tiling& t, int64_t samples) {
  return counted(samples * t.blocks_per_sample(), kMostBlocks);
}

int64_t hidden_blocks(const Workload& w, int64_t samples) {
  return product_blocks(samples, w.inter / w.cardinality, w.cardinality);
}

int64_t attention_blocks(const Workload& w, int64_t samples) {
  return product_blocks(samples, w.channels / w.cardinality, w.cardinality);
}

GradientBlocks gradient_blocks(const Workload& w) {
  const int64_t groups = w.cardinality, outputs = w.features() / groups;
  const int64_t channels = w.channels / groups, inter = w.inter / groups;
  return {w.wanted.fc2_weight ? product_blocks(outputs, inter, groups) : 0,
          w.wanted.fc1_weight ? product_blocks(inter, channels, groups) : 0,
          w.wanted.x || w.wanted.bn0 ? product_blocks(w.batch, channels, groups) : 0,
          w.wanted.fc2_bias ? ceil_div(w.features(), kColumns) : 0};
}

int64_t Workspace::take(int64_t count, int64_t size) {
  const int64_t offset = bytes;
  bytes += ceil_div(count * size, 16) * 16;
  return offset;
}

ForwardWorkspace::ForwardWorkspace(const Device& device, const Workload& w, const Plan& plan) {
  const bool eval = w.pass == Pass::kEval;
  const int64_t samples = eval && plan.strategy == Strategy::kLaunches ? plan.batch_chunk : w.batch;
  const int64_t rows = w.batch_stats ? statistics_rows(device, w) : 0;
  const int64_t size = w.acc_size(), chunks = plan.tiling.chunks;
  prologue = take(w.bn0 ? kPrologueArrays * w.features() : 0, size);
  statistics = take(2 * rows * w.features(), size);
  partial = take(eval || chunks > 1 ? samples * chunks * w.channels : 0, size);
  u = take(samples * w.inter, size);
  attention = take(eval ? samples * w.features() : 0, size);
  counters = take(plan.counters(w.batch), sizeof(uint32_t));
}

BackwardWorkspace::BackwardWorkspace(const Workload& w, const Plan& plan) {
  const int64_t size = w.acc_size(), maps = w.batch * w.features();
  prologue = take(w.bn0 ? kPrologueArrays * w.features() : 0, size);
  partial = take(plan.tiling.chunks * (w.relu ? kPrologueSums : 1) * maps, size);
  sums = take(w.relu ? kPrologueSums * maps : 0, size);
  dattention = take(maps, size);
  dlogits = take(maps, size);
  dhidden = take(w.batch * w.inter, size);
  u = take(w.batch * w.inter, size);
  dgap = take(w.batch * w.channels, size);
}

Plan make_plan(const Device& device, const Workload& w, Choice choice) {
  Plan plan{};
  plan.strategy = Strategy::kLaunches;
  plan.tiling = make_tiling(device, w);
  map_blocks(plan.tiling, w.batch);  // throws where they cannot be counted
  const int64_t batch = std::max<int64_t>(w.batch, 1);
  const int64_t unit = w.batch * w.channels * w.pixels * w.element_size;
  const int64_t x_of_sample = w.features() * w.pixels * w.element_size;
  const auto with = [&](Plan candidate, int64_t batch_chunk, int64_t units) {
    candidate.batch_chunk = batch_chunk;
    candidate.launches = count_launches(w, candidate);
    candidate.predicted_bytes = units * unit;
    candidate.predicted_microseconds =
        static_cast<double>(candidate.launches) * kLaunchMicroseconds +
        static_cast<double>(candidate.predicted_bytes) /
            static_cast<double>(device.bytes_per_microsecond);
    return candidate;
  };
  if (w.pass == Pass::kBackward) {
    plan = with(plan, batch, (w.relu ? 3 : 2) * w.radix + 2);
    plan.workspace_bytes = BackwardWorkspace(w, plan).bytes;
    return plan;
  }
  if (w.pass == Pass::kTrain) {
    plan = with(plan, batch, (w.batch_stats ? 3 : 2) * w.radix + 1);
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
  const auto in_chunks_of = [&](int64_t chunk) { return with(plan, chunk, units(chunk)); };
  const Plan at_once = in_chunks_of(batch), in_chunks = in_chunks_of(balanced(l2 / x_of_sample));
  const Plan by_launches =
      in_chunks.predicted_microseconds < at_once.predicted_microseconds ? in_chunks : at_once;

  constexpr int64_t kTogether = kBatchChunksBetween + 1;
  const int64_t chunk = balanced(l2 / kTogether / x_of_sample);
  Plan persistent = plan;
  persistent.strategy = Strategy::kPersistent;
  persistent = with(persistent, chunk, units(std::min(batch, kTogether * chunk)));
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

Launch launch_of(const Device& device, const Workload& w, const Plan& plan, Kernel kernel,
                 int64_t first, int64_t samples) {
  const int64_t threads = block_threads(device), acc = w.acc_size(), features = w.features();
  const auto launch = [&](const char* name, int64_t blocks, int64_t shared_bytes) {
    const int64_t grid = std::min(blocks, device.grid_blocks);
    return Launch{kernel, name, first, samples, blocks, grid, threads, shared_bytes};
  };
  const auto of_map = [&](const char* name, int64_t sums) {
    return launch(name, map_blocks(plan.tiling, samples),
                  share_sums_bytes(plan.tiling, w.channels_last, sums, acc));
  };
  const auto of_columns = [&](const char* name, int64_t columns, int64_t sums) {
    return launch(name, ceil_div(columns, kColumns), row_sums_bytes(threads, sums));
  };
  const auto of_product = [&](const char* name, int64_t blocks) {
    return launch(name, blocks, product_bytes(threads, acc));
  };
  // A thread each.
  const auto of_elements = [&](const char* name, int64_t elements) {
    return launch(name, ceil_div(elements, threads), 0);
  };
  switch (kernel) {
    case Kernel::kPrepare:
      return of_elements("prepare", std::max(w.bn0 ? features : 0, plan.counters(w.batch)));
    case Kernel::kStatistics: {
      const Tiling t = statistics_tiling(device, w);
      return launch("statistics", map_blocks(t, statistics_map(w).batch),
                    share_sums_bytes(t, w.channels_last, 1, acc));
    }
    case Kernel::kCombine:
      return of_columns("combine", features, 1);
    case Kernel::kPool:
      return of_map("pool", 1);
    case Kernel::kPoolFinish:
      return of_elements("pool_finish", samples * w.channels);
    case Kernel::kHidden:
      return of_product("hidden", hidden_blocks(w, samples));
    case Kernel::kBatchNorm:
      return of_columns("batch_norm", w.inter, 1);
    case Kernel::kAttention:
      return of_product("attention", attention_blocks(w, samples));
    case Kernel::kRecombine:
      return of_map("recombine", 0);
    case Kernel::kPersistent:
      return launch("persistent", plan.persistent_blocks,
                    std::max(of_map("pool", 1).shared_bytes, product_bytes(threads, acc)));
    case Kernel::kPoolBackward:
      return of_map("pool_backward", w.relu ? kPrologueSums : 1);
    case Kernel::kPoolBackwardFinish:
      return of_elements("pool_backward_finish", samples * w.channels);
    case Kernel::kHiddenGradient:
      return of_product("hidden_gradient", hidden_blocks(w, samples));
    case Kernel::kBatchNormBackward:
      return of_columns("batch_norm_backward", w.inter, 2);
    case Kernel::kGradients: {
      const GradientBlocks blocks = gradient_blocks(w);
      return launch("gradients", blocks.fc2 + blocks.fc1 + blocks.gap + blocks.bias,
                    std::max(product_bytes(threads, acc), row_sums_bytes(threads, 1)));
    }
    case Kernel::kPrologueBackward:
      return of_columns("prologue_backward", features, 2);
    case Kernel::kRecombineBackward:
      return of_map("recombine_backward", 0);
  }
  throw std::logic_error("resnest_fused: no such kernel");
}

std::vector<Launch> launches_of(const Device& device, const Workload& w, const Plan& plan) {
  std::vector<Launch> launches;
  launches.reserve(static_cast<size_t>(plan.launches));
  const auto add = [&](Kernel kernel, int64_t first, int64_t samples) {
    const Launch launch = launch_of(device, w, plan, kernel, first, samples);
    if (launch.blocks > 0) {
      launches.push_back(launch);
    }
  };
  const auto skip = [](Kernel) {};
  for_kernels(w, plan, [&](Kernel kernel) { add(kernel, 0, w.batch); }, skip);
  if (plan.strategy == Strategy::kPersistent) {
    return launches;  // it walks over the chunks itself
  }
  for (int64_t first = 0; first < std::max<int64_t>(w.batch, 1); first += plan.batch_chunk) {
    const int64_t samples = std::min(plan.batch_chunk, w.batch - first);
    for_kernels(w, plan, skip, [&](Kernel kernel) { add(kernel, first, samples); });
  }
  return launches;
}

}  // namespace resnest_fused::cuda
