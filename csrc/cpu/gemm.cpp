// Small grouped matrix products: kernels.
#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/dtype.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vector.h"

namespace resnest_fused::cpu {
namespace {

// Rows of C in one work item.
constexpr int64_t kItemRows = 64;

// Products that gemm_nn adds up before they join the total: long sums keep a small rounding error.
constexpr int64_t kProductsPerSum = 64;

// Accumulator vectors at once, kTileRows * kColumns of them: about half of the registers, of which
// AVX-512 and NEON have 32, the others 16.
#if defined(__x86_64__)
template <typename Isa>
constexpr int kTileRows = Isa::kBytes == 64 ? 4 : 2;
#else
template <typename Isa>
constexpr int kTileRows = 4;
#endif
constexpr int kColumns = 4;

struct Size {
  int64_t groups, m, n, k;
  int64_t item_columns;  // columns of C in one work item

  int64_t row_items() const { return (m + kItemRows - 1) / kItemRows; }
  int64_t column_items() const { return (n + item_columns - 1) / item_columns; }
  int64_t items() const { return groups * row_items() * column_items(); }
};

// One work item's part of C.
struct Part {
  int64_t group, row, row_end, column, column_end;

  Part(const Size& size, int64_t item)
      : group(item / (size.row_items() * size.column_items())),
        row(item / size.column_items() % size.row_items() * kItemRows),
        row_end(std::min(row + kItemRows, size.m)),
        column(item % size.column_items() * size.item_columns),
        column_end(std::min(column + size.item_columns, size.n)) {}

  // Whether so many rows share an element of B that a copy of it pays.
  bool reuses_b() const { return row_end - row >= 8; }
};

// Call f<kRows>(i) for the rows [begin, end) in tiles of `Rows`, single ones last.
template <int Rows, typename F>
RF_INLINE void for_row_tiles(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + Rows <= end; i += Rows) {
    f.template operator()<Rows>(i);
  }
  for (; i < end; ++i) {
    f.template operator()<1>(i);
  }
}

// Lanes hold partial sums over k modulo kLanes, added at the end by halving.
template <typename A, typename B>
struct GemmNt {
  template <typename Isa>
  static RF_INLINE void run(const Size* size, const Matrices<const A>* a,
                            const Matrices<const B>* b, const A* bias, const Matrices<A>* c,
                            A* widened /* (kColumns, k) */, int64_t begin, int64_t end) {
    using V = Vec<Isa, A>;
    constexpr int kRows = kTileRows<Isa>;
    for (int64_t item = begin; item < end; ++item) {
      const Part part(*size, item);
      int64_t j = part.column;
      for (; j + kColumns <= part.column_end; j += kColumns) {
        const B* w = b->data + part.group * b->group_stride + j * b->row_stride;
        if (!std::is_same_v<A, B> && part.reuses_b()) {
          for (int column = 0; column < kColumns; ++column) {
            for_vectors<V>(size->k, [&](int64_t p, auto lanes) __attribute__((always_inline)) {
              store(widened + column * size->k + p, load<V>(w + column * b->row_stride + p, lanes),
                    lanes);
            });
          }
          columns<V, kRows, kColumns>(*size, part, *a, widened, size->k, bias, *c, j);
        } else {
          columns<V, kRows, kColumns>(*size, part, *a, w, b->row_stride, bias, *c, j);
        }
      }
      for (; j < part.column_end; ++j) {
        const B* w = b->data + part.group * b->group_stride + j * b->row_stride;
        columns<V, kRows, 1>(*size, part, *a, w, b->row_stride, bias, *c, j);
      }
    }
  }

  // Columns [j, j + kColumns) of C, all rows of the part.
  template <typename V, int Rows, int kColumns, typename W>
  static RF_INLINE void columns(const Size& size, const Part& part, const Matrices<const A>& a,
                                const W* w, int64_t w_stride, const A* bias, const Matrices<A>& c,
                                int64_t j) {
    const A* starts = bias ? bias + part.group * size.n + j : nullptr;
    for_row_tiles<Rows>(
        part.row, part.row_end, [&]<int kRows>(int64_t i) __attribute__((always_inline)) {
          tile<V, kRows, kColumns>(size.k, a.data + part.group * a.group_stride + i * a.row_stride,
                                   a.row_stride, w, w_stride, starts,
                                   c.data + part.group * c.group_stride + i * c.row_stride + j,
                                   c.row_stride);
        });
  }

