// The launch planner: arithmetic.
#include "cuda/planner.h"

#include <algorithm>
#include <numeric>
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

// Whether a launch may begin while the one before it ends.
bool begins_early(const Device& device) {
  return tuning().early_launches > 0 && device.early_launches();
}

// Chunks of one size, but for the last; none of them is empty.
void set_chunks(Tiling& t, int64_t pixels, int64_t at_most) {
  counted(pixels, kMostPixels);
  t.chunk_pixels = static_cast<int32_t>(std::max<int64_t>(ceil_div(pixels, at_most), 1));
  t.chunks = static_cast<int32_t>(ceil_div(pixels, t.chunk_pixels));
}

// Tiles of `groups` matrix products.
int64_t product_tiles(int64_t rows, int64_t columns, int64_t groups) {
  counted(rows, kMostRows);
  counted(columns, kMostRows);
  return counted(ceil_div(rows, kTileRows) * ceil_div(columns, kTileColumns) * groups, kMostBlocks);
}

// Shared memory in bytes of `sum_over_share`,
int64_t share_sums_bytes(const Tiling& t, bool nhwc, int64_t sums, int64_t acc_size) {
  return (nhwc ? t.threads * t.vector : ceil_div(t.threads, kWarp)) * sums * acc_size;
}
// of a pool's `HeldPrologue`, which is there before those sums,
int64_t held_bytes(const Tiling& t, const Workload& w) {
  const int64_t width = w.channels_last ? t.lanes * t.vector : t.threads / t.lanes;
  const int64_t features = std::min(w.radix * width, t.vector > 1 ? kHeldFeatures : kWarp);
  return 3 * features * w.acc_size();
}
// of both,
int64_t pool_bytes(const Tiling& t, const Workload& w, bool prologue, int64_t sums) {
  return std::max(share_sums_bytes(t, w.channels_last, sums, w.acc_size()),
                  prologue ? held_bytes(t, w) : 0);
}
// of `sum_over_rows`,
int64_t row_sums_bytes(int64_t threads, int64_t sums) {
  return threads / kWarp * kColumns * sums * static_cast<int64_t>(sizeof(double));
}
// and of `multiply_tile`.
int64_t product_bytes(int64_t threads, int64_t acc_size) {
  return threads / kWarp * kTileSize * acc_size;
}

// Slabs of a block: one for each split and, in a backward, for dout.
int64_t slabs_of(const Workload& w) { return w.radix + (w.pass == Pass::kBackward ? 1 : 0); }

// Bytes of shared memory that a block with slabs may have.
int64_t slab_memory(const Device& device) {
  const int64_t share = device.shared_per_multiprocessor / kSlabBlocks - kReservedShared;
  return std::min(device.shared_per_block_optin, share);
}

// In NCHW: threads of a channel, and with vectors a block's slabs of so many bytes at most, behind
// what any pass needs. False if those of a backward have no room: then the tiling is as it was.
bool set_lanes(Tiling& t, const Device& device, const Workload& w, int64_t lanes, int64_t most) {
  const int64_t channels = t.threads / lanes;
  Tiling next = t;
  next.lanes = static_cast<int32_t>(lanes);
  next.channel_blocks = static_cast<int32_t>(ceil_div(w.channels, channels));
  if (t.vector > 1) {
    const int64_t elements = (channels - 1) * w.pixels + t.chunk_pixels;
    const int64_t room = (ceil_div(elements, t.vector) + 1) * t.vector;
    Workspace space;
    space.take(pool_bytes(next, w, true, kPrologueSums), 1);
    next.copies_at = static_cast<int32_t>(space.bytes);
    space.take(kBeforeSlabs, 1);
    space.take((w.radix + 1) * room, w.element_size);
    if (elements * w.element_size > most || space.bytes > slab_memory(device)) {
      return false;
    }
    next.slab = static_cast<int32_t>(room);
  }
  t = next;
  return true;
}

