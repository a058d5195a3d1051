"""A tile of a matrix product, for the FCs and their gradients."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_product(item, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An item's group, rows and first column. The next item takes the next columns."""
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    m = ((item // across) % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    return item // (across * down), m.to(tl.int64)[:, None], (item % across) * BLOCK_N


@triton.jit
def multiply(
    a,  # pointers to (M, 1)
    b,  # pointers to (1, N)
    a_inside,
    b_inside,
    a_step,
    b_step,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """sum_d a[m, d] b[d, n], in ascending order of d; the steps are strides of d in elements."""
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(0, depth, BLOCK_D):
        k = (first + d).to(tl.int64)
        inside = k < depth
        left = tl.load(a + (k * a_step)[None, :], mask=a_inside & inside[None, :], other=0).to(ACC)
        right = tl.load(b + (k * b_step)[:, None], mask=b_inside & inside[:, None], other=0).to(ACC)
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACC)
    return total


@triton.jit
def store_product(
    item,
    a,
    b,
    result,
    rows,
    columns,
    depth,
    a_group,
    a_row,
    a_step,
    b_group,
    b_column,
    b_step,
    result_group,
    result_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """result[g, m, n] = sum_d a[g, m, d] b[g, d, n]; the strides are in elements.

    Items: for each group, tiles of the result.
    """
    group, m, first = locate_product(item, rows, columns, BLOCK_M, BLOCK_N)
    n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    total = multiply(
        a + group * a_group + m * a_row,
        b + group * b_group + n * b_column,
        m < rows,
        n < columns,
        a_step,
        b_step,
        depth,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        ACC,
    )
    to = result + group * result_group + m * result_row + n
    tl.store(to, total.to(result.dtype.element_ty), mask=(m < rows) & (n < columns))
