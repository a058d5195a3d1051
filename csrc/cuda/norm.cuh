// Batch normalisation at one feature, and the sums over rows that its statistics and gradients
// need.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tiling.h"
#include "formulas.h"

namespace resnest_fused::cuda {

template <typename A>
struct NormAt {
  A mean, invstd, gamma, beta, scale;  // scale = gamma * invstd

  __device__ __forceinline__ A normalise(A value) const {
    return batch_norm(value, mean, scale, beta);
  }
  __device__ __forceinline__ A xhat(A value) const { return (value - mean) * invstd; }
};

// The parameters of a norm. Without a mean it is absent: the identity.
template <typename A>
struct Norm {
  Parameter weight;  // (F) or absent
  Parameter bias;    // (F) or absent
  Parameter mean;    // (F)
  Parameter var;     // (F), biased
  A eps;

  __device__ __forceinline__ NormAt<A> with(int64_t f, A of_mean, A of_var) const {
    NormAt<A> at;
    at.mean = of_mean;
    at.invstd = A(1) / sqrt(of_var + eps);
    at.gamma = weight.at_or<A>(f, A(1));
    at.beta = bias.at_or<A>(f, A(0));
    at.scale = at.gamma * at.invstd;
    return at;
  }
  __device__ __forceinline__ NormAt<A> at(int64_t f) const {
    if (!mean.data) {
      return {A(0), A(1), weight.at_or<A>(f, A(1)), bias.at_or<A>(f, A(0)),
              weight.at_or<A>(f, A(1))};
    }
    return with(f, mean.at<A>(f), var.at<A>(f));
  }
};

// A thread's column. The block's threads stand in rows of kColumns, a column each, which share the
// rows of the data.
struct Column {
  int64_t feature;
  int lane, lanes;
  bool inside;

  __device__ __forceinline__ Column(int64_t block, int64_t features) {
    feature = block * kColumns + threadIdx.x % kColumns;
    lane = static_cast<int>(threadIdx.x / kColumns);
    lanes = static_cast<int>(blockDim.x / kColumns);
    inside = feature < features;
  }
};

// Rows of a column that a thread loads together.
constexpr int kRowsTogether = 8;

// Call use(row, value) for each of a thread's rows. load(row) gives the value: those of several
// rows are loaded before the first is used.
template <typename Load, typename Use>
__device__ __forceinline__ void for_rows(const Column& column, int64_t rows, Load load, Use use) {
  if (!column.inside) {
    return;
  }
  for (int64_t first = column.lane; first < rows; first += kRowsTogether * column.lanes) {
    decltype(load(first)) values[kRowsTogether];
#pragma unroll
    for (int i = 0; i < kRowsTogether; ++i) {
      const int64_t row = first + i * column.lanes;
      if (row < rows) {
        values[i] = load(row);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsTogether; ++i) {
      const int64_t row = first + i * column.lanes;
      if (row < rows) {
        use(row, values[i]);
      }
    }
  }
}

// Sums over rows in float64, as PyTorch's batch normalisation keeps them on the CPU. add(row,
// value, sums) adds what load(row) gives; all threads of a column get the totals. Every thread of
// the block must call. Shared memory: row_sums_bytes.
template <int kSums, typename Load, typename Add>
__device__ __forceinline__ void sum_over_rows(const Column& column, int64_t rows,
                                              double (&totals)[kSums], Load load, Add add) {
  double sums[kSums] = {};
  for_rows(column, rows, load, [&](int64_t row, const auto& value) { add(row, value, sums); });
  // A warp has a few rows of threads: first those, then the warps.
  double* const buffer = shared<double>();
  const int warps = static_cast<int>(blockDim.x / kWarp);
  const int at = static_cast<int>(threadIdx.x / kWarp * kColumns + threadIdx.x % kColumns);
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int apart = kColumns; apart < kWarp; apart *= 2) {
      sums[s] += __shfl_xor_sync(kWholeWarp, sums[s], apart);
    }
    if (threadIdx.x % kWarp < kColumns) {
      buffer[s * warps * kColumns + at] = sums[s];
    }
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    totals[s] = 0;
    for (int warp = 0; warp < warps; ++warp) {
      totals[s] += buffer[(s * warps + warp) * kColumns + threadIdx.x % kColumns];
    }
  }
  __syncthreads();
}

}  // namespace resnest_fused::cuda
