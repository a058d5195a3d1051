// Matrix products of (B, C)-sized data: result[m, n] = sum_k a[m, k] b[n, k], a tile a block.
//
// The warps of a block share the depth k, eight values at a time; within a warp a thread has 4 x 4
// results. Their partial sums are added in shared memory in ascending order of the warps. So the
// order of a result's sum depends on the depth and the block's size alone, not on other rows.
#pragma once

#include "cuda/device.cuh"
#include "cuda/tiling.h"

namespace resnest_fused::cuda {

// Resident blocks that the registers must suffice for; float64 takes twice as many.
template <typename A>
constexpr int64_t kProductBlocks = sizeof(A) == 8 ? 1 : kBlocksPerMultiprocessor;

// Values of the depth that a thread takes in a step, and that it loads from both operands before it
// uses any, because the wait for L2 takes longer than the sums. Single elements take more
// registers: they are loaded in two halves.
constexpr int kStep = 8;
template <int kVector>
constexpr int kTogether = kVector > 1 ? kStep : kStep / 2;

// An operand: `rows` by `depth` values of a matrix with elements E. With kTransposed a row of the
// matrix is a column of the operand.
template <typename E, bool kTransposed>
struct Operand {
  const E* data;   // its first value
  int64_t stride;  // between rows of the matrix
  int64_t rows;
  int64_t depth;

  // Whether four neighbours in a row of the matrix, from each multiple of four on, are one load.
  __device__ __forceinline__ bool in_vectors() const {
    const int64_t columns = kTransposed ? rows : depth;
    return sizeof(E) <= 4 && reinterpret_cast<uintptr_t>(data) % (4 * sizeof(E)) == 0 &&
           (stride | columns) % 4 == 0;
  }

  template <typename A, typename F>
  __device__ __forceinline__ void with_elements(F f) const {
    f(*this);
  }
};

// The same of a weight in its own dtype.
template <bool kTransposed>
struct WeightOperand {
  Parameter weight;
  int64_t first;  // element of the weight
  int64_t stride;
  int64_t rows;
  int64_t depth;

  template <typename A, typename F>
  __device__ __forceinline__ void with_elements(F f) const {
    with_dtype<A>(weight.data, weight.dtype, [&](const auto* data) {
      using E = std::remove_const_t<std::remove_reference_t<decltype(*data)>>;
      f(Operand<E, kTransposed>{data + first, stride, rows, depth});
    });
  }
};

// A thread's four rows of an operand, of which it has a part of the depth at a time. They are
// loaded without a branch: beyond the depth are zeros, and beyond the last row is that one again,
// of which no result comes. They stay words until they are used, or the compiler would take them
// apart first.
template <typename E, bool kTransposed, int kVector>
struct FourRows {
  using Word = typename WordOf<sizeof(E) * kVector>::Type;
  static constexpr int kRows = kTransposed ? kVector : 1;    // in a word
  static constexpr int kDepths = kTransposed ? 1 : kVector;  // in a word
  static constexpr int kWords = kTogether<kVector> / kDepths;

  const E* next[4 / kRows];
  int64_t stride;
  Word words[4 / kRows][kWords];

  __device__ __forceinline__ FourRows(const Operand<E, kTransposed>& operand, int64_t row,
                                      int64_t depth)
      : stride(operand.stride) {
    const int64_t last = operand.rows - kRows;
#pragma unroll
    for (int i = 0; i < 4; i += kRows) {
      const int64_t inside = row + i < last ? row + i : last;
      next[i / kRows] =
          operand.data + (kTransposed ? depth * stride + inside : inside * stride + depth);
    }
  }

  // Load a part, of whose depth `left` are inside, and go on by `depths`.
  __device__ __forceinline__ void load(int64_t left, int depths) {
#pragma unroll
    for (int i = 0; i < 4 / kRows; ++i) {
      const E* from = next[i];
      next[i] += depths * (kTransposed ? stride : 1);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        words[i][w] = w * kDepths < left ? *reinterpret_cast<const Word*>(from) : Word{};
        from += kTransposed ? stride : kVector;
      }
    }
  }

  // Of what was loaded.
  __device__ __forceinline__ auto at(int row, int k) const {
    Vector<E, kVector> vector;
    memcpy(&vector, &words[row / kRows][k / kDepths], sizeof(vector));
    return widen(vector.values[(kTransposed ? row : k) % kVector]);
  }
};

// Add a thread's share of the products to its sums, of four rows of a and four of b.
template <int kVector, typename A, typename EA, bool kTransposedA, typename EB, bool kTransposedB>
__device__ __forceinline__ void add_products(const Operand<EA, kTransposedA>& a,
                                             const Operand<EB, kTransposedB>& b, int64_t row,
                                             int64_t column, A (&sums)[4][4]) {
  const int first = static_cast<int>(threadIdx.x) / kWarp * kStep;
  const int depths = static_cast<int>(blockDim.x) / kWarp * kStep;  // of all warps
  FourRows<EA, kTransposedA, kVector> of_a(a, row, first);
  FourRows<EB, kTransposedB, kVector> of_b(b, column, first);
  for (int64_t k = first; k < a.depth; k += depths) {
#pragma unroll 1
    for (int part = 0; part < kStep; part += kTogether<kVector>) {
      const int64_t left = a.depth - k - part;
      const int on = part + kTogether<kVector> < kStep ? kTogether<kVector> : depths - part;
      of_a.load(left, on);
      of_b.load(left, on);
#pragma unroll
      for (int at = 0; at < kTogether<kVector>; ++at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sums[i][j] =
                fma(static_cast<A>(of_a.at(i, at)), static_cast<A>(of_b.at(j, at)), sums[i][j]);
          }
        }
      }
    }
  }
}

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
  // Chosen before the loop over the depth, in which a branch would end what can be loaded together.
  b.template with_elements<A>([&](const auto& typed) {
    if constexpr (sizeof(A) <= 4) {
      if (a.in_vectors() && typed.in_vectors()) {
        return add_products<4>(a, typed, row + m, column + n, sums);
      }
    }
    add_products<1>(a, typed, row + m, column + n, sums);
  });
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

// A tile by its number, and its group. In 32 bits, as kernels have no register left.
struct Tile {
  int32_t group, row, column;

  __device__ __forceinline__ Tile(int64_t number, int64_t rows, int64_t columns) {
    const auto index = static_cast<uint32_t>(number);  // at most kMostBlocks
    const auto row_tiles = static_cast<uint32_t>((rows + kTileRows - 1) / kTileRows);
    const auto column_tiles = static_cast<uint32_t>((columns + kTileColumns - 1) / kTileColumns);
    row = index % row_tiles * kTileRows;
    column = index / row_tiles % column_tiles * kTileColumns;
    group = index / row_tiles / column_tiles;
  }
};

}  // namespace resnest_fused::cuda