  template <typename V, int kRows, int kColumns, typename W>
  static RF_INLINE void tile(int64_t k, const A* x, int64_t x_stride, const W* w, int64_t w_stride,
                             const A* starts, A* out, int64_t out_stride) {
    V sums[kRows * kColumns] = {};
    for_vectors<V>(k, [&](int64_t p, auto lanes) __attribute__((always_inline)) {
      V columns[kColumns];
      unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
        columns[j] = load<V>(w + j * w_stride + p, lanes);
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
  template <typename Isa>
  static RF_INLINE void run(const Size* size, const Matrices<const A>* a, bool a_transposed,
                            const Matrices<const B>* b, const Matrices<A>* c, int64_t begin,
                            int64_t end) {
    using V = Vec<Isa, A>;
    constexpr int kRows = kTileRows<Isa>;
    constexpr int64_t kWidth = kColumns * kLanes<V>;
    // Copies of what a tile reads, side by side: rows of A and B that are a power of two apart
    // would drive each other out of the cache. One in the accumulator's type, zeros behind the last
    // column.
    alignas(kWidestBytes) A a_block[kProductsPerSum * kItemRows];
    alignas(kWidestBytes) A b_block[kProductsPerSum * kWidth];
    const int64_t i_stride = a_transposed ? 1 : a->row_stride;
    const int64_t k_stride = a_transposed ? a->row_stride : 1;
    for (int64_t item = begin; item < end; ++item) {
      const Part part(*size, item);
      const int64_t rows = part.row_end - part.row;
      A* const out = c->data + part.group * c->group_stride + part.row * c->row_stride;
      for (int64_t first = 0; first < std::max<int64_t>(size->k, 1); first += kProductsPerSum) {
        const int64_t products = std::min(kProductsPerSum, size->k - first);
        const A* x =
            a->data + part.group * a->group_stride + part.row * i_stride + first * k_stride;
        if (part.reuses_b()) {
          copy_block(x, i_stride, k_stride, rows, products, a_block);
        }
        for (int64_t column = part.column; column < part.column_end; column += kWidth) {
          const B* w = b->data + part.group * b->group_stride + first * b->row_stride + column;
          const int64_t count = std::min(kWidth, part.column_end - column);
          if (part.reuses_b()) {
            for (int64_t p = 0; p < products; ++p) {
              load_columns<V>(w + p * b->row_stride, count,
                              [&](auto j, V value) __attribute__((always_inline)) {
                                store(b_block + p * kWidth + j * kLanes<V>, value);
                              });
            }
            for_row_tiles<kRows>(0, rows, [&]<int kTile>(int64_t i) __attribute__((always_inline)) {
              tile<V, kTile>(products, a_block + i, 1, kItemRows, b_block, kWidth, kWidth,
                             first > 0, out + i * c->row_stride + column, c->row_stride, count);
            });
          } else {
            for_row_tiles<kRows>(0, rows, [&]<int kTile>(int64_t i) __attribute__((always_inline)) {
              tile<V, kTile>(products, x + i * i_stride, i_stride, k_stride, w, b->row_stride,
                             count, first > 0, out + i * c->row_stride + column, c->row_stride,
                             count);
            });
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
        std::copy_n(x + p * k_stride, rows, to + p * kItemRows);
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t p = 0; p < products; ++p) {
        to[p * kItemRows + i] = x[i * i_stride + p];
      }
    }
  }

  // Call f(j, vector) for kColumns vectors from p on, of which `count` elements are there.
  template <typename V, typename P, typename F>
  static RF_INLINE void load_columns(const P* p, int64_t count, F f) {
    unroll<kColumns>([&](auto j) __attribute__((always_inline)) {
      const int64_t rest = count - j * kLanes<V>;
      f(j, rest > 0 ? load_lanes<V>(p + j * kLanes<V>, rest) : V{});
    });
  }

  // Add products to kRows rows of C, or set them. w has `width` elements in each row.
  template <typename V, int kRows, typename W>
  static RF_INLINE void tile(int64_t products, const A* x, int64_t i_stride, int64_t k_stride,
                             const W* w, int64_t w_stride, int64_t width, bool adds, A* out,
                             int64_t out_stride, int64_t count) {
    V sums[kRows * kColumns] = {};
    for (int64_t p = 0; p < products; ++p) {
      V columns[kColumns];
      load_columns<V>(w + p * w_stride, width,
                      [&](auto j, V value) __attribute__((always_inline)) { columns[j] = value; });
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
    const auto widened = uninitialized<A>(std::is_same_v<A, B> ? 0 : kColumns * k);
    dispatch<GemmNt<A, B>>(&size, const_cast<const Matrices<const A>*>(&a),
                           const_cast<const Matrices<const B>*>(&b), bias,
                           const_cast<const Matrices<A>*>(&c), widened.get(), begin, end);
  });
}

template <typename A, typename B>
void gemm_nn(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             bool a_transposed, Matrices<const B> b, Matrices<A> c) {
  const Size size{groups, m, n, k, 128};
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
