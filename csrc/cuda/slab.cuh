// Slabs: what a block has of a map in NCHW, where the elements of its channels lie together.
//
// With vectors a map's kernel brings its slabs into shared memory before it begins, and works on
// them there. The copies hold no registers, so that all of a block's part is in flight at a time,
// and no element is loaded by itself, however the rows of pixels lie. Results leave from there too.
//
// From sm_90 on one thread asks for each slab as a whole. Before, all threads ask for a vector at a
// time; before sm_80 that is a load and a store, four of them together.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/line.cuh"

namespace resnest_fused::cuda {

template <int kVector, bool kNhwc>
constexpr bool kInSlabs = !kNhwc && kVector > 1;

// Resident blocks of a map's kernel that there are registers for.
template <int kVector, bool kNhwc>
constexpr int64_t kMapBlocks = kInSlabs<kVector, kNhwc> ? kSlabBlocks : kBlocksPerMultiprocessor;

// Where a slab is in a split of the sample. It comes in whole vectors, so it may have other
// channels' elements at its ends, too; not those of another sample, which has whole vectors.
template <int kVector>
struct Slab {
  int64_t base;     // of the first vector
  int first, last;  // elements that are the block's
  int elements;

  __device__ __forceinline__ Slab(const MapSizes& sizes, const Tiling& tiling, int first_channel,
                                  int chunk) {
    const int channels = min(tiling.threads / tiling.lanes, sizes.channels - first_channel);
    const int first_pixel = chunk * tiling.chunk_pixels;
    const int pixels = min(tiling.chunk_pixels, sizes.pixels - first_pixel);
    const int64_t begin = int64_t{first_channel} * sizes.pixels + first_pixel;
    base = begin / kVector * kVector;
    first = static_cast<int>(begin - base);
    last = first + (channels - 1) * sizes.pixels + pixels;
    elements = (last + kVector - 1) / kVector * kVector;
  }

  // Of a channel's first element of the chunk.
  __device__ __forceinline__ int64_t offset(const MapSizes& sizes, const Tiling& tiling,
                                            int channel, int chunk) const {
    return int64_t{channel} * sizes.pixels + chunk * tiling.chunk_pixels - base;
  }

  // Store the block's elements in a split.
  template <typename T>
  __device__ __forceinline__ void leave(T* split, const T* from) const {
    T* const to = split + base;
    const int step = static_cast<int>(blockDim.x) * kVector;
    for (int i = static_cast<int>(threadIdx.x) * kVector; i < last; i += step) {
      if (i >= first && i + kVector <= last) {
        store(to + i, load<kVector>(from + i));
      } else {
        for (int e = max(i, first); e < min(i + kVector, last); ++e) {
          to[e] = from[e];
        }
      }
    }
  }
};

// Where a block reads the splits of maps, and where it puts results: where they are,
template <typename T, int kVector, bool kNhwc, bool = kInSlabs<kVector, kNhwc>>
struct Slabs {
  __device__ __forceinline__ Slabs(Share<kVector, kNhwc>&, const MapSizes&, const Tiling&, int,
                                   bool) {}

  __device__ __forceinline__ const T* bring(int, const T* map, int) const { return map; }
  __device__ __forceinline__ void wait() const {}

  template <int kWidth>
  __device__ __forceinline__ void put(T* map, int64_t offset,
                                      const Vector<T, kWidth>& vector) const {
    store(map + offset, vector);
  }
  __device__ __forceinline__ void leave(T*, int) const {}
};

// or in so many slabs, one for each split, which the share's offsets are for from here on. All
// threads of the block call all functions. `again`: not for the first time in this kernel.
template <typename T, int kVector, bool kNhwc>
struct Slabs<T, kVector, kNhwc, true> {
  Slab<kVector> slab;
  unsigned char* begin;
  T* memory;
  int room;           // of a slab
  int64_t in_splits;  // elements of a split
  int64_t sample;

  __device__ __forceinline__ Slabs(Share<kVector, kNhwc>& share, const MapSizes& sizes,
                                   const Tiling& tiling, [[maybe_unused]] int count, bool again)
      : slab(sizes, tiling, share.first_channel, share.chunk),
        begin(shared_memory() + tiling.copies_at),
        memory(reinterpret_cast<T*>(begin + kBeforeSlabs)),
        room(tiling.slab),
        in_splits(int64_t{sizes.channels} * sizes.pixels),
        sample(share.sample) {
    share.x = share.out = slab.offset(sizes, tiling, share.channel, share.chunk);
    share.split = room;
    if (again) {
      __syncthreads();  // all are done with what was there
    }
#if RF_HAS_CLUSTERS
    if (threadIdx.x == 0) {
      if (again) {
        arrival().end();
      }
      arrival().expect(count * bytes());
    }
#endif
  }

  __device__ __forceinline__ int bytes() const {
    return slab.elements * static_cast<int>(sizeof(T));
  }
#if RF_HAS_CLUSTERS
  __device__ __forceinline__ Arrival& arrival() const { return *reinterpret_cast<Arrival*>(begin); }
#endif

  // Begin to copy the splits of a map into the slabs from `index` on, and say where these are;
  __device__ __forceinline__ const T* bring(int index, const T* map, int splits) const {
    const T* const from = map + sample * splits * in_splits + slab.base;
    T* const to = memory + index * room;
#if RF_HAS_CLUSTERS
    if (threadIdx.x == 0) {
      for (int split = 0; split < splits; ++split) {
        arrival().copy(to + split * room, from + split * in_splits, bytes());
      }
    }
#else
    constexpr int kTogether = 4;
    const int step = static_cast<int>(blockDim.x) * kVector;
    for (int split = 0; split < splits; ++split) {
      for (int first = static_cast<int>(threadIdx.x) * kVector; first < slab.elements;
           first += kTogether * step) {
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          const int i = first + u * step;
          if (i < slab.elements) {
            __pipeline_memcpy_async(to + split * room + i, from + split * in_splits + i,
                                    kVector * sizeof(T));
          }
        }
      }
    }
#endif
    return to;
  }
  // wait for all of them;
  __device__ __forceinline__ void wait() const {
#if RF_HAS_CLUSTERS
    __syncthreads();  // there is something to wait for
    arrival().wait();
#else
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
#endif
  }

  // put elements into the first slabs, where only this thread has read;
  template <int kWidth>
  __device__ __forceinline__ void put(T*, int64_t offset, const Vector<T, kWidth>& vector) const {
    store_shared(memory + offset, vector);
  }
  // and store these as the splits of a map.
  __device__ __forceinline__ void leave(T* map, int splits) const {
    __syncthreads();
    for (int split = 0; split < splits; ++split) {
      slab.leave(map + (sample * splits + split) * in_splits, memory + split * room);
    }
  }
};

}  // namespace resnest_fused::cuda
