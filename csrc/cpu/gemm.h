// Small grouped matrix products for the FCs. The order of a sum depends on k alone: an element of
// the result is the same to the bit for any m, n and number of threads. No library's GEMM promises
// that.
#pragma once

#include <cstdint>

namespace resnest_fused::cpu {

// One matrix per group: element (i, j) of group g at data[g * group_stride + i * row_stride + j].
template <typename A>
struct Matrices {
  A* data;
  int64_t row_stride;
  int64_t group_stride;
};

// C[g] (m, n) = A[g] (m, k) B[g]^T + bias[g], B[g] being (n, k) and of any type that widens to A;
// bias (groups, n) or null.
template <typename A, typename B>
void gemm_nt(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             Matrices<const B> b, const A* bias, Matrices<A> c);

// C[g] (m, n) = A[g] B[g], B[g] being (k, n). A[g] is (m, k), or when a_transposed stored as (k,
// m).
template <typename A, typename B>
void gemm_nn(int64_t groups, int64_t m, int64_t n, int64_t k, Matrices<const A> a,
             bool a_transposed, Matrices<const B> b, Matrices<A> c);

}  // namespace resnest_fused::cpu
