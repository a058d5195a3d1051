// Small grouped matrix products: kernels.
#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/dtype.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/vector.h"

namespace resnest_fused::cpu {
namespace {

// Rows of C in one work item.
constexpr int64_t kItemRows = 64;

// Products that gemm_nn adds up before they join the total: long sums keep a small rounding error.
constexpr int64_t kProductsPerSum = 64;

// Accumulator vectors at once, kRows * kColumns of them. With the operands they take half of the
// registers: AVX-512 and NEON have 32, the others 16.
template <typename Isa>
struct Tile {
#if defined(__x86_64__)
  static constexpr int kRows = Isa::kBytes == 64 ? 4 : 2;
#else
  static constexpr int kRows = 4;
#endif
  static constexpr int kColumns = 4;
};

struct Size {
  int64_t groups, m, n, k;
  int64_t item_columns;  // columns of C in one work item

  int64_t row_items() const { return (m + kItemRows - 1) / kItemRows; }
  int64_t column_items() const { return (n + item_columns - 1) / item_columns; }
  int64_t items() const { return groups * row_items() * column_items(); }
};

// Call f<kRows, kColumns>(group, i, j) over the elements of work items [begin, end), in tiles of
// `Rows` x `Columns` elements. Where no whole tile is left it has a single row or column.
template <int Rows, int Columns, typename F>
RF_INLINE void for_tiles(const Size& size, int64_t begin, int64_t end, F f) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / (size.row_items() * size.column_items());
    const int64_t row = item / size.column_items() % size.row_items() * kItemRows;
    const int64_t column = item % size.column_items() * size.item_columns;
    const int64_t row_end = std::min(row + kItemRows, size.m);
    const int64_t column_end = std::min(column + size.item_columns, size.n);
    int64_t j = column;
    for (; j + Columns <= column_end; j += Columns) {
      int64_t i = row;
      for (; i + Rows <= row_end; i += Rows) {
        f.template operator()<Rows, Columns>(group, i, j);
      }
      for (; i < row_end; ++i) {
        f.template operator()<1, Columns>(group, i, j);
      }
    }
    for (; j < column_end; ++j) {
      for (int64_t i = row; i < row_end; ++i) {
        f.template operator()<1, 1>(group, i, j);
      }
    }
  }
}

// Lanes hold partial sums over k modulo kLanes, added at the end by halving.
template <typename A, typename B>
struct GemmNt {
  template <typename Isa>
  static RF_INLINE void run(const Size* size, const Matrices<const A>* a,
                            const Matrices<const B>* b, const A* bias, const Matrices<A>* c,
                            int64_t begin, int64_t end) {
    for_tiles<Tile<Isa>::kRows, Tile<Isa>::kColumns>(
        *size, begin, end,
        [&]<int kRows, int kColumns>(int64_t group, int64_t i, int64_t j)
            __attribute__((always_inline)) {
              tile<Vec<Isa, A>, kRows, kColumns>(*size, *a, *b, bias, *c, group, i, j);
            });
  }

  template <typename V, int kRows, int kColumns>
  static RF_INLINE void tile(const Size& size, const Matrices<const A>& a,
                             const Matrices<const B>& b, const A* bias, const Matrices<A>& c,
                             int64_t group, int64_t row, int64_t column) {
    const A* x = a.data + group * a.group_stride + row * a.row_stride;
    const B* w = b.data + group * b.group_stride + column * b.row_stride;
    V sums[kRows * kColumns] = {};
    int64_t p = 0;
    for (; p + kLanes<V> <= size.k; p += kLanes<V>) {
      add_products<kRows, kColumns>(x + p, a.row_stride, w + p, b.row_stride, Whole{}, sums);
    }
    if (p < size.k) {
      add_products<kRows, kColumns>(x + p, a.row_stride, w + p, b.row_stride, First{size.k - p},
                                    sums);
    }
    A totals[kRows * kColumns];
    sum_lanes_of<kRows * kColumns>(sums, totals);
    A* out = c.data + group * c.group_stride + row * c.row_stride + column;
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const A start = bias ? bias[group * size.n + column + j] : A{};
        out[i * c.row_stride + j] = start + totals[i * kColumns + j];
      }
    }
  }

  template <int kRows, int kColumns, typename V, typename Which>
  static RF_INLINE void add_products(const A* x, int64_t x_stride, const B* w, int64_t w_stride,
                                     Which lanes, V* sums) {
    V columns[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      columns[j] = load<V>(w + j * w_stride, lanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const V row = load<V>(x + i * x_stride, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        V& sum = sums[i * kColumns + j];
        sum = fma(row, columns[j], sum);
      }
    }
  }
};

