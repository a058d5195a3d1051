"""Phase 2, attention: fc1, bn1, ReLU, fc2 and the r-softmax on (B, C)-sized data, and their
gradients."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.backends.triton.problem import Map, Mlp
from resnest_fused.backends.triton.prologue import (
    batch_norm,
    inverse_std,
    norm_at,
    relu,
    relu_backward,
)


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
def locate_product(program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's group, rows and first column. The next program takes the next columns."""
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(rows, BLOCK_M)
    m = ((program // across) % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    return program // (across * down), m.to(tl.int64)[:, None], (program % across) * BLOCK_N


# --- forward


@triton.jit(do_not_specialize=["batch"])
def hidden_kernel(
    gap,  # (B, C)
    weight,  # (I, C/K)
    bias,  # (I) or None
    bn1_weight,  # (I) or None, as the next three
    bn1_bias,
    bn1_mean,
    bn1_var,
    hidden,  # (B, I) or None
    u,  # (B, I) or None
    batch,
    inputs,
    outputs,
    CARDINALITY: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """hidden = fc1(gap) and, unless bn1 takes batch statistics, u = relu(bn1(hidden)).

    Grid: for each group, tiles of samples by outputs.
    """
    group, m, first = locate_product(tl.program_id(0), batch, outputs, BLOCK_M, BLOCK_N)
    n = (first + tl.arange(0, BLOCK_N))[None, :]
    i = group * outputs + n
    total = multiply(
        gap + m * (CARDINALITY * inputs) + group * inputs,
        weight + i.to(tl.int64) * inputs,
        m < batch,
        n < outputs,
        1,
        1,
        inputs,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        ACC,
    )
    if bias is not None:
        total += tl.load(bias + i, mask=n < outputs, other=0).to(ACC)
    to = m * (CARDINALITY * outputs) + i
    inside = (m < batch) & (n < outputs)
    if hidden is not None:
        tl.store(hidden + to, total, mask=inside)
    if u is not None:
        gamma, beta, center, invstd = norm_at(
            bn1_weight, bn1_bias, bn1_mean, bn1_var, i, n < outputs, EPS, ACC
        )
        tl.store(u + to, relu(batch_norm(total, gamma, beta, center, invstd)), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def batch_norm_kernel(
    hidden,  # (B, I)
    bn1_weight,  # (I) or None
    bn1_bias,  # (I) or None
    mean,  # (I)
    var,  # (I)
    u,  # (B, I)
    batch,
    inter,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """bn1's batch statistics, and u = relu(bn1(hidden)) with them.

    Grid: blocks of features.
    """
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    # The sums are of distances from the first sample, so that they do not cancel.
    origin = tl.load(hidden + f, mask=f < inter * tl.minimum(batch, 1), other=0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, batch, BLOCK_ROWS):
        b = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        inside = (b < batch) & (f < inter)
        total += tl.where(inside, tl.load(hidden + b * inter + f, mask=inside, other=0) - origin, 0)
    center = origin + (tl.sum(total, 0) / tl.maximum(batch, 1))[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, batch, BLOCK_ROWS):
        b = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        inside = (b < batch) & (f < inter)
        apart = tl.load(hidden + b * inter + f, mask=inside, other=0) - center
        total += tl.where(inside, apart * apart, 0)
    spread = (tl.sum(total, 0) / tl.maximum(batch, 1))[None, :]
    tl.store(mean + f, center, mask=f < inter)
    tl.store(var + f, spread, mask=f < inter)
    gamma, beta, _, _ = norm_at(bn1_weight, bn1_bias, None, None, f, f < inter, EPS, ACC)
    invstd = inverse_std(spread, EPS)
    for first in range(0, batch, BLOCK_ROWS):
        b = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        inside = (b < batch) & (f < inter)
        values = tl.load(hidden + b * inter + f, mask=inside, other=0)
        n = batch_norm(values, gamma, beta, center, invstd)
        tl.store(u + b * inter + f, relu(n), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def attention_kernel(
    u,  # (B, I)
    weight,  # (R*C, I/K)
    bias,  # (R*C) or None
    attention,  # (B, R, C)
    batch,
    inputs,
    outputs,
    CARDINALITY: tl.constexpr,
    RADIX: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """attention = r-softmax(fc2(u)); with radix 1 a sigmoid.

    Grid: for each group, tiles of samples by channels. A tile has BLOCK_N channels of each of
    SPLITS splits. SPLITS is the radix, rounded up to a power of two.
    """
    group, m, first = locate_product(tl.program_id(0), batch, outputs, BLOCK_M, BLOCK_N)
    j = tl.arange(0, SPLITS * BLOCK_N)[None, :]
    r = j // BLOCK_N
    n = first + j % BLOCK_N
    row = (group * RADIX + r) * outputs + n
    valid = (r < RADIX) & (n < outputs)
    total = multiply(
        u + m * (CARDINALITY * inputs) + group * inputs,
        weight + row.to(tl.int64) * inputs,
        m < batch,
        valid,
        1,
        1,
        inputs,
        BLOCK_M,
        SPLITS * BLOCK_N,
        BLOCK_D,
        ACC,
    )
    if bias is not None:
        total += tl.load(bias + row, mask=valid, other=0).to(ACC)
    if RADIX == 1:
        a = tl.sigmoid(total)
    else:
        logits = tl.where(r < RADIX, total, float("-inf"))
        logits = tl.reshape(logits, (BLOCK_M, SPLITS, BLOCK_N))
        e = tl.exp(logits - tl.max(logits, 1)[:, None, :])
        a = tl.reshape(e / tl.sum(e, 1)[:, None, :], (BLOCK_M, SPLITS * BLOCK_N))
    channels = CARDINALITY * outputs
    to = attention + m * RADIX * channels + r * channels + group * outputs + n
    tl.store(to, a, mask=(m < batch) & valid)


def attention(
    m: Map, gap: Tensor, mlp: Mlp, hidden: Tensor | None, statistics: tuple[Tensor, Tensor] | None
) -> Tensor:
    """attention (B, R, C); ``hidden`` and bn1's batch ``statistics`` are filled if given."""
    block, acc = launch.PRODUCT, launch.acc(m.x)
    u, result = m.empty(m.batch, mlp.fcs.inter), m.empty(m.batch, m.radix, m.channels)
    launch.run(
        hidden_kernel,
        block.tiles(m.batch, mlp.group_inter) * mlp.fcs.cardinality,
        (
            gap,
            mlp.fcs.fc1_weight,
            mlp.fcs.fc1_bias,
            *mlp.bn1[:4],
            hidden,
            None if statistics else u,
        ),
        batch=m.batch,
        inputs=mlp.group_channels,
        outputs=mlp.group_inter,
        CARDINALITY=mlp.fcs.cardinality,
        EPS=mlp.bn1.eps,
        ACC=acc,
        **block.options(),
    )
    if statistics:
        columns = launch.COLUMNS
        launch.run(
            batch_norm_kernel,
            triton.cdiv(mlp.fcs.inter, columns.features),
            (hidden, *mlp.bn1[:2], *statistics, u, m.batch, mlp.fcs.inter),
            EPS=mlp.bn1.eps,
            ACC=acc,
            **columns.options(),
        )
    splits = triton.next_power_of_2(m.radix)
    block = block._replace(n=max(block.n // splits, 16 // splits, 1))
    launch.run(
        attention_kernel,
        block.tiles(m.batch, mlp.group_channels) * mlp.fcs.cardinality,
        (u, mlp.fcs.fc2_weight, mlp.fcs.fc2_bias, result),
        batch=m.batch,
        inputs=mlp.group_inter,
        outputs=mlp.group_channels,
        CARDINALITY=mlp.fcs.cardinality,
        RADIX=m.radix,
        SPLITS=splits,
        ACC=acc,
        **block.options(),
    )
    return result


# --- backward


@triton.jit(do_not_specialize=["rows", "columns", "depth"])
def product_kernel(
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

    Grid: for each group, tiles of the result.
    """
    group, m, first = locate_product(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N)
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


@triton.jit(do_not_specialize=["batch"])
def batch_norm_backward_kernel(
    hidden,  # (B, I)
    du,  # (B, I)
    bn1_weight,  # (I) or None, as the next three
    bn1_bias,
    bn1_mean,
    bn1_var,
    dhidden,  # (B, I)
    u,  # (B, I)
    dweight,  # (I) or None
    dbias,  # (I) or None
    dfc1_bias,  # (I) or None
    batch,
    inter,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """dhidden from du, and the gradients of bn1 and of fc1's bias.

    Computes u again, which fc2's weight gradient needs.

    Grid: blocks of features.
    """
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    gamma, beta, center, invstd = norm_at(
        bn1_weight, bn1_bias, bn1_mean, bn1_var, f, f < inter, EPS, ACC
    )
    of_weight = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    of_bias = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, batch, BLOCK_ROWS):
        b = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        inside = (b < batch) & (f < inter)
        values = tl.load(hidden + b * inter + f, mask=inside, other=0)
        n = batch_norm(values, gamma, beta, center, invstd)
        tl.store(u + b * inter + f, relu(n), mask=inside)
        dn = relu_backward(tl.load(du + b * inter + f, mask=inside, other=0), n)
        of_weight += tl.where(inside, dn * (values - center) * invstd, 0)
        of_bias += dn
    weight_sum = tl.sum(of_weight, 0)[None, :]
    bias_sum = tl.sum(of_bias, 0)[None, :]
    if dweight is not None:
        tl.store(dweight + f, weight_sum.to(dweight.dtype.element_ty), mask=f < inter)
    if dbias is not None:
        tl.store(dbias + f, bias_sum.to(dbias.dtype.element_ty), mask=f < inter)
    total = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, batch, BLOCK_ROWS):
        b = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        inside = (b < batch) & (f < inter)
        values = tl.load(hidden + b * inter + f, mask=inside, other=0)
        n = batch_norm(values, gamma, beta, center, invstd)
        grad = relu_backward(tl.load(du + b * inter + f, mask=inside, other=0), n)
        if BATCH_STATS:
            grad -= bias_sum / batch + (values - center) * invstd * (weight_sum / batch)
        grad = tl.where(inside, gamma * invstd * grad, 0)
        tl.store(dhidden + b * inter + f, grad, mask=inside)
        total += grad
    if dfc1_bias is not None:
        tl.store(
            dfc1_bias + f, tl.sum(total, 0)[None, :].to(dfc1_bias.dtype.element_ty), mask=f < inter
        )


@triton.jit(do_not_specialize=["batch"])
def sum_over_batch_kernel(
    values,  # (B, F)
    result,  # (F)
    batch,
    features,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sum over b of values[b, f]. Grid: blocks of features."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, batch, BLOCK_ROWS):
        b = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        inside = (b < batch) & (f < features)
        total += tl.load(values + b * features + f, mask=inside, other=0)
    summed = tl.sum(total, 0)[None, :].to(result.dtype.element_ty)
    tl.store(result + f, summed, mask=f < features)


class Gradients(NamedTuple):
    """Where the gradients go; None if not wanted."""

    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None
    bn1_weight: Tensor | None
    bn1_bias: Tensor | None
    gap: Tensor


def attention_backward(
    m: Map,
    mlp: Mlp,
    gap: Tensor,
    hidden: Tensor,
    dlogits: Tensor,
    grads: Gradients,
) -> None:
    """Fill ``grads`` from the gradients of the logits (B, K, R, C/K)."""
    batch, inter, channels, groups = m.batch, mlp.fcs.inter, m.channels, mlp.fcs.cardinality
    inputs, hiddens = mlp.group_channels, mlp.group_inter  # per group
    outputs = m.radix * inputs
    columns, acc = launch.COLUMNS, launch.acc(m.x)
    du, dhidden, u = (m.empty(batch, inter) for _ in range(3))
    # du = fc2^T dlogits
    product(
        (dlogits, outputs, m.features, 1),
        (mlp.fcs.fc2_weight, outputs * hiddens, 1, hiddens),
        (du, hiddens, inter),
        (groups, batch, hiddens, outputs),
        acc,
    )
    launch.run(
        batch_norm_backward_kernel,
        triton.cdiv(inter, columns.features),
        (hidden, du, *mlp.bn1[:4], dhidden, u, grads.bn1_weight, grads.bn1_bias, grads.fc1_bias),
        batch=batch,
        inter=inter,
        BATCH_STATS=mlp.bn1.batch_stats,
        EPS=mlp.bn1.eps,
        ACC=acc,
        **columns.options(),
    )
    if grads.fc2_weight is not None:  # dlogits^T u
        product(
            (dlogits, outputs, 1, m.features),
            (u, hiddens, 1, inter),
            (grads.fc2_weight, outputs * hiddens, hiddens),
            (groups, outputs, hiddens, batch),
            acc,
        )
    if grads.fc1_weight is not None:  # dhidden^T gap
        product(
            (dhidden, hiddens, 1, inter),
            (gap, inputs, 1, channels),
            (grads.fc1_weight, hiddens * inputs, inputs),
            (groups, hiddens, inputs, batch),
            acc,
        )
    # dgap = fc1^T dhidden
    product(
        (dhidden, hiddens, inter, 1),
        (mlp.fcs.fc1_weight, hiddens * inputs, 1, inputs),
        (grads.gap, inputs, channels),
        (groups, batch, inputs, hiddens),
        acc,
    )
    if grads.fc2_bias is not None:
        launch.run(
            sum_over_batch_kernel,
            triton.cdiv(m.features, columns.features),
            (dlogits, grads.fc2_bias, batch, m.features),
            ACC=acc,
            **columns.options(),
        )


def product(
    a: tuple[Tensor, int, int, int],
    b: tuple[Tensor, int, int, int],
    result: tuple[Tensor, int, int],
    sizes: tuple[int, int, int, int],
    acc: tl.dtype,
) -> None:
    """One matrix product for each group, into ``result``.

    Each tensor comes with its strides in elements. For a they are of groups, rows and depth, for b
    of groups, columns and depth, for the result of groups and rows. ``sizes`` are groups, rows,
    columns and depth.
    """
    groups, rows, columns, depth = sizes
    block = launch.PRODUCT
    launch.run(
        product_kernel,
        block.tiles(rows, columns) * groups,
        (a[0], b[0], result[0], rows, columns, depth, *a[1:], *b[1:], *result[1:]),
        ACC=acc,
        **block.options(),
    )
