// Small grouped matrix products: kernels.
#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/dtype.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace resnest_fused::cpu {
namespace {

// Rows and columns of C in one work item.
constexpr int64_t kItemRows = 64;
constexpr int64_t kItemColumns = 32;

// Products that gemm_nn adds up before they join the total: long sums keep a small rounding error.
constexpr int64_t kProductsPerSum = 64;

// Accumulator vectors at once, kRows * kColumns of them, as many as the registers hold: 32 in
// AVX-512; 16 of half the size in AVX2; 16 of a quarter of it in the baseline.
template <typename Isa>
struct Tile;
template <>
struct Tile<Avx512> {
  static constexpr int kRows = 4, kColumns = 4;
};
template <>
struct Tile<Avx2> {
  static constexpr int kRows = 2, kColumns = 2;
};
template <>
struct Tile<Baseline> {
  static constexpr int kRows = 1, kColumns = 2;
};

struct Size {
  int64_t groups, m, n, k;

  int64_t row_items() const { return (m + kItemRows - 1) / kItemRows; }
  int64_t column_items() const { return (n + kItemColumns - 1) / kItemColumns; }
  int64_t items() const { return groups * row_items() * column_items(); }
};

// Call f<kRows, kColumns>(group, i, j) over the elements of work items [begin, end), in tiles of
// `Rows` x `Columns` elements. Where no whole tile is left it has a single row or column.
template <int Rows, int Columns, typename F>
RF_INLINE void for_tiles(const Size& size, int64_t begin, int64_t end, F f) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / (size.row_items() * size.column_items());
    const int64_t row = item / size.column_items() % size.row_items() * kItemRows;
    const int64_t column = item % size.column_items() * kItemColumns;
    const int64_t row_end = std::min(row + kItemRows, size.m);
    const int64_t column_end = std::min(column + kItemColumns, size.n);
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
        [&]<int kRows, int kColumns>(int64_t group, int64_t i, int64_t j) __attribute__((
            always_inline)) { tile<Isa, kRows, kColumns>(*size, *a, *b, bias, *c, group, i, j); });
  }

  template <typename Isa, int kRows, int kColumns>
  static RF_INLINE void tile(const Size& size, const Matrices<const A>& a,
                             const Matrices<const B>& b, const A* bias, const Matrices<A>& c,
                             int64_t group, int64_t row, int64_t column) {
    const A* x = a.data + group * a.group_stride + row * a.row_stride;
    const B* w = b.data + group * b.group_stride + column * b.row_stride;
    Vec<A> sums[kRows * kColumns] = {};
    int64_t p = 0;
    for (; p + kLanes<A> <= size.k; p += kLanes<A>) {
      add_products<Isa, kRows, kColumns>(x + p, a.row_stride, w + p, b.row_stride, kLanes<A>, sums);
    }
    if (p < size.k) {
      add_products<Isa, kRows, kColumns>(x + p, a.row_stride, w + p, b.row_stride, size.k - p,
                                         sums);
    }
    A totals[kRows * kColumns];
    sum_lanes_of<Isa, kRows * kColumns, A>(sums, totals);
    A* out = c.data + group * c.group_stride + row * c.row_stride + column;
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const A start = bias ? bias[group * size.n + column + j] : A{};
        out[i * c.row_stride + j] = start + totals[i * kColumns + j];
      }
    }
  }

  template <typename Isa, int kRows, int kColumns>
  static RF_INLINE void add_products(const A* x, int64_t x_stride, const B* w, int64_t w_stride,
                                     int64_t count, Vec<A>* sums) {
    Vec<A> columns[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      columns[j] = load_lanes(w + j * w_stride, count);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<A> lanes = load_lanes(x + i * x_stride, count);
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) {
        Vec<A>& sum = sums[i * kColumns + j];
        sum = fma<Isa, A>(lanes, columns[j], sum);
      }
    }
  }
};

