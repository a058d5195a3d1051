// Evaluation in one launch: clusters of blocks keep x in shared memory from the pool to recombine.
//
// The blocks of a cluster hold the parts of its samples (`OnChip`) and share the FCs' outputs. What
// all of them need, they write into each other's shared memory. Every sum has the order that it has
// in the launches of one phase each, so that the results are the same to the bit.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/cluster.cuh"
#include "cuda/pool.cuh"
#include "cuda/recombine.cuh"
#include "cuda/slab.cuh"

namespace resnest_fused::cuda {

// All phases of an evaluation.
//   Grid: clusters of `plan.cluster` blocks, each for `plan.samples` samples. Reads R units, writes
//   1, and the FCs' weights once a cluster.
template <typename T>
struct OnChipArgs {
  MapSizes sizes;
  Tiling tiling;
  OnChip plan;
  FcSizes fc;
  int64_t batch;
  const T* x;                      // (B, R*C, H, W)
  Norm<Acc<T>> bn0;                // with kPrologue
  Acc<T> per_pixel;                // 1 / HW
  Parameter fc1_weight, fc1_bias;  // (I, C/K), (I)
  Norm<Acc<T>> bn1;
  Parameter fc2_weight, fc2_bias;  // (R*C, I/K), (R*C)
  T* out;                          // (B, C, H, W)
};

#if RF_HAS_CLUSTERS

// result[m, r, c] = sum_k weight[row, k] input[m, k] with row = logit_row(r, c), for a few rows m
// in shared memory and for outputs c from `first` on. Radix 1 is a plain grouped product.
template <typename A>
struct FewRows {
  Parameter weight;
  int radix, group_outputs, group_inputs;
  int first, count;  // outputs
  int rows;
  const A* input;  // (rows, input_stride)
  int input_stride;
  A* result;  // (rows, radix, result_stride)
  int result_stride;
};

// Neighbouring threads share the depth of an output as the warps of a block do in `multiply_tile`,
// and add up their sums in the same order. A thread has 64 bytes of weights in flight.
template <bool kVectors, typename A, typename E>
__device__ __forceinline__ void multiply_few_rows(const FewRows<A>& args, const E* weight) {
  constexpr int kTogether = kVectors ? static_cast<int>(16 / sizeof(E)) : 1;
  constexpr int kSteps = kVectors ? static_cast<int>(64 / sizeof(E)) / kStep : 1;
  constexpr int kInputs = kVectors ? 4 : 1;
  const int depth = args.group_inputs, outputs = args.radix * args.count;
  const int warps = static_cast<int>(blockDim.x / kWarp);
  const int part = static_cast<int>(threadIdx.x) % warps;
  const int neighbours = static_cast<int>(threadIdx.x % kWarp) / warps * warps;
  const int on = warps * kStep;  // to a thread's next step
  for (int first = 0; first < outputs; first += static_cast<int>(kWarp)) {
    const int q = first + static_cast<int>(threadIdx.x) / warps;
    const int inside = min(q, outputs - 1);
    const int split = inside / args.count, output = args.first + inside % args.count;
    const E* const weights =
        weight + logit_row(split, output, args.radix, args.group_outputs) * depth;
    const A* const input = args.input + output / args.group_outputs * depth;
    A sums[kHeldSamples] = {};
    for (int k = part * kStep; k < depth; k += kSteps * on) {
      using Word = typename WordOf<sizeof(E) * kTogether>::Type;
      Word words[kSteps][kStep / kTogether];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int w = 0; w < kStep / kTogether; ++w) {
          // Without a branch. What is beyond the depth is not used.
          const int at = min(k + s * on + w * kTogether, depth - kTogether);
          words[s][w] = *reinterpret_cast<const Word*>(weights + at);
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        A of_weight[kStep];
#pragma unroll
        for (int e = 0; e < kStep; ++e) {
          Vector<E, kTogether> vector;
          memcpy(&vector, &words[s][e / kTogether], sizeof(vector));
          const A value = widen(vector.values[e % kTogether]);
          of_weight[e] = k + s * on + e < depth ? value : A(0);
        }
#pragma unroll
        for (int m = 0; m < kHeldSamples; ++m) {
          const A* const values = input + m * args.input_stride + k + s * on;
          if (m < args.rows) {
#pragma unroll
            for (int e = 0; e < kStep; e += kInputs) {
              // Zero times infinity would be NaN.
              Vector<A, kInputs> some{};
              if (k + s * on + e < depth) {
                some = load<kInputs>(values + e);
              }
#pragma unroll
              for (int i = 0; i < kInputs; ++i) {
                sums[m] = fma(some.values[i], of_weight[e + i], sums[m]);
              }
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kHeldSamples; ++m) {
      A total = 0;
      for (int w = 0; w < warps; ++w) {
        total += __shfl_sync(kWholeWarp, sums[m], neighbours + w);
      }
      if (m < args.rows && q < outputs && part == m % warps) {
        args.result[(m * args.radix + split) * args.result_stride + output] = total;
      }
    }
  }
}

// Every thread of the block must call.
template <typename A>
__device__ __forceinline__ void multiply_few_rows(const FewRows<A>& args) {
  with_dtype<A>(args.weight.data, args.weight.dtype, [&](const auto* weight) {
    if (reinterpret_cast<uintptr_t>(weight) % 16 == 0 && args.group_inputs % kStep == 0 &&
        args.input_stride % 4 == 0) {
      multiply_few_rows<true>(args, weight);
    } else {
      multiply_few_rows<false>(args, weight);
    }
  });
  __syncthreads();
}

// What a block of the cluster takes of so many.
struct Portion {
  int begin, count;

  __device__ __forceinline__ Portion(int rank, int blocks, int of) {
    const int each = (of + blocks - 1) / blocks;
    begin = min(rank * each, of);
    count = min(begin + each, of) - begin;
  }
};

// The slab of a part in NCHW.
template <int kVector>
__device__ __forceinline__ Slab<kVector> slab_of(const MapSizes& sizes, const Tiling& tiling,
                                                 int index) {
  const int first_channel = index % tiling.channel_blocks * (tiling.threads / tiling.lanes);
  return {sizes, tiling, first_channel, index / tiling.channel_blocks};
}

// A part of x, as rows of elements that lie together: in NCHW a slab of each split, in NHWC one of
// each pixel and split, but for a single one where the part has all channels.
template <bool kNhwc, int kVector>
struct Part {
  int64_t base;          // of the first row in the sample
  int rows, elements;    // of a row
  int64_t split, pixel;  // from a row to that of the next split or pixel, in the sample

  __device__ __forceinline__ Part(const MapSizes& sizes, const Tiling& tiling, int index) {
    if constexpr (kNhwc) {
      const int chunk = index / tiling.channel_blocks;
      const int width = tiling.lanes * kVector;
      const int channel = index % tiling.channel_blocks * width;
      const int pixels = min(tiling.chunk_pixels, sizes.pixels - chunk * tiling.chunk_pixels);
      const bool whole = tiling.channel_blocks == 1;
      split = sizes.channels;
      pixel = sizes.features();
      base = int64_t{chunk} * tiling.chunk_pixels * pixel + channel;
      rows = whole ? 1 : pixels * kOnChipRadix;
      elements = whole ? pixels * static_cast<int>(pixel) : min(width, sizes.channels - channel);
    } else {
      const Slab<kVector> slab = slab_of<kVector>(sizes, tiling, index);
      base = slab.base;
      rows = kOnChipRadix;
      elements = slab.elements;
      split = int64_t{sizes.channels} * sizes.pixels;
      pixel = 0;
    }
  }

  __device__ __forceinline__ int64_t row(int index) const {
    return base + index / kOnChipRadix * pixel + index % kOnChipRadix * split;
  }
};

// A thread's share of a part, with x in shared memory.
template <bool kNhwc, int kVector, typename T>
__device__ __forceinline__ Share<kVector, kNhwc> share_of(const OnChipArgs<T>& args, int64_t sample,
                                                          int index) {
  const MapSizes& sizes = args.sizes;
  const Tiling& tiling = args.tiling;
  Share<kVector, kNhwc> share(sizes, tiling, sample * args.plan.parts + index);
  if constexpr (kNhwc) {
    share.split = share.width;
    share.x_step = kOnChipRadix * share.width;
    share.x = share.channel - share.first_channel -
              int64_t{share.chunk} * tiling.chunk_pixels * share.x_step;
  } else {
    share.split = args.plan.row;
    share.x =
        slab_of<kVector>(sizes, tiling, index).offset(sizes, tiling, share.channel, share.chunk);
  }
  return share;
}

#endif

template <typename T, bool kNhwc, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kBlocksPerMultiprocessor)
    on_chip_kernel([[maybe_unused]] OnChipArgs<T> args) {
#if RF_HAS_CLUSTERS
  wait_for_launch_before();
  using A = Acc<T>;
  static_assert(sizeof(Arrival) == kArrivalBytes && sizeof(NormAt<A>) == kNormValues * sizeof(A));
  const Cluster cluster = cooperative_groups::this_cluster();
  const OnChip& plan = args.plan;
  const MapSizes& sizes = args.sizes;
  const int rank = static_cast<int>(cluster.block_rank());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int channels = sizes.channels, features = static_cast<int>(sizes.features());
  const int chunks = args.tiling.chunks;
  const int inter = static_cast<int>(args.fc.inter);
  const int64_t first_sample =
      int64_t{blockIdx.x / static_cast<unsigned>(plan.cluster)} * plan.samples;
  const int samples = static_cast<int>(min(int64_t{plan.samples}, args.batch - first_sample));
  const auto array = [&](int offset) { return reinterpret_cast<A*>(shared_memory() + offset); };
  Arrival* const arrivals = reinterpret_cast<Arrival*>(shared_memory() + plan.barriers);
  A* const partial = array(plan.partial);
  A* const gap = array(plan.gap);
  A* const u = array(plan.u);
  A* const attention = array(plan.attention);
  NormAt<A>* const bn1 = reinterpret_cast<NormAt<A>*>(array(plan.bn1));
  A* const fc1_bias = array(plan.fc1_bias);
  A* const fc2_bias = array(plan.fc2_bias);
  const Prologue<A> prologue{array(plan.scale), array(plan.shift), nullptr,
                             nullptr,           nullptr,           nullptr};

  // The block's parts, counted over all samples.
  const int begin = rank * plan.held, end = min(begin + plan.held, samples * plan.parts);
  const auto place = [&](int index) {
    return reinterpret_cast<T*>(shared_memory() + plan.x + (index - begin) * plan.part_bytes);
  };
  for (int index = begin + thread; index < end; index += threads) {
    const Part<kNhwc, kVector> part(sizes, args.tiling, index % plan.parts);
    arrivals[index - begin].expect(part.rows * part.elements * static_cast<int>(sizeof(T)));
  }
  __syncthreads();
  for (int i = thread; i < (end - begin) * plan.rows; i += threads) {
    const int index = begin + i / plan.rows, row = i % plan.rows;
    const Part<kNhwc, kVector> part(sizes, args.tiling, index % plan.parts);
    if (row < part.rows) {
      const int64_t sample = first_sample + index / plan.parts;
      arrivals[index - begin].copy(place(index) + row * plan.row,
                                   args.x + sample * features * sizes.pixels + part.row(row),
                                   part.elements * static_cast<int>(sizeof(T)));
    }
  }
  // Meanwhile: what is used of parameters where nothing else is to be done.
  if constexpr (kPrologue) {
    for (int f = thread; f < features; f += threads) {
      const NormAt<A> at = args.bn0.at(f);
      prologue.scale[f] = at.scale;
      prologue.shift[f] = shift_of(at);
    }
  }
  const Portion hidden(rank, plan.cluster, inter), own(rank, plan.cluster, channels);
  for (int i = thread; i < hidden.count; i += threads) {
    bn1[i] = args.bn1.at(hidden.begin + i);
    fc1_bias[i] = args.fc1_bias.template at_or<A>(hidden.begin + i, A(0));
  }
  for (int i = thread; i < kOnChipRadix * own.count; i += threads) {
    const int64_t row =
        logit_row(i / own.count, own.begin + i % own.count, kOnChipRadix, args.fc.group_channels);
    fc2_bias[i] = args.fc2_bias.template at_or<A>(row, A(0));
  }
  cluster.sync();  // all blocks have begun, and may be written to

  for (int index = begin; index < end; ++index) {
    const int sample = index / plan.parts;
    arrivals[index - begin].wait();
    const auto share = share_of<kNhwc, kVector>(args, first_sample + sample, index % plan.parts);
    A sums[1][kOwnSums<kVector, kNhwc>] = {};
    T* const x = place(index);
    pool_share<kOnChipRadix, kPrologue, false>(share, x, kOnChipRadix, x, sums,
                                               [&](auto& held, int first_split) {
                                                 if constexpr (kPrologue) {
                                                   held.take(share, sizes, prologue, first_split);
                                                 }
                                               });
    sum_over_share(share, args.tiling, channels, sums, [&](int, int c, A total) {
      if (chunks > 1) {
        put_in_all(cluster, partial + (sample * chunks + share.chunk) * channels + c, total);
      } else {
        put_in_all(cluster, gap + sample * channels + c, total * args.per_pixel);
      }
    });
  }
  cluster.sync();
  if (chunks > 1) {
    const GapArgs<A> sums{samples, chunks, channels, partial, args.per_pixel, gap};
    for (int item = 0; item * threads < samples * channels; ++item) {
      gap_item(sums, item);
    }
    __syncthreads();
  }

  // Both FCs by the same code: it is long.
  const int group_channels = static_cast<int>(args.fc.group_channels);
  const int group_inter = static_cast<int>(args.fc.group_inter);
#pragma unroll 1
  for (int fc = 1; fc <= 2; ++fc) {
    const bool first = fc == 1;
    const Portion outputs = first ? hidden : own;
    multiply_few_rows<A>({first ? args.fc1_weight : args.fc2_weight, first ? 1 : kOnChipRadix,
                          first ? group_inter : group_channels,
                          first ? group_channels : group_inter, outputs.begin, outputs.count,
                          samples, first ? gap : u, first ? channels : inter, first ? u : attention,
                          first ? inter : channels});
    for (int i = thread; i < samples * outputs.count; i += threads) {
      const int sample = i / outputs.count, output = i % outputs.count;
      if (first) {
        A* const at = u + sample * inter + outputs.begin + output;
        put_in_all(cluster, at, relu(bn1[output].normalise(*at + fc1_bias[output])));
      } else {
        A* const logits = attention + sample * features + outputs.begin + output;
#pragma unroll
        for (int r = 0; r < kOnChipRadix; ++r) {
          logits[r * channels] += fc2_bias[r * outputs.count + output];
        }
        r_softmax(logits, channels, kOnChipRadix, Exp<A>{});
#pragma unroll
        for (int r = 0; r < kOnChipRadix; ++r) {
          put_in_all(cluster, logits + r * channels, logits[r * channels]);
        }
      }
    }
    cluster.sync();  // after the last one no block reaches another one
  }

  for (int index = begin; index < end; ++index) {
    const int sample = index / plan.parts, part = index % plan.parts;
    T* const x = place(index);
    auto share = share_of<kNhwc, kVector>(args, first_sample + sample, part);
    const auto recombine = [&](auto put) {
      recombine_share<kOnChipRadix, kPrologue, false>(
          share, sizes, x, x, attention + sample * features, prologue, [] {}, put);
    };
    if constexpr (kNhwc) {
      recombine([&](int64_t offset, const auto& result) { store(args.out + offset, result); });
    } else {
      // Over the first split, whose element nobody else needs. Rows of few elements go to memory
      // in vectors from there.
      share.out = share.x;
      recombine([&](int64_t offset, const auto& result) { store_shared(x + offset, result); });
      __syncthreads();
      const int64_t of_sample = int64_t{channels} * sizes.pixels;
      slab_of<kVector>(sizes, args.tiling, part)
          .leave(args.out + (first_sample + sample) * of_sample, x);
    }
  }
#endif
}

}  // namespace resnest_fused::cuda
