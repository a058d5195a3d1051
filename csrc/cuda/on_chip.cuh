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

// A part of one split: elements [begin, end) of the split's, in NHWC of the sample's. The room of a
// split in shared memory begins at a whole vector, `base`.
template <bool kNhwc>
struct Part {
  int64_t begin, end, base;

  __device__ __forceinline__ Part(const MapSizes& sizes, const Tiling& tiling, int part) {
    const int64_t width = kNhwc ? tiling.chunk_pixels : tiling.threads / tiling.lanes;
    const int64_t all = kNhwc ? sizes.pixels : sizes.channels;
    const int64_t each = kNhwc ? sizes.features() : sizes.pixels;
    begin = part * width * each;
    end = min((part + 1) * width, all) * each;
    base = begin / tiling.vector * tiling.vector;
  }
};

// Lets a part of x come into shared memory. In NCHW the vectors at the ends may hold other
// channels' elements, too.
template <bool kNhwc, typename T>
__device__ __forceinline__ void bring(const OnChipArgs<T>& args, Arrival& arrival, T* to,
                                      int64_t sample, int index) {
  const MapSizes& sizes = args.sizes;
  const int vector = args.tiling.vector;
  const Part<kNhwc> part(sizes, args.tiling, index);
  const T* const x = args.x + sample * sizes.features() * sizes.pixels + part.base;
  const int64_t elements = (part.end - part.base + vector - 1) / vector * vector;
  const int bytes = static_cast<int>(elements * sizeof(T));
  const int splits = kNhwc ? 1 : kOnChipRadix;
  arrival.expect(splits * bytes);
  for (int r = 0; r < splits; ++r) {
    arrival.copy(to + r * args.plan.split, x + int64_t{r} * sizes.channels * sizes.pixels, bytes);
  }
}

// Call visit(share) for the map's blocks in a part, with x in shared memory.
template <bool kNhwc, int kVector, typename T, typename Visit>
__device__ __forceinline__ void for_shares(const OnChipArgs<T>& args, int64_t sample, int index,
                                           Visit visit) {
  const Tiling& tiling = args.tiling;
  const Part<kNhwc> part(args.sizes, tiling, index);
  const int blocks = kNhwc ? tiling.channel_blocks : 1;
  for (int block = 0; block < blocks; ++block) {
    Share<kVector, kNhwc> share(args.sizes, tiling,
                                (sample * args.plan.parts + index) * blocks + block);
    if constexpr (kNhwc) {
      share.x = share.channel - part.base;
    } else {
      share.x = int64_t{share.channel} * args.sizes.pixels - part.base;
      share.split = args.plan.split;
    }
    visit(share);
  }
}

// In NCHW: a part of the result, from where it lines up with out.
template <int kVector, typename T>
__device__ __forceinline__ void store_part(const OnChipArgs<T>& args, const T* from, int64_t sample,
                                           int index) {
  const Part<false> part(args.sizes, args.tiling, index);
  T* const out = args.out + sample * args.sizes.channels * args.sizes.pixels + part.base;
  const int first = static_cast<int>(part.begin - part.base);
  const int last = static_cast<int>(part.end - part.base);
  const int step = static_cast<int>(blockDim.x) * kVector;
  for (int i = static_cast<int>(threadIdx.x) * kVector; i < last; i += step) {
    if (i >= first && i + kVector <= last) {
      store(out + i, load<kVector>(from + i));
    } else {
      for (int e = max(i, first); e < min(i + kVector, last); ++e) {
        out[e] = from[e];
      }
    }
  }
}

#endif

template <typename T, bool kNhwc, int kVector, bool kPrologue>
__global__ void __launch_bounds__(kMapThreads, kBlocksPerMultiprocessor)
    on_chip_kernel(OnChipArgs<T> args) {
#if RF_HAS_CLUSTERS
  using A = Acc<T>;
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
    bring<kNhwc>(args, arrivals[index - begin], place(index), first_sample + index / plan.parts,
                 index % plan.parts);
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
    for_shares<kNhwc, kVector>(
        args, first_sample + sample, index % plan.parts, [&](const Share<kVector, kNhwc>& share) {
          A sums[1][kOwnSums<kVector, kNhwc>] = {};
          pool_share<kOnChipRadix, kPrologue>(
              share, place(index), kOnChipRadix, sums,
              [&](auto& held, int first_split) { held.take(share, sizes, prologue, first_split); });
          sum_over_share(share, args.tiling, channels, sums, [&](int c, A(&totals)[1]) {
            if (chunks > 1) {
              put_in_all(cluster, partial + (sample * chunks + share.chunk) * channels + c,
                         totals[0]);
            } else {
              put_in_all(cluster, gap + sample * channels + c, totals[0] * args.per_pixel);
            }
          });
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
    for_shares<kNhwc, kVector>(args, first_sample + sample, part, [&](Share<kVector, kNhwc> share) {
      T* out = args.out;
      if constexpr (!kNhwc) {
        // Over the first split, of which nobody else needs the element.
        out = x;
        share.out = share.x;
      }
      recombine_share<kOnChipRadix, kPrologue>(share, sizes, x, attention + sample * features,
                                               prologue, [&](int64_t offset, const auto& result) {
                                                 if constexpr (kNhwc) {
                                                   store(out + offset, result);
                                                 } else {
                                                   store_shared(out + offset, result);
                                                 }
                                               });
    });
    if constexpr (!kNhwc) {
      __syncthreads();
      store_part<kVector>(args, x, first_sample + sample, part);
    }
  }
#endif
}

}  // namespace resnest_fused::cuda