// In NCHW: up to so many vectors of each split for a thread. Where slabs have no room for a
// channel, it is cut into chunks; where they have none for a few pixels of so many splits, there
// are none.
void set_sample_lanes(Tiling& t, const Device& device, const Workload& w) {
  const int64_t threads = t.threads;
  const int64_t least = t.vector > 1 ? tuning().sample_lanes : kLeastSingleLanes;
  const int64_t of_thread = tuning().thread_vectors * 16;
  const int64_t wanted = power_of_two_at_least(ceil_div(w.pixels * w.element_size, of_thread));
  int64_t lanes = std::clamp<int64_t>(wanted, least, threads);
  set_chunks(t, w.pixels, 1);
  while (!set_lanes(t, device, w, lanes, tuning().sample_slab_bytes)) {
    if (lanes < threads) {
      lanes *= 2;
    } else if (t.chunk_pixels > threads) {
      set_chunks(t, w.pixels, 2 * t.chunks);
    } else {
      t.vector = 1;
      lanes = std::clamp<int64_t>(wanted, kLeastSingleLanes, threads);
      set_chunks(t, w.pixels, 1);
    }
  }
}

// Call visit(kernel) for each kernel of a call, in the order of their launches.
template <typename Visit>
void for_kernels(const Workload& w, const Plan& plan, const Visit& visit) {
  const auto visit_if = [&](bool needed, Kernel kernel) {
    if (needed) {
      visit(kernel);
    }
  };
  if (plan.on_chip.cluster > 0) {
    visit(Kernel::kOnChip);
    return;
  }
  if (w.pass == Pass::kBackward) {
    visit(Kernel::kPoolBackward);
    visit(Kernel::kAttentionBackward);
    visit_if(w.wanted.x, Kernel::kRecombineBackward);
    return;
  }
  visit_if(w.batch_stats, Kernel::kStatistics);
  visit_if(w.batch_stats, Kernel::kCombine);
  visit(Kernel::kPool);
  visit(Kernel::kAttention);
  visit(Kernel::kRecombine);
}

// Chunks that are long enough, for kernels that leave no partial sums
int64_t most_chunks(const Workload& w) { return w.pixels / tuning().chunk_pixels; }
// and for those that do, so that these are few beside x.
int64_t most_summed_chunks(const Workload& w) {
  return std::min(most_chunks(w), std::max(tuning().chunks, w.pixels / tuning().long_chunk_pixels));
}

// Chunks of each of so many equal parts of a map, for so many places of blocks: as many as run at
// once; or a few more, where many places would be empty in the last of a few rounds.
int64_t chunks_for(int64_t places, int64_t parts) {
  constexpr int64_t kFewRounds = 4;
  for (int64_t chunks = std::max<int64_t>(places / parts, 1);; ++chunks) {
    const int64_t rounds = ceil_div(chunks * parts, places);
    if (4 * chunks * parts >= 3 * rounds * places || rounds > kFewRounds) {
      return chunks;
    }
  }
}

// With so many blocks for each multiprocessor, where they may depend on the batch, and in NCHW with
// vectors at least so many threads of a channel.
Tiling batch_tiling(const Device& device, const Workload& w, int64_t blocks, int64_t most,
                    int64_t least_lanes) {
  Tiling t = sample_tiling(device, w);
  const int64_t samples = std::max<int64_t>(w.batch, 1), wanted = blocks * device.multiprocessors;
  if (w.channels_last) {
    const int64_t chunks = chunks_for(wanted, samples * t.channel_blocks);
    set_chunks(t, w.pixels, std::clamp<int64_t>(most, 1, chunks));
  } else {
    const int64_t least = t.vector > 1 ? least_lanes : kWarp;
    while (t.chunks == 1 && t.lanes > least && samples * t.blocks_per_sample() >= 2 * wanted &&
           set_lanes(t, device, w, t.lanes / 2, tuning().slab_bytes)) {
    }
  }
  return t;
}

}  // namespace

int32_t counted(int64_t count, int64_t most) {
  if (count > most) {
    throw std::invalid_argument("x: too many elements for one call; split the batch");
  }
  return static_cast<int32_t>(count);
}

