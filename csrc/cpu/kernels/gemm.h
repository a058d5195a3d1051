// Small grouped matrix products for the FCs. The order of a sum depends on k alone: an element of
// the result is the same to the bit for any m, n and number of threads. No library's GEMM promises
// that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/kernels/memory.h"
#include "cpu/kernels/vector.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace resnest_fused::cpu::RF_SET {

// One matrix per group: element (i, j) of group g at data[g * group_stride + i * row_stride + j].
template <typename A>
struct Matrices {
  A* data;
  int64_t row_stride;
  int64_t group_stride;
};

// Rows of C in one work item: as many as share a copy of a block of B, but fewer where the threads
// would have too few work items.
constexpr int64_t kMostItemRows = 64, kLeastItemRows = 8;

// Products that gemm_nn adds up before they join the total: long sums keep a small rounding error.
constexpr int64_t kProductsPerSum = 64;

// Accumulator vectors at once, kGemmRows * kColumns of them: about half of the registers, of which
// AVX-512 and NEON have 32, the others 16.
#if defined(__x86_64__)
constexpr int kGemmRows = kRegisterBytes == 64 ? 4 : 2;
#else
constexpr int kGemmRows = 4;
#endif
constexpr int kColumns = 4;

struct GemmSize {
  int64_t groups, m, n, k;
  int64_t item_rows;
  int64_t item_columns;

  GemmSize(int64_t groups, int64_t m, int64_t n, int64_t k, int64_t item_columns)
      : groups(groups), m(m), n(n), k(k), item_rows(kMostItemRows), item_columns(item_columns) {
    const int64_t threads = thread_count();
    while (threads > 1 && item_rows > kLeastItemRows && items() < kItemsPerThread * threads) {
      item_rows /= 2;
    }
  }

  int64_t row_items() const { return (m + item_rows - 1) / item_rows; }
  int64_t column_items() const { return (n + item_columns - 1) / item_columns; }
  int64_t items() const { return groups * row_items() * column_items(); }

  // Bytes that take as long to move as a work item of this many multiply-adds takes to compute.
  template <typename A>
  int64_t item_bytes() const {
    return std::min(m, item_rows) * std::min(n, item_columns) * k *
           static_cast<int64_t>(sizeof(A)) / 4;
  }
};

// One work item's part of C.
struct GemmPart {
  int64_t group, row, row_end, column, column_end;

  GemmPart(const GemmSize& size, int64_t item)
      : group(item / (size.row_items() * size.column_items())),
        row(item / size.column_items() % size.row_items() * size.item_rows),
        row_end(std::min(row + size.item_rows, size.m)),
        column(item % size.column_items() * size.item_columns),
        column_end(std::min(column + size.item_columns, size.n)) {}

  // Whether so many rows share an element of B that a copy of it pays.
  bool reuses_b() const { return row_end - row >= kLeastItemRows; }
};

// Call f<kRows>(i) for the rows [begin, end) in tiles of kGemmRows, single ones last.
template <typename F>
RF_INLINE void for_row_tiles(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kGemmRows <= end; i += kGemmRows) {
    f.template operator()<kGemmRows>(i);
  }
  for (; i < end; ++i) {
    f.template operator()<1>(i);
  }
}

// Lanes hold partial sums over k modulo kLanes, added at the end by halving.
template <typename A, typename B>
struct GemmNt {
  using V = Vec<A>;

  static RF_KERNEL void run(const GemmSize& size, const Matrices<const A>& a,
                            const Matrices<const B>& b, const A* bias, const Matrices<A>& c,
                            int64_t begin, int64_t end) {
    const auto widened = uninitialized<A>(std::is_same_v<A, B> ? 0 : size.item_columns * size.k);
    for (int64_t item = begin; item < end; ++item) {
      const GemmPart part(size, item);
      const B* w = b.data + part.group * b.group_stride + part.column * b.row_stride;
      if (!std::is_same_v<A, B> && part.reuses_b()) {
        for (int64_t j = 0; j < part.column_end - part.column; ++j) {
          for_vectors<V>(size.k, [&](int64_t p, auto lanes) __attribute__((always_inline)) {
            store(widened.get() + j * size.k + p, load<V>(w + j * b.row_stride + p, lanes), lanes);
          });
        }
        all_rows(size, part, a, widened.get(), size.k, bias, c);
      } else {
        all_rows(size, part, a, w, b.row_stride, bias, c);
      }
    }
  }

