// How the threads of a block walk over their share of a map, in both memory formats.
//
// A thread works on one vector of channels (NHWC) or on one channel (NCHW) of one sample, at some
// of its positions. A position is a pixel; in NCHW a vector covers several of them. The element of
// split r at position p is x[r * split + p * x_step]; the output's is out[p * out_step].
//
// Vectors start at multiples of their own size, but in NCHW a channel's pixels need not. Elements
// before the first and behind the last vector are taken one by one. Which these are depends on the
// channel and the chunk alone, as a sample has a multiple of a vector's elements; so does the order
// of sums.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tiling.h"

namespace resnest_fused::cuda {

// The sizes of a map with `radix` splits of `channels` channels.
struct MapSizes {
  int32_t radix;
  int32_t channels;
  int32_t pixels;

  __device__ __forceinline__ int64_t features() const { return int64_t{radix} * channels; }
};

template <int kVector, bool kNhwc>
struct Share {
  int64_t sample;
  int chunk;
  int first_channel, width;  // of the block
  int channel;               // the first of a vector in NHWC
  int lane;  // among those that share the sums: in NCHW of the channel, in NHWC of the chunk
  int lanes;
  bool inside;           // of the channels
  int pixels;            // of the chunk
  int begin, end, step;  // positions of the thread's vectors; in NCHW from the chunk's first pixel
  int singles, head;     // in NCHW, elements outside of vectors; those before the first one
  int64_t x, out, split, x_step, out_step;  // offsets of elements

  // The share of this thread in block `item` of a map's blocks.
  __device__ __forceinline__ Share(const MapSizes& sizes, const Tiling& tiling, int64_t item) {
    const int thread = static_cast<int>(threadIdx.x);
    const unsigned blocks =
        static_cast<unsigned>(tiling.channel_blocks) * static_cast<unsigned>(tiling.chunks);
    const unsigned index = static_cast<unsigned>(item);  // at most kMostBlocks
    sample = index / blocks;
    const int block = static_cast<int>(index % blocks);
    chunk = block / tiling.channel_blocks;
    const int channel_block = block % tiling.channel_blocks;
    const int slot = thread / tiling.lanes, within = thread % tiling.lanes;
    const int first_pixel = chunk * tiling.chunk_pixels;
    pixels = min(tiling.chunk_pixels, sizes.pixels - first_pixel);
    if constexpr (kNhwc) {
      width = tiling.lanes * kVector;
      first_channel = channel_block * width;
      channel = first_channel + within * kVector;
      lane = slot;
      lanes = tiling.threads / tiling.lanes;
      inside = channel < sizes.channels && slot < lanes;
      begin = first_pixel + slot;
      end = first_pixel + pixels;
      step = lanes;
      singles = head = 0;
      x = sample * sizes.pixels * sizes.features() + channel;
      out = sample * sizes.pixels * sizes.channels + channel;
      split = sizes.channels;
      x_step = sizes.features();
      out_step = sizes.channels;
    } else {
      width = tiling.threads / tiling.lanes;
      first_channel = channel_block * width;
      channel = first_channel + slot;
      lane = within;
      lanes = tiling.lanes;
      inside = channel < sizes.channels;
      const int64_t in_sample = int64_t{channel} * sizes.pixels + first_pixel;
      head = min((kVector - static_cast<int>(in_sample % kVector)) % kVector, pixels);
      const int vectors = (pixels - head) / kVector;
      begin = head + lane * kVector;
      end = head + vectors * kVector;
      step = lanes * kVector;
      singles = pixels - vectors * kVector;
      x = sample * sizes.pixels * sizes.features() + in_sample;
      out = sample * sizes.pixels * sizes.channels + in_sample;
      split = int64_t{sizes.channels} * sizes.pixels;
      x_step = out_step = 1;
    }
    if (!inside) {
      end = begin;
      singles = 0;
    }
  }