Tiling sample_tiling(const Device& device, const Workload& w) {
  counted(w.channels, kMostChannels);
  const int64_t threads = block_threads(device);
  const int64_t whole = 16 / w.element_size;
  // float64 takes one simple path.
  const int64_t row = w.channels_last ? w.channels : w.channels * w.pixels;
  const bool vectors = w.aligned && w.element_size < 8 && row % whole == 0;
  Tiling t{};
  t.threads = static_cast<int32_t>(threads);
  t.vector = static_cast<int32_t>(vectors ? vector_elements(w.channels_last, w.element_size) : 1);
  if (w.channels_last) {
    // What a block has of a pixel begins and ends at multiples of 16 bytes, too.
    const int64_t together = vectors ? whole / t.vector : 1;
    const int64_t needed = ceil_div(w.channels, t.vector * together);
    t.channel_blocks = static_cast<int32_t>(ceil_div(needed * together, kWarp));
    t.lanes = static_cast<int32_t>(ceil_div(needed, t.channel_blocks) * together);
    const int64_t chunks =
        std::clamp<int64_t>(w.pixels / tuning().chunk_pixels, 1, tuning().chunks);
    set_chunks(t, w.pixels, chunks);
    if (vectors && device.async_copies()) {
      Workspace space;
      space.take(held_bytes(t, w), 1);
      t.copies_at = static_cast<int32_t>(space.bytes);
    }
  } else {
    set_sample_lanes(t, device, w);
  }
  return t;
}

Workload statistics_map(Workload w) {
  w.channels = w.features();
  w.radix = 1;
  w.relu = w.bn0 = false;
  if (w.channels_last) {
    w.pixels *= w.batch;
    w.batch = 1;
  }
  return w;
}

Tiling statistics_tiling(const Device& device, const Workload& w) {
  const Workload map = statistics_map(w);
  return batch_tiling(device, map, tuning().statistics_blocks, most_chunks(map), 1);
}

int64_t statistics_rows(const Device& device, const Workload& w) {
  return statistics_map(w).batch * statistics_tiling(device, w).chunks;
}

int64_t map_blocks(const Tiling& t, int64_t samples) {
  return counted(samples * t.blocks_per_sample(), kMostBlocks);
}

int64_t sample_channel_items(const Device& device, const Workload& w) {
  return ceil_div(w.batch * w.channels, block_threads(device));
}

ForwardItems forward_items(const Device& device, const Workload& w, const Plan& plan) {
  const int64_t groups = w.cardinality;
  ForwardItems items{};
  items[ForwardStage::kGap] = plan.tiling.chunks > 1 ? sample_channel_items(device, w) : 0;
  items[ForwardStage::kHidden] = product_tiles(w.batch, w.inter / groups, groups);
  items[ForwardStage::kBatchNorm] = w.bn1_batch_stats ? ceil_div(w.inter, kColumns) : 0;
  items[ForwardStage::kAttention] = product_tiles(w.batch, w.channels / groups, groups);
  return items;
}

BackwardItems backward_items(const Device& device, const Workload& w) {
  const int64_t groups = w.cardinality, outputs = w.features() / groups;
  const int64_t channels = w.channels / groups, inter = w.inter / groups;
  const auto wanted = [](bool is_wanted, int64_t count) { return is_wanted ? count : 0; };
  BackwardItems items{};
  items[BackwardStage::kLogits] = sample_channel_items(device, w);
  items[BackwardStage::kHidden] = product_tiles(w.batch, inter, groups);
  items[BackwardStage::kBatchNorm] = ceil_div(w.inter, kColumns);
  items[BackwardStage::kGap] =
      wanted(w.wanted.x || w.wanted.bn0, product_tiles(w.batch, channels, groups));
  items[BackwardStage::kFc2Weight] =
      wanted(w.wanted.fc2_weight, product_tiles(outputs, inter, groups));
  items[BackwardStage::kFc1Weight] =
      wanted(w.wanted.fc1_weight, product_tiles(inter, channels, groups));
  items[BackwardStage::kFc2Bias] = wanted(w.wanted.fc2_bias, ceil_div(w.features(), kColumns));
  items[BackwardStage::kPrologue] = wanted(w.wanted.bn0, ceil_div(w.features(), kColumns));
  return items;
}