  // As many rows at a time as stay in L1 while all columns pass.
  template <typename W>
  static RF_INLINE void all_rows(const GemmSize& size, const GemmPart& part,
                                 const Matrices<const A>& a, const W* w, int64_t w_stride,
                                 const A* bias, const Matrices<A>& c) {
    constexpr int64_t kElements = 16 * 1024 / sizeof(A);
    const int64_t fitting = kElements / std::max<int64_t>(size.k, 1) / kGemmRows;
    const int64_t step = kGemmRows * std::max<int64_t>(fitting, 1);
    for (int64_t row = part.row; row < part.row_end; row += step) {
      const int64_t row_end = std::min(row + step, part.row_end);
      int64_t j = part.column;
      for (; j + kColumns <= part.column_end; j += kColumns) {
        columns<kColumns>(size, part.group, row, row_end, a, w + (j - part.column) * w_stride,
                          w_stride, bias, c, j);
      }
      for (; j < part.column_end; ++j) {
        columns<1>(size, part.group, row, row_end, a, w + (j - part.column) * w_stride, w_stride,
                   bias, c, j);
      }
    }
  }

  // Columns [j, j + kColumns) of C, rows [row, row_end).
  template <int kColumns, typename W>
  static RF_INLINE void columns(const GemmSize& size, int64_t group, int64_t row, int64_t row_end,
                                const Matrices<const A>& a, const W* w, int64_t w_stride,
                                const A* bias, const Matrices<A>& c, int64_t j) {
    const A* starts = bias ? bias + group * size.n + j : nullptr;
    for_row_tiles(row, row_end, [&]<int kRows>(int64_t i) __attribute__((always_inline)) {
      tile<kRows, kColumns>(size.k, a.data + group * a.group_stride + i * a.row_stride,
                            a.row_stride, w, w_stride, starts,
                            c.data + group * c.group_stride + i * c.row_stride + j, c.row_stride);
    });
  }

  template <int kRows, int kColumns, typename W>
  static RF_INLINE void tile(int64_t k, const A* x, int64_t x_stride, const W* w, int64_t w_stride,
                             const A* starts, A* out, int64_t out_stride) {
    V sums[kRows * kColumns] = {};
    for_vectors<V>(k, [&](int64_t p, auto lanes) __attribute__((always_inline)) {
      V columns[kColumns];
      unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
        columns[j] = load<V>(w + j * w_stride + p, lanes);
        hold_in_register(columns[j]);
      });
      unroll<kRows>([&](auto i) __attribute__((always_inline)) {
        const V row = load<V>(x + i * x_stride + p, lanes);
        unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
          sums[i * kColumns + j] = fma(row, columns[j], sums[i * kColumns + j]);
        });
      });
    });
    A totals[kRows * kColumns];
    sum_lanes_of<kRows * kColumns>(sums, totals);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        out[i * out_stride + j] = (starts ? starts[j] : A{}) + totals[i * kColumns + j];
      }
    }
  }
};

// Lanes hold kLanes neighbours of a row of C, to which kProductsPerSum products are added at a
// time.
template <typename A, typename B>
struct GemmNn {
  using V = Vec<A>;

  static RF_KERNEL void run(const GemmSize& size, const Matrices<const A>& a, bool a_transposed,
                            const Matrices<const B>& b, const Matrices<A>& c, int64_t begin,
                            int64_t end) {
    constexpr int64_t kWidth = kColumns * kLanes<V>;
    // Copies of what a tile reads, side by side: rows of A and B that are a power of two apart
    // would drive each other out of the cache. One in the accumulator's type, zeros behind the last
    // column.
    alignas(V) A a_block[kProductsPerSum * kMostItemRows];
    alignas(V) A b_block[kProductsPerSum * kWidth];
    const int64_t i_stride = a_transposed ? 1 : a.row_stride;
    const int64_t k_stride = a_transposed ? a.row_stride : 1;
    for (int64_t item = begin; item < end; ++item) {
      const GemmPart part(size, item);
      const int64_t rows = part.row_end - part.row;
      A* const out = c.data + part.group * c.group_stride + part.row * c.row_stride;
      for (int64_t first = 0; first < std::max<int64_t>(size.k, 1); first += kProductsPerSum) {
        const int64_t products = std::min(kProductsPerSum, size.k - first);
        const A* x = a.data + part.group * a.group_stride + part.row * i_stride + first * k_stride;
        if (part.reuses_b()) {
          copy_block(x, i_stride, k_stride, rows, products, a_block);
        }
        for (int64_t column = part.column; column < part.column_end; column += kWidth) {
          const B* w = b.data + part.group * b.group_stride + first * b.row_stride + column;
          const int64_t count = std::min(kWidth, part.column_end - column);
          if (part.reuses_b()) {
            for (int64_t p = 0; p < products; ++p) {
              load_columns(w + p * b.row_stride, count,
                           [&](auto j, V value) __attribute__((always_inline)) {
                             store(b_block + p * kWidth + j * kLanes<V>, value);
                           });
            }
            for_row_tiles(0, rows, [&]<int kTile>(int64_t i) __attribute__((always_inline)) {
              tile<kTile>(products, a_block + i, 1, kMostItemRows, b_block, kWidth, kWidth,
                          first > 0, out + i * c.row_stride + column, c.row_stride, count);
            });
          } else {
            const auto tiles = [&](auto width) __attribute__((always_inline)) {
              for_row_tiles(0, rows, [&]<int kTile>(int64_t i) __attribute__((always_inline)) {
                tile<kTile>(products, x + i * i_stride, i_stride, k_stride, w, b.row_stride, width,
                            first > 0, out + i * c.row_stride + column, c.row_stride, count);
              });
            };
            // Where all columns are there, no tail is in the way of the accumulators' registers.
            if (count == kWidth) {
              tiles(std::integral_constant<int64_t, kWidth>{});
            } else {
              tiles(count);
            }
          }
        }
      }
    }
  }

