// How the work of a call is cut into blocks and threads: what kernels and the host both count with.
#pragma once

#include <cstdint>
#include <limits>

namespace resnest_fused::cuda {

constexpr int64_t kWarp = 32;
// Threads of the blocks that work on maps, and of those that multiply matrices. With at most
// kRegisters registers a thread, kBlocksPerMultiprocessor such blocks are resident on every
// architecture from sm_75 on (65,536 registers, 1,024 threads).
constexpr int64_t kMapThreads = 256;
constexpr int64_t kProductThreads = 256;
constexpr int64_t kBlocksPerMultiprocessor = 2;
constexpr int64_t kRegisters = 128;
// Of blocks with slabs more are, as some copy while others work.
constexpr int64_t kSlabBlocks = 3;
// Threads of the blocks that add up over rows, and the columns of each block.
constexpr int64_t kColumnThreads = 256;
constexpr int64_t kColumns = 8;
// The tile of a matrix product that a block takes.
constexpr int64_t kTileRows = 32;
constexpr int64_t kTileColumns = 16;
constexpr int kTileSize = kTileRows * kTileColumns;
// Kernels count the blocks of a map, its channels, and a sample's pixels in 32 bits. Their loops
// step a little beyond the last pixel.
constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostPixels = int64_t{1} << 30;
constexpr int64_t kMostChannels = int64_t{1} << 30;
// So are a matrix's rows and columns, with those of a last tile that are not there.
constexpr int64_t kMostRows = kMostBlocks - kTileRows;

// How blocks and their threads share a map. A block works on one sample.
//   NCHW: `lanes` threads share the pixels of a channel; threads/lanes channels a block. With
//         vectors the block first brings what it has of each split, which lies together, into a
//         slab of shared memory (slab.cuh). A chunk has all pixels, but where they are too many for
//         a slab: then a block has a chunk of one channel.
//   NHWC: `lanes` threads stand side by side along the channels, a vector each; threads/lanes of
//         these rows share the pixels of a chunk.
struct Tiling {
  int32_t threads;
  int32_t lanes;
  int32_t vector;          // elements a thread loads at a time: vector_elements, or 1
  int32_t channel_blocks;  // blocks along the channels
  int32_t chunk_pixels;    // pixels of a chunk
  int32_t chunks;          // chunks of a sample, each with partial sums of its own
  int32_t slab;            // in elements, the room of a slab; 0: there are none
  int32_t copies_at;       // in bytes, where slabs or lines begin in a block's shared memory

  int64_t blocks_per_sample() const { return int64_t{channel_blocks} * chunks; }
};

// Of 16 bytes; in NHWC of four channels, as a thread has registers for parameters and sums of each,
// in every split that it loads at the same time.
constexpr int64_t vector_elements(bool nhwc, int64_t element_size) {
  return nhwc ? 4 : 16 / element_size;
}

// With vectors kernels are compiled for each radix of the published networks, and for any other
// one.
constexpr bool is_compiled(int64_t radix) { return radix == 1 || radix == 2 || radix == 4; }

// Threads of a channel in NCHW, at least, of a kernel that keeps bn0's parameters: with vectors and
// with single elements. In NHWC at most kWarp are side by side.
constexpr int64_t kLeastLanes = 2;
constexpr int64_t kLeastSingleLanes = 8;
// Features whose bn0 parameters a block of the pool keeps in shared memory at a time, at most; with
// single elements kWarp.
constexpr int64_t kHeldFeatures = 512;

// Bytes of a thread in NHWC with vectors, in which what it has asked for waits (line.cuh).
constexpr int64_t kLineBytes = 168;
// Bytes before a block's slabs, for what their copies wait at.
constexpr int64_t kBeforeSlabs = 16;

// What an evaluation that keeps x on chip is compiled for: the radix of the published networks, and
// samples of a cluster of blocks, at most.
constexpr int kOnChipRadix = 2;
constexpr int kHeldSamples = 4;
// Sizes that the planner does not see: bytes of cluster.cuh's Arrival, and values of NormAt.
constexpr int kArrivalBytes = 8;
constexpr int kNormValues = 5;

// How an evaluation keeps x on chip: a cluster of blocks holds `samples`, in parts. A part is what
// a block of the pool takes. It has rows of elements that lie together in x. In bytes, where each
// array begins in a block's shared memory; all blocks have all arrays but the parts.
struct OnChip {
  int32_t cluster;     // blocks of a cluster; 0: x is not kept
  int32_t samples;     // of a cluster
  int32_t parts;       // of a sample
  int32_t held;        // parts of a block
  int32_t rows;        // of a part, at most
  int32_t row;         // the room of one, in elements
  int32_t part_bytes;  // the room of a part
  int32_t barriers;    // (held); before them is the room that sums over threads need
  int32_t scale;       // (R*C), bn0's; with a prologue
  int32_t shift;       // (R*C)
  int32_t bn1;         // of the block's hidden features, as NormAt
  int32_t fc1_bias;    // of those
  int32_t fc2_bias;    // (R, the block's channels)
  int32_t partial;     // (samples, chunks, C); of several chunks
  int32_t gap;         // (samples, C)
  int32_t u;           // (samples, I)
  int32_t attention;   // (samples, R, C)
  int32_t x;           // (held)
  int32_t bytes;       // of all
};

// The stages of phase 2, in their order: each waits for one before it (stages.cuh).
struct ForwardStage {
  enum : int { kGap, kHidden, kBatchNorm, kAttention, kCount };
};
struct BackwardStage {
  enum : int {
    kLogits,
    kHidden,
    kBatchNorm,
    kGap,
    kFc2Weight,
    kFc1Weight,
    kFc2Bias,
    kPrologue,
    kCount
  };
};
// Counters of such a launch: the items that were taken, and those of each stage that are done.
constexpr int kCounters = 1 + BackwardStage::kCount;

// Every kernel, by phase.
enum class Kernel : int32_t {
  kPrepare,
  kStatistics,
  kCombine,
  kPool,
  kAttention,
  kRecombine,
  kPoolBackward,
  kAttentionBackward,
  kPrologueBackward,
  kRecombineBackward,
  kUpdateRunningStatistics,
  kOnChip,
};

// A kernel's launch.
struct Launch {
  Kernel kernel;
  const char* name;
  int64_t blocks;
  int64_t grid;  // kernels walk over the blocks where these are more
  int64_t threads;
  int64_t shared_bytes;
  int64_t cluster = 1;  // blocks that run together and reach each other's shared memory
  // Bytes of it that the kernel asks to be allowed, where it needs much; 0: as all kernels.
  int64_t shared_limit = 0;
  bool early = false;  // its blocks may start while the launch before it still runs
};

}  // namespace resnest_fused::cuda