// A block takes one item, so the grid has them all; CUDA allows kMostBlocks.
Launch launch_of_stages(const Device& device, const Workload& w, Kernel kernel,
                        std::span<const int64_t> items) {
  const int64_t threads = block_threads(device);
  const int64_t blocks = std::accumulate(items.begin(), items.end(), int64_t{0});
  counted(blocks, kMostBlocks);
  const char* const name = kernel == Kernel::kAttention ? "attention" : "attention_backward";
  const int64_t shared = std::max(product_bytes(threads, w.acc_size()), row_sums_bytes(threads, 2));
  Launch launch{kernel, name, blocks, blocks, threads, shared};
  launch.early = begins_early(device);
  return launch;
}

int64_t Workspace::take(int64_t count, int64_t size) {
  const int64_t offset = bytes;
  bytes += ceil_div(count * size, 16) * 16;
  return offset;
}

ForwardWorkspace::ForwardWorkspace(const Device& device, const Workload& w, const Plan& plan) {
  const bool eval = w.pass == Pass::kEval;
  const int64_t rows = w.batch_stats ? statistics_rows(device, w) : 0;
  const int64_t size = w.acc_size(), chunks = plan.tiling.chunks;
  counters = take(kCounters, sizeof(uint32_t));
  prologue = take(w.bn0 ? kPrologueArrays * w.features() : 0, size);
  statistics = take(2 * rows * w.features(), size);
  partial = take(chunks > 1 ? w.batch * chunks * w.channels : 0, size);
  gap = take(eval ? w.batch * w.channels : 0, size);
  u = take(w.batch * w.inter, size);
  attention = take(eval ? w.batch * w.features() : 0, size);
}

BackwardWorkspace::BackwardWorkspace(const Workload& w, const Plan& plan) {
  const int64_t size = w.acc_size(), maps = w.batch * w.features();
  counters = take(kCounters, sizeof(uint32_t));
  prologue = take(w.bn0 ? kPrologueArrays * w.features() : 0, size);
  partial = take(plan.tiling.chunks * (w.relu ? kPrologueSums : 1) * maps, size);
  sums = take(w.relu ? kPrologueSums * maps : 0, size);
  dattention = take(maps, size);
  dlogits = take(maps, size);
  dhidden = take(w.batch * w.inter, size);
  u = take(w.batch * w.inter, size);
  dgap = take(w.batch * w.channels, size);
}

namespace {

// A block's memory for so many samples of a cluster. The counts are small, as what has no room is
// not kept.
int64_t lay_out(OnChip& plan, const Workload& w, const Tiling& t, int64_t samples) {
  const int64_t width = t.lanes * t.vector;
  const bool whole = t.channel_blocks == 1;
  const int64_t rows = !w.channels_last ? w.radix : whole ? 1 : t.chunk_pixels * w.radix;
  const int64_t row = !w.channels_last ? t.slab : whole ? t.chunk_pixels * w.features() : width;
  const int64_t part_bytes = rows * row * w.element_size;
  const int64_t parts = t.blocks_per_sample();
  const int64_t held = ceil_div(samples * parts, plan.cluster);
  const int64_t size = w.acc_size();
  Workspace space;
  space.take(share_sums_bytes(t, w.channels_last, 1, size), 1);
  const int64_t barriers = space.take(held, kArrivalBytes);
  const int64_t scale = space.take(w.relu ? w.features() : 0, size);
  const int64_t shift = space.take(w.relu ? w.features() : 0, size);
  const int64_t hidden = ceil_div(w.inter, plan.cluster);
  const int64_t bn1 = space.take(kNormValues * hidden, size), fc1_bias = space.take(hidden, size);
  const int64_t fc2_bias = space.take(w.radix * ceil_div(w.channels, plan.cluster), size);
  const int64_t partial = space.take(t.chunks > 1 ? samples * t.chunks * w.channels : 0, size);
  const int64_t gap = space.take(samples * w.channels, size);
  const int64_t u = space.take(samples * w.inter, size);
  const int64_t attention = space.take(samples * w.features(), size);
  const int64_t x = space.take(held, part_bytes);
  if (space.bytes <= kMostShared) {
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    plan = {.cluster = plan.cluster,
            .samples = narrow(samples),
            .parts = narrow(parts),
            .held = narrow(held),
            .rows = narrow(rows),
            .row = narrow(row),
            .part_bytes = narrow(part_bytes),
            .barriers = narrow(barriers),
            .scale = narrow(scale),
            .shift = narrow(shift),
            .bn1 = narrow(bn1),
            .fc1_bias = narrow(fc1_bias),
            .fc2_bias = narrow(fc2_bias),
            .partial = narrow(partial),
            .gap = narrow(gap),
            .u = narrow(u),
            .attention = narrow(attention),
            .x = narrow(x),
            .bytes = narrow(space.bytes)};
  }
  return space.bytes;
}

}  // namespace