  // to[p, i] = x[i, p], in the order in which x lies in memory.
  static RF_INLINE void copy_block(const A* x, int64_t i_stride, int64_t k_stride, int64_t rows,
                                   int64_t products, A* to) {
    if (i_stride == 1) {
      for (int64_t p = 0; p < products; ++p) {
        std::copy_n(x + p * k_stride, rows, to + p * kMostItemRows);
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t p = 0; p < products; ++p) {
        to[p * kMostItemRows + i] = x[i * i_stride + p];
      }
    }
  }

  // Call f(j, vector) for kColumns vectors from p on, of which `count` elements are there.
  template <typename P, typename F>
  static RF_INLINE void load_columns(const P* p, int64_t count, F f) {
    unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
      const int64_t rest = count - j * kLanes<V>;
      f(j, rest > 0 ? load_lanes<V>(p + j * kLanes<V>, rest) : V{});
    });
  }

  // Add products to kRows rows of C, or set them. w has `width` elements in each row.
  template <int kRows, typename W>
  static RF_INLINE void tile(int64_t products, const A* x, int64_t i_stride, int64_t k_stride,
                             const W* w, int64_t w_stride, int64_t width, bool adds, A* out,
                             int64_t out_stride, int64_t count) {
    V sums[kRows * kColumns] = {};
    for (int64_t p = 0; p < products; ++p) {
      V columns[kColumns];
      load_columns(w + p * w_stride, width, [&](auto j, V value) __attribute__((always_inline)) {
        columns[j] = value;
        hold_in_register(columns[j]);
      });
      unroll<kRows>([&](auto i) __attribute__((always_inline)) {
        const V scalar = broadcast<V>(x[i * i_stride + p * k_stride]);
        unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
          sums[i * kColumns + j] = fma(scalar, columns[j], sums[i * kColumns + j]);
        });
      });
    }
    unroll<kRows>([&](auto i) __attribute__((always_inline)) {
      unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
        A* const to = out + i * out_stride + j * kLanes<V>;
        const int64_t rest = count - j * kLanes<V>;
        if (rest > 0) {
          const V known = adds ? load_lanes<V>(to, rest) : V{};
          store_lanes(to, known + sums[i * kColumns + j], rest);
        }
      });
    });
  }
};

// C[g] (m, n) = A[g] (m, k) B[g]^T + bias[g], B[g] being (n, k) and of any type that widens to A;
// bias (groups, n) or null.
template <typename A, typename B>
void gemm_nt(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             Matrices<const B> b, const A* bias, Matrices<A> c) {
  const GemmSize size(groups, m, n, k, 32);
  parallel_items(size.items(), size.item_bytes<A>(), [&](int64_t begin, int64_t end) {
    GemmNt<A, B>::run(size, a, b, bias, c, begin, end);
  });
}

// C[g] (m, n) = A[g] B[g], B[g] being (k, n). A[g] is (m, k), or when a_transposed stored as (k,
// m).
template <typename A, typename B>
void gemm_nn(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             bool a_transposed, Matrices<const B> b, Matrices<A> c) {
  const GemmSize size(groups, m, n, k, 128);
  parallel_items(size.items(), size.item_bytes<A>(), [&](int64_t begin, int64_t end) {
    GemmNn<A, B>::run(size, a, a_transposed, b, c, begin, end);
  });
}

}  // namespace resnest_fused::cpu::RF_SET