  // Call visit(width, first, step, end) for batches of up to kBatch positions: first, first + step,
  // ... below end. Each has elements of the width, a std::integral_constant.
  template <int kBatch, typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (int first = begin; first < end; first += kBatch * step) {
      visit(std::integral_constant<int, kVector>{}, first, step, end);
    }
    if constexpr (!kNhwc && kVector > 1) {
      for (int single = lane; single < singles; single += lanes) {
        const int position = single < head ? single : end + single - head;
        visit(std::integral_constant<int, 1>{}, position, 1, position + 1);
      }
    }
  }
};

// A value for each channel of a thread's vector: one in NCHW, where a vector has one channel.
template <typename A, int kVector, bool kNhwc>
struct PerChannel {
  static constexpr int kCount = kNhwc ? kVector : 1;
  A values[kCount];

  // From an array by feature, `first` and those behind it, aligned as the map is. Without an array
  // all are `otherwise`.
  static __device__ __forceinline__ PerChannel of(const A* array, int64_t first, A otherwise,
                                                  bool inside) {
    PerChannel result;
    constexpr int kTogether = kCount * sizeof(A) >= 16 ? static_cast<int>(16 / sizeof(A)) : 1;
#pragma unroll
    for (int e = 0; e < kCount; e += kTogether) {
      Vector<A, kTogether> part;
      if (array && inside) {
        part = load<kTogether>(array + first + e);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        result.values[e + i] = array && inside ? part.values[i] : otherwise;
      }
    }
    return result;
  }

  __device__ __forceinline__ A operator[](int element) const { return values[kNhwc ? element : 0]; }
};

// Sums that a thread keeps of each kind: one for each channel it works on.
template <int kVector, bool kNhwc>
constexpr int kOwnSums = kNhwc ? kVector : 1;

// Elements of a batch of positions, loaded before any is used; zeros beyond the end.
template <typename T, int kWidth, int kBatch>
__device__ __forceinline__ void load_batch(const T* from, int64_t offset, int64_t offset_step,
                                           int first, int step, int end,
                                           Vector<T, kWidth> (&batch)[kBatch]) {
#pragma unroll
  for (int u = 0; u < kBatch; ++u) {
    const int position = first + u * step;
    if (position < end) {
      batch[u] = load<kWidth>(from + offset + position * offset_step);
    } else {
      batch[u] = {};
    }
  }
}

// A block's partial sums of `kSums` kinds for each of its channels, over its threads in fixed
// order. One thread calls put(kind, channel, sum) for each channel inside. Shared memory:
// share_sums_bytes.
template <int kSums, int kVector, bool kNhwc, typename A, typename Put>
__device__ __forceinline__ void sum_over_share(const Share<kVector, kNhwc>& share,
                                               const Tiling& tiling, int channels,
                                               A (&sums)[kSums][kOwnSums<kVector, kNhwc>],
                                               Put put) {
  if constexpr (kNhwc) {
    A* const buffer = shared<A>();
    const int width = share.width, first = share.first_channel;
    const int thread = static_cast<int>(threadIdx.x);
    const int within = thread % tiling.lanes;
    if (thread < share.lanes * tiling.lanes) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          buffer[(share.lane * kSums + s) * width + within * kVector + e] =
              share.inside ? sums[s][e] : A{};
        }
      }
    }
    __syncthreads();
    for (int i = thread; i < kSums * width; i += tiling.threads) {
      const int channel = first + i % width;
      A total = 0;
      for (int row = 0; row < share.lanes; ++row) {
        total += buffer[row * kSums * width + i];
      }
      if (channel < channels) {
        put(i / width, channel, total);
      }
    }
    __syncthreads();
  } else {
    A totals[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      totals[s] = sums[s][0];
    }
    sum_over_lanes(totals, share.lanes);
    if (share.inside && share.lane == 0) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        put(s, share.channel, totals[s]);
      }
    }
  }
}

}  // namespace resnest_fused::cuda