// Lanes hold kLanes neighbours of a row of C.
template <typename A, typename B>
struct GemmNn {
  template <typename Isa>
  static RF_INLINE void run(const Size* vectors, const Matrices<const A>* a, bool a_transposed,
                            const Matrices<const B>* b, int64_t n, const Matrices<A>* c,
                            int64_t begin, int64_t end) {
    for_tiles<Tile<Isa>::kRows, Tile<Isa>::kColumns>(
        *vectors, begin, end,
        [&]<int kRows, int kColumns>(int64_t group, int64_t i,
                                     int64_t j) __attribute__((always_inline)) {
          const int64_t column = j * kLanes<A>;
          const int64_t count = n - column;
          const A* x = a->data + group * a->group_stride + i * (a_transposed ? 1 : a->row_stride);
          const B* w = b->data + group * b->group_stride + column;
          A* out = c->data + group * c->group_stride + i * c->row_stride + column;
          const int64_t i_stride = a_transposed ? 1 : a->row_stride;
          const int64_t k_stride = a_transposed ? a->row_stride : 1;
          if (count >= kColumns * kLanes<A>) {
            tile<Isa, kRows, kColumns, true>(vectors->k, x, i_stride, k_stride, w, b->row_stride,
                                             out, c->row_stride, count);
          } else {
            tile<Isa, kRows, kColumns, false>(vectors->k, x, i_stride, k_stride, w, b->row_stride,
                                              out, c->row_stride, count);
          }
        });
  }

  template <typename Isa, int kRows, int kColumns, bool kWhole>
  static RF_INLINE void tile(int64_t k, const A* x, int64_t i_stride, int64_t k_stride, const B* w,
                             int64_t w_stride, A* out, int64_t out_stride, int64_t count) {
    const auto width = [&](int j) __attribute__((always_inline)) {
      return kWhole ? int64_t{kLanes<A>} : std::min<int64_t>(kLanes<A>, count - j * kLanes<A>);
    };
    Vec<A> totals[kRows * kColumns] = {};
    for (int64_t first = 0; first < k; first += kProductsPerSum) {
      const int64_t last = std::min(first + kProductsPerSum, k);
      Vec<A> sums[kRows * kColumns] = {};
      for (int64_t p = first; p < last; ++p) {
        Vec<A> columns[kColumns];
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          columns[j] = load_lanes(w + p * w_stride + j * kLanes<A>, width(j));
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const Vec<A> scalar = broadcast(x[i * i_stride + p * k_stride]);
#pragma GCC unroll 4
          for (int j = 0; j < kColumns; ++j) {
            Vec<A>& sum = sums[i * kColumns + j];
            sum = fma<Isa, A>(scalar, columns[j], sum);
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
        store_lanes(out + i * out_stride + j * kLanes<A>, totals[i * kColumns + j], width(j));
      }
    }
  }
};

// Bytes that take as long to move as a work item of this many multiply-adds takes to compute.
template <typename A>
int64_t item_bytes(const Size& size, int64_t columns) {
  return std::min(size.m, kItemRows) * columns * size.k * static_cast<int64_t>(sizeof(A)) / 4;
}

}  // namespace

template <typename A, typename B>
void gemm_nt(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             Matrices<const B> b, const A* bias, Matrices<A> c) {
  const Size size{groups, m, n, k};
  parallel_items(size.items(), item_bytes<A>(size, std::min(n, kItemColumns)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<GemmNt<A, B>>(&size, const_cast<const Matrices<const A>*>(&a),
                                          const_cast<const Matrices<const B>*>(&b), bias,
                                          const_cast<const Matrices<A>*>(&c), begin, end);
                 });
}

template <typename A, typename B>
void gemm_nn(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             bool a_transposed, Matrices<const B> b, Matrices<A> c) {
  // Columns are counted in vectors here.
  const Size vectors{groups, m, (n + kLanes<A> - 1) / kLanes<A>, k};
  parallel_items(vectors.items(), item_bytes<A>(vectors, std::min(n, kItemColumns * kLanes<A>)),
                 [&](int64_t begin, int64_t end) {
                   dispatch<GemmNn<A, B>>(&vectors, const_cast<const Matrices<const A>*>(&a),
                                          a_transposed, const_cast<const Matrices<const B>*>(&b), n,
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
