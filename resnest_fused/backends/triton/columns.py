"""Sums over the rows of a matrix, BLOCK_ROWS at a time and always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_rows(
    values,  # pointers to (BLOCK_F), the first row
    step,
    rows,
    inside,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sum of rows that lie ``step`` elements apart."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, rows, BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        there = (row < rows) & inside[None, :]
        total += tl.load(values[None, :] + row * step, mask=there, other=0)
    return tl.sum(total, 0)