// Two blocks a multiprocessor if a sample fits: one computes while the other one waits for x. All
// samples of a cluster use a weight that was read once, so there are as many as find room, but no
// fewer clusters than the device can run at a time.
OnChip on_chip_plan(const Device& device, const Workload& w) {
  const Tiling t = sample_tiling(device, w);
  const int64_t cluster = device.cluster_blocks;
  if (w.pass != Pass::kEval || cluster < 2 || t.vector == 1 || w.radix != kOnChipRadix ||
      w.batch == 0 || tuning().on_chip_samples == 0) {
    return {};
  }
  OnChip plan{};
  plan.cluster = static_cast<int32_t>(cluster);
  const int64_t at_a_time =
      std::max<int64_t>(kBlocksPerMultiprocessor * device.multiprocessors / cluster, 1);
  const int64_t wanted =
      std::clamp<int64_t>(ceil_div(w.batch, at_a_time), 1, tuning().on_chip_samples);
  const int64_t half =
      device.shared_per_multiprocessor / kBlocksPerMultiprocessor - kReservedShared;
  const int64_t most = std::min(device.shared_per_block_optin, kMostShared);
  for (const int64_t room : {std::min(half, most), most}) {
    for (int64_t samples = wanted; samples > 0; --samples) {
      const bool countable = ceil_div(w.batch, samples) <= kMostBlocks / cluster;
      if (countable && lay_out(plan, w, t, samples) <= room) {
        return plan;
      }
    }
  }
  return {};
}

Plan make_plan(const Device& device, const Workload& w) {
  const bool backward = w.pass == Pass::kBackward;
  const int64_t blocks = w.channels_last ? tuning().line_blocks : tuning().slab_blocks;
  // Where batch statistics couple the samples anyway, sums may depend on the batch.
  const bool coupled = w.batch_stats || w.bn1_batch_stats;
  Plan plan{coupled ? batch_tiling(device, w, blocks, most_summed_chunks(w), kLeastLanes)
                    : sample_tiling(device, w),
            batch_tiling(device, w, blocks, most_chunks(w), kLeastLanes), on_chip_plan(device, w),
            0};
  map_blocks(plan.tiling, w.batch);  // throws where they cannot be counted
  map_blocks(plan.recombine_tiling, w.batch);
  plan.workspace_bytes = backward                   ? BackwardWorkspace(w, plan).bytes
                         : plan.on_chip.cluster > 0 ? 0
                                                    : ForwardWorkspace(device, w, plan).bytes;
  return plan;
}