// Lanes hold kLanes neighbours of a row of C.
template <typename A, typename B>
struct GemmNn {
  template <typename Isa>
  static RF_INLINE void run(const Size* size, const Matrices<const A>* a, bool a_transposed,
                            const Matrices<const B>* b, const Matrices<A>* c, int64_t begin,
                            int64_t end) {
    using V = Vec<Isa, A>;
    Size vectors = *size;
    vectors.n = (size->n + kLanes<V> - 1) / kLanes<V>;
    vectors.item_columns = size->item_columns / kLanes<V>;
    for_tiles<Tile<Isa>::kRows, Tile<Isa>::kColumns>(
        vectors, begin, end,
        [&]<int kRows, int kColumns>(int64_t group, int64_t i,
                                     int64_t j) __attribute__((always_inline)) {
          const int64_t column = j * kLanes<V>;
          const int64_t count = size->n - column;
          const A* x = a->data + group * a->group_stride + i * (a_transposed ? 1 : a->row_stride);
          const B* w = b->data + group * b->group_stride + column;
          A* out = c->data + group * c->group_stride + i * c->row_stride + column;
          const int64_t i_stride = a_transposed ? 1 : a->row_stride;
          const int64_t k_stride = a_transposed ? a->row_stride : 1;
          if (count >= kColumns * kLanes<V>) {
            tile<V, kRows, kColumns, true>(size->k, x, i_stride, k_stride, w, b->row_stride, out,
                                           c->row_stride, count);
          } else {
            tile<V, kRows, kColumns, false>(size->k, x, i_stride, k_stride, w, b->row_stride, out,
                                            c->row_stride, count);
          }
        });
  }

  template <typename V, int kRows, int kColumns, bool kWhole>
  static RF_INLINE void tile(int64_t k, const A* x, int64_t i_stride, int64_t k_stride, const B* w,
                             int64_t w_stride, A* out, int64_t out_stride, int64_t count) {
    const auto width = [&](int j) __attribute__((always_inline)) {
      return kWhole ? int64_t{kLanes<V>} : std::min<int64_t>(kLanes<V>, count - j * kLanes<V>);
    };
    V totals[kRows * kColumns] = {};
    for (int64_t first = 0; first < k; first += kProductsPerSum) {
      const int64_t last = std::min(first + kProductsPerSum, k);
      V sums[kRows * kColumns] = {};
      for (int64_t p = first; p < last; ++p) {
        V columns[kColumns];
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          columns[j] = load_lanes<V>(w + p * w_stride + j * kLanes<V>, width(j));
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const V scalar = broadcast<V>(x[i * i_stride + p * k_stride]);
#pragma GCC unroll 4
          for (int j = 0; j < kColumns; ++j) {
            V& sum = sums[i * kColumns + j];
            sum = fma(scalar, columns[j], sum);
          }
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < kRows * kColumns; ++t) {
        totals[t] += sums[t];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        store_lanes(out + i * out_stride + j * kLanes<V>, totals[i * kColumns + j], width(j));
      }
    }
  }
};

// Bytes that take as long to move as a work item of this many multiply-adds takes to compute.
template <typename A>
int64_t item_bytes(const Size& size) {
  return std::min(size.m, kItemRows) * std::min(size.n, size.item_columns) * size.k *
         static_cast<int64_t>(sizeof(A)) / 4;
}

}  // namespace

template <typename A, typename B>
void gemm_nt(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             Matrices<const B> b, const A* bias, Matrices<A> c) {
  const Size size{groups, m, n, k, 32};
  parallel_items(size.items(), item_bytes<A>(size), [&](int64_t begin, int64_t end) {
    dispatch<GemmNt<A, B>>(&size, const_cast<const Matrices<const A>*>(&a),
                           const_cast<const Matrices<const B>*>(&b), bias,
                           const_cast<const Matrices<A>*>(&c), begin, end);
  });
}

template <typename A, typename B>
void gemm_nn(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             bool a_transposed, Matrices<const B> b, Matrices<A> c) {
  const Size size{groups, m, n, k, 512};
  parallel_items(size.items(), item_bytes<A>(size), [&](int64_t begin, int64_t end) {
    dispatch<GemmNn<A, B>>(&size, const_cast<const Matrices<const A>*>(&a), a_transposed,
                           const_cast<const Matrices<const B>*>(&b),
                           const_cast<const Matrices<A>*>(&c), begin, end);
  });
}

#define RF_INSTANTIATE(T)                                                                      \
  template void gemm_nt<Acc<T>, T>(int64_t, int64_t, int64_t, int64_t, Matrices<const Acc<T>>, \
                                   Matrices<const T>, const Acc<T>*, Matrices<Acc<T>>);        \
  template void gemm_nn<Acc<T>, T>(int64_t, int64_t, int64_t, int64_t, Matrices<const Acc<T>>, \
                                   bool, Matrices<const T>, Matrices<Acc<T>>);
RF_FOR_EACH_DTYPE(RF_INSTANTIATE)
#undef RF_INSTANTIATE

}  // namespace resnest_fused::cpu
