// Lines: how the vectors of maps come to a thread, those of one position side by side.
//
// In NHWC the vectors of a position lie far from those of the next one, so each is copied by
// itself, from sm_80 on to a place of its thread in shared memory. A thread asks for those of its
// next positions, which are in flight while it works, and hold no registers. No other thread waits
// for them. Before sm_80, and where a map is in shared memory already, it loads them when it needs
// them.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/map.cuh"

// A compiler for another processor takes the code for a GPU that copies by itself, or with
// RF_OLDER_GPU for one that does not.
#if defined(__CUDACC__) ? defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 : !defined(RF_OLDER_GPU)
#define RF_HAS_COPIES 1
#else
#define RF_HAS_COPIES 0
#endif

namespace resnest_fused::cuda {

template <int kVector, bool kNhwc>
constexpr bool kInLines = RF_HAS_COPIES && kNhwc && kVector > 1;

// The splits of a map, and another map with them: element e of position p of the m-th is
// from[m][p * step[m] + e].
template <typename T, int kMaps>
struct Maps {
  const T* from[kMaps];
  int64_t step[kMaps];

  __device__ __forceinline__ void set(int m, const T* first, int64_t to_next) {
    from[m] = first;
    step[m] = to_next;
  }
};

// Where the lines of a block are.
template <typename T>
__device__ __forceinline__ T* lines(const Tiling& tiling) {
  return reinterpret_cast<T*>(shared_memory() + tiling.copies_at);
}

// A thread's share of maps, kBatch positions at a time: as they are loaded,
template <int kBatch, bool kInLine, typename T, int kMaps, int kVector, bool kNhwc>
struct Line {
  const Share<kVector, kNhwc>& share;
  const Maps<T, kMaps>& maps;

  __device__ __forceinline__ Line(const Share<kVector, kNhwc>& of, const Maps<T, kMaps>& all, T*)
      : share(of), maps(all) {}

  // Call visit(width, values, first, step, end) as `Share::for_each` does, with the values of each
  // map at these positions. Those of positions beyond the end mean nothing.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    share.template for_each<kBatch>([&](auto width, int first, int step, int end) {
      Vector<T, decltype(width)::value> values[kMaps][kBatch];
#pragma unroll
      for (int m = 0; m < kMaps; ++m) {
        load_batch(maps.from[m], 0, maps.step[m], first, step, end, values[m]);
      }
      visit(width, values, first, step, end);
    });
  }

  // Before a block's shared memory is used for something else.
  __device__ __forceinline__ void end() const {}
};

// or in a line, in kLineBytes of shared memory for each thread.
template <int kBatch, typename T, int kMaps, int kVector, bool kNhwc>
struct Line<kBatch, true, T, kMaps, kVector, kNhwc> {
  // Places of neighbouring threads lie side by side.
  static constexpr int kApart = static_cast<int>(kMapThreads) * kVector;
  static constexpr int kStage = kMaps * kBatch * kApart;
  static constexpr int kMemory = static_cast<int>(kMapThreads * kLineBytes / sizeof(T));
  static constexpr int kStages = kMemory / kStage;
  static_assert(kStages >= 2);

  const Share<kVector, kNhwc>& share;
  Maps<T, kMaps> maps;
  T* const places;
  int asked;  // for the positions before this one

  __device__ __forceinline__ Line(const Share<kVector, kNhwc>& of, const Maps<T, kMaps>& all,
                                  T* memory)
      : share(of),
        maps(all),
        places(memory + static_cast<int>(threadIdx.x) * kVector),
        asked(of.begin) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      maps.from[m] += share.begin * maps.step[m];
      maps.step[m] *= share.step;
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      ask(places + stage * kStage);
    }
  }

  __device__ __forceinline__ void ask(T* stage) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (asked < share.end) {
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          __pipeline_memcpy_async(stage + (u * kMaps + m) * kApart, maps.from[m],
                                  sizeof(T) * kVector);
          maps.from[m] += maps.step[m];
        }
      }
      asked += share.step;
    }
    __pipeline_commit();
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    T* stage = places;
    for (int first = share.begin; first < share.end; first += kBatch * share.step) {
      __pipeline_wait_prior(kStages - 1);
#if defined(__CUDACC__)
      asm volatile("" ::: "memory");  // the wait does not tell the compiler that memory changes
#endif
      Vector<T, kVector> values[kMaps][kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
#pragma unroll
        for (int m = 0; m < kMaps; ++m) {
          values[m][u] = load<kVector>(stage + (u * kMaps + m) * kApart);
        }
      }
      ask(stage);
      stage = stage == places + (kStages - 1) * kStage ? places : stage + kStage;
      visit(std::integral_constant<int, kVector>{}, values, first, share.step, share.end);
    }
  }

  __device__ __forceinline__ void end() const { __syncthreads(); }
};

}  // namespace resnest_fused::cuda