namespace {

Launch late_launch_of(const Device& device, const Workload& w, const Plan& plan, Kernel kernel) {
  const int64_t threads = block_threads(device), acc = w.acc_size(), features = w.features();
  const auto launch = [&](const char* name, int64_t blocks, int64_t shared_bytes) {
    const int64_t grid = std::min(blocks, device.grid_blocks);
    return Launch{kernel, name, blocks, grid, threads, shared_bytes};
  };
  // Of a map's kernel, with so many bytes beside its slabs or lines, where it has some.
  const auto on_map = [&](const char* name, const Workload& map, const Tiling& t, int64_t bytes) {
    Launch planned = launch(name, map_blocks(t, map.batch), bytes);
    if (t.slab > 0) {
      planned.shared_bytes = t.copies_at + kBeforeSlabs + slabs_of(map) * t.slab * map.element_size;
      planned.shared_limit = slab_memory(device);
    } else if (t.copies_at > 0) {
      planned.shared_bytes = std::max(bytes, t.copies_at + kMapThreads * kLineBytes);
      planned.shared_limit = device.shared_per_block;
    }
    return planned;
  };
  // Of at least one block, which opens the stages of phase 2.
  const auto of_pool = [&](const char* name, int64_t sums) {
    Launch planned = on_map(name, w, plan.tiling, pool_bytes(plan.tiling, w, w.relu, sums));
    planned.grid = std::max<int64_t>(planned.grid, 1);
    return planned;
  };
  // In NHWC recombine with a radix that is not compiled loads splits when it needs them.
  const auto of_recombine = [&](const char* name, bool in_lines) {
    const bool copies = !w.channels_last || in_lines;
    return copies ? on_map(name, w, plan.recombine_tiling, 0)
                  : launch(name, map_blocks(plan.recombine_tiling, w.batch), 0);
  };
  const auto of_columns = [&](const char* name, int64_t columns, int64_t sums) {
    return launch(name, ceil_div(columns, kColumns), row_sums_bytes(threads, sums));
  };
  switch (kernel) {
    case Kernel::kPrepare:
      return launch("prepare", w.bn0 ? ceil_div(features, threads) : 0, 0);
    case Kernel::kStatistics: {
      const Workload map = statistics_map(w);
      const Tiling t = statistics_tiling(device, w);
      return on_map("statistics", map, t, share_sums_bytes(t, w.channels_last, 1, acc));
    }
    case Kernel::kCombine:
      return of_columns("combine", features, 1);
    case Kernel::kPool:
      return of_pool("pool", 1);
    case Kernel::kAttention:
      return launch_of_stages(device, w, kernel, forward_items(device, w, plan));
    case Kernel::kRecombine:
      return of_recombine("recombine", is_compiled(w.radix));
    case Kernel::kPoolBackward:
      return of_pool("pool_backward", w.relu ? kPrologueSums : 1);
    case Kernel::kAttentionBackward:
      return launch_of_stages(device, w, kernel, backward_items(device, w));
    case Kernel::kPrologueBackward:
      return of_columns("prologue_backward", features, 2);
    case Kernel::kRecombineBackward:
      return of_recombine("recombine_backward", true);
    case Kernel::kUpdateRunningStatistics:
      return launch("update_running_statistics", 1, 0);
    case Kernel::kOnChip: {
      const OnChip& kept = plan.on_chip;
      const int64_t blocks = ceil_div(w.batch, kept.samples) * kept.cluster;
      return {kernel,  "on_chip",  blocks,       blocks,
              threads, kept.bytes, kept.cluster, device.shared_per_block_optin};
    }
  }
  throw std::logic_error("resnest_fused: no such kernel");
}

}  // namespace

Launch launch_of(const Device& device, const Workload& w, const Plan& plan, Kernel kernel) {
  Launch launch = late_launch_of(device, w, plan, kernel);
  launch.early = begins_early(device);
  return launch;
}

std::vector<Launch> launches_of(const Device& device, const Workload& w, const Plan& plan) {
  std::vector<Launch> launches;
  for_kernels(w, plan, [&](Kernel kernel) {
    const Launch launch = launch_of(device, w, plan, kernel);
    if (launch.grid > 0) {
      launches.push_back(launch);
    }
  });
  return launches;
}

}  // namespace resnest_fused::cuda
