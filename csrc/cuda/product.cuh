// Matrix products of (B, C)-sized data: result[m, n] = sum_k a[m, k] b[n, k], a tile a block.
//
// The warps of a block share the depth k, four values at a time; within a warp a thread has 4 x 4
// results. Their partial sums are added in shared memory in ascending order of the warps. So the
// order of a result's sum depends on the depth and the block's size alone, not on other rows.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tiling.h"

namespace resnest_fused::cuda {

// Resident blocks that the registers must suffice for; float64 takes twice as many.
template <typename A>
constexpr int64_t kProductBlocks = sizeof(A) == 8 ? 1 : kBlocksPerMultiprocessor;

// A source of an operand's values: four neighbours in a row of a matrix at a time, or four rows of
// four. The latter are loaded before any is used, as each wait for L2 takes longer than the sums.
template <typename A>
struct Values {
  const A* data;
  int64_t stride;  // between rows

  // Whether four neighbours are one load, in each row and from each multiple of four beyond
  // `first`.
  __device__ __forceinline__ bool in_vectors(int64_t first) const {
    return sizeof(A) <= 4 && reinterpret_cast<uintptr_t>(data) % (4 * sizeof(A)) == 0 &&
           (first | stride) % 4 == 0;
  }

  template <typename To>
  __device__ __forceinline__ void load4x4(int64_t row, int64_t column, To (&to)[4][4]) const {
    Vector<A, 4> rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i] = load<4>(data + (row + i) * stride + column);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[i][j] = static_cast<To>(widen(rows[i].values[j]));
      }
    }
  }

  __device__ __forceinline__ void load4(int64_t row, int64_t column, int count, A (&to)[4]) const {
    const A* const from = data + row * stride + column;
    if constexpr (sizeof(A) <= 4) {
      if (count >= 4 && reinterpret_cast<uintptr_t>(from) % (4 * sizeof(A)) == 0) {
        const auto vector = load<4>(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[i] = vector.values[i];
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[i] = i < count ? from[i] : A{};
    }
  }
};

// The same of a weight in its own dtype.
template <typename A>
struct Weight {
  Parameter parameter;
  int64_t stride;

  __device__ __forceinline__ bool in_vectors(int64_t first) const {
    return sizeof(A) <= 4 && reinterpret_cast<uintptr_t>(parameter.data) % 16 == 0 &&
           (first | stride) % 4 == 0;
  }

  __device__ __forceinline__ void load4x4(int64_t row, int64_t column, A (&to)[4][4]) const {
    with_dtype<A>(parameter.data, parameter.dtype, [&](const auto* data) {
      using P = std::remove_const_t<std::remove_reference_t<decltype(*data)>>;
      if constexpr (sizeof(P) <= 4) {
        Values<P>{data, stride}.load4x4(row, column, to);
      }
    });
  }

  __device__ __forceinline__ void load4(int64_t row, int64_t column, int count, A (&to)[4]) const {
    with_dtype<A>(parameter.data, parameter.dtype, [&](const auto* data) {
      using P = std::remove_const_t<std::remove_reference_t<decltype(*data)>>;
      P from[4];
      Values<P>{data, stride}.load4(row, column, count, from);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[i] = static_cast<A>(widen(from[i]));
      }
    });
  }
};

// An operand: `rows` by `depth` values of a source from (first_row, first_column) on. With
// kTransposed a row of the source is a column of the operand.
template <typename A, typename Source, bool kTransposed>
struct Operand {
  Source source;
  int64_t first_row;
  int64_t first_column;
  int64_t rows;
  int64_t depth;

  // values[i][k]: row + i, depth at + k; zeros outside.
  __device__ __forceinline__ void load(int64_t row, int64_t at, A (&values)[4][4]) const {
    const int64_t row_count = rows - row, depth_count = depth - at;
    if constexpr (sizeof(A) <= 4) {
      if (row_count >= 4 && depth_count >= 4 && source.in_vectors(first_column)) {
        if constexpr (kTransposed) {
          A lines[4][4];
          source.load4x4(first_row + at, first_column + row, lines);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              values[j][i] = lines[i][j];
            }
          }
        } else {
          source.load4x4(first_row + row, first_column + at, values);
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      A line[4] = {};
      if constexpr (kTransposed) {
        if (i < depth_count && row_count > 0) {
          source.load4(first_row + at + i, first_column + row,
                       static_cast<int>(row_count < 4 ? row_count : 4), line);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[j][i] = line[j];
        }
      } else {
        if (i < row_count && depth_count > 0) {
          source.load4(first_row + row + i, first_column + at,
                       static_cast<int>(depth_count < 4 ? depth_count : 4), line);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[i][j] = line[j];
        }
      }
    }
  }
};

// Call put(m, n, value) for those results in [row, row + kTileRows) x [column, column +
// kTileColumns) that the operands have. Every thread of the block must call; all of them can read
// afterwards what was put. Shared memory: product_bytes.
template <typename A, typename OperandA, typename OperandB, typename Put>
__device__ __forceinline__ void multiply_tile(const OperandA& a, const OperandB& b, int64_t row,
                                              int64_t column, Put put) {
  constexpr int kColumnsOfThreads = kTileColumns / 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int m = lane / kColumnsOfThreads * 4, n = lane % kColumnsOfThreads * 4;
  A sums[4][4] = {};
  for (int64_t k = warp * 4; k < a.depth; k += warps * 4) {
    A a_values[4][4], b_values[4][4];
    a.load(row + m, k, a_values);
    b.load(column + n, k, b_values);
#pragma unroll
    for (int at = 0; at < 4; ++at) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = fma(a_values[i][at], b_values[j][at], sums[i][j]);
        }
      }
    }
  }
  A* const partial = shared<A>();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      partial[warp * kTileSize + (m + i) * kTileColumns + n + j] = sums[i][j];
    }
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < kTileSize; at += static_cast<int>(blockDim.x)) {
    A total = 0;
    for (int w = 0; w < warps; ++w) {
      total += partial[w * kTileSize + at];
    }
    const int64_t result_row = row + at / kTileColumns, result_column = column + at % kTileColumns;
    if (result_row < a.rows && result_column < b.rows) {
      put(result_row, result_column, total);
    }
  }
  __syncthreads();
}

// The tile of a block, and its group.
struct Tile {
  int64_t group, row, column;

  __device__ __forceinline__ Tile(int64_t block, int64_t rows, int64_t columns) {
    const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t column_tiles = (columns + kTileColumns - 1) / kTileColumns;
    row = block % row_tiles * kTileRows;
    column = block / row_tiles % column_tiles * kTileColumns;
    group = block / row_tiles / column_tiles;
  }
};

}  // namespace resnest_fused::cuda
