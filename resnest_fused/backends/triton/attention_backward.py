"""Phase 2's backward in one launch: from the pool's sums to the gradients of all parameters."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.backends.triton.columns import sum_rows
from resnest_fused.backends.triton.pool import PROLOGUE_SUMS, PooledBackward, finish_pool_backward
from resnest_fused.backends.triton.problem import Map, Mlp
from resnest_fused.backends.triton.product import store_product
from resnest_fused.backends.triton.prologue import (
    batch_norm,
    finish_prologue_backward,
    norm_at,
    relu,
    relu_backward,
)
from resnest_fused.backends.triton.stages import finish, take, wait_for

_LOGITS = tl.constexpr(0)
_HIDDEN = tl.constexpr(1)
_NORM = tl.constexpr(2)
_GAP = tl.constexpr(3)


@triton.jit(
    do_not_specialize=[
        "batch",
        "tiles",
        "pixels",
        "logits",
        "hiddens",
        "norms",
        "gaps",
        "prologues",
        "weights2",
        "weights1",
    ]
)
def attention_backward_kernel(
    partial,  # (B, tiles, kinds, R, C)
    bn0_weight,  # (R*C) or None
    bn0_bias,  # (R*C) or None
    attention,  # (B, R, C)
    sums,  # (B, 4, R, C) or None, without a prologue
    dlogits,  # (B, K, R, C/K)
    fc2_weight,  # (R*C, I/K)
    du,  # (B, I)
    hidden,  # (B, I)
    bn1_weight,  # (I) or None, as the next three
    bn1_bias,
    bn1_mean,
    bn1_var,
    dhidden,  # (B, I)
    u,  # (B, I)
    fc1_weight,  # (I, C/K)
    gap,  # (B, C)
    dgap,  # (B, C)
    mean_dz,  # (R*C) or None
    mean_dz_xhat,  # (R*C) or None
    dbn0_weight,  # (R*C) or None, as the next
    dbn0_bias,
    dfc1_weight,  # (I, C/K) or None
    dfc1_bias,  # (I) or None
    dfc2_weight,  # (R*C, I/K) or None
    dfc2_bias,  # (R*C) or None
    dbn1_weight,  # (I) or None, as the next
    dbn1_bias,
    counters,
    batch,
    tiles,
    pixels,
    group_channels,
    group_inter,
    logits,
    hiddens,
    norms,
    gaps,
    prologues,
    weights2,
    weights1,
    CARDINALITY: tl.constexpr,
    RELU: tl.constexpr,
    RADIX: tl.constexpr,
    SPLITS: tl.constexpr,
    BATCH_STATS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """Stages: dlogits and the prologue's sums; du = fc2^T dlogits; bn1's gradients, dhidden and u;
    dgap = fc1^T dhidden; bn0's gradients; and those that nothing waits for, dfc2 = dlogits^T u,
    dfc1 = dhidden^T gap and dfc2_bias. So many items have all but the last.
    """
    outputs = RADIX * group_channels  # of fc2 in each group
    channels = CARDINALITY * group_channels
    features = CARDINALITY * outputs
    inter = CARDINALITY * group_inter
    item = take(counters)
    if item < logits:
        finish_pool_backward(
            item,
            partial,
            bn0_weight,
            bn0_bias,
            attention,
            sums,
            None,
            dlogits,
            batch,
            group_channels,
            tiles,
            CARDINALITY,
            RELU,
            RADIX,
            SPLITS,
            BLOCK_TILES,
            BLOCK_PAIRS,
            ACC,
        )
        finish(counters, _LOGITS)
    item -= logits
    if (item >= 0) & (item < hiddens):
        wait_for(counters, _LOGITS, logits)
        store_product(
            item,
            dlogits,
            fc2_weight,
            du,
            batch,
            group_inter,
            outputs,
            outputs,
            features,
            1,
            outputs * group_inter,
            1,
            group_inter,
            group_inter,
            inter,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            ACC,
        )
        finish(counters, _HIDDEN)
    item -= hiddens
    if (item >= 0) & (item < norms):
        wait_for(counters, _HIDDEN, hiddens)
        _batch_norm_backward(
            item,
            hidden,
            du,
            bn1_weight,
            bn1_bias,
            bn1_mean,
            bn1_var,
            dhidden,
            u,
            dbn1_weight,
            dbn1_bias,
            dfc1_bias,
            batch,
            inter,
            BATCH_STATS,
            EPS,
            BLOCK_ROWS,
            BLOCK_F,
            ACC,
        )
        finish(counters, _NORM)
    item -= norms
    if (item >= 0) & (item < gaps):
        wait_for(counters, _NORM, norms)
        store_product(
            item,
            dhidden,
            fc1_weight,
            dgap,
            batch,
            group_channels,
            group_inter,
            group_inter,
            inter,
            1,
            group_inter * group_channels,
            1,
            group_channels,
            group_channels,
            channels,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            ACC,
        )
        finish(counters, _GAP)
    item -= gaps
    if sums is not None:
        if (item >= 0) & (item < prologues):
            wait_for(counters, _GAP, gaps)
            finish_prologue_backward(
                item,
                sums,
                attention,
                dgap,
                dbn0_weight,
                dbn0_bias,
                mean_dz,
                mean_dz_xhat,
                batch,
                channels,
                pixels,
                RADIX,
                BLOCK_ROWS,
                BLOCK_F,
                ACC,
            )
        item -= prologues
    if dfc2_weight is not None:
        if (item >= 0) & (item < weights2):
            wait_for(counters, _NORM, norms)
            store_product(
                item,
                dlogits,
                u,
                dfc2_weight,
                outputs,
                group_inter,
                batch,
                outputs,
                1,
                features,
                group_inter,
                1,
                inter,
                outputs * group_inter,
                group_inter,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                ACC,
            )
        item -= weights2
    if dfc1_weight is not None:
        if (item >= 0) & (item < weights1):
            wait_for(counters, _NORM, norms)
            store_product(
                item,
                dhidden,
                gap,
                dfc1_weight,
                group_inter,
                group_channels,
                batch,
                group_inter,
                1,
                inter,
                group_channels,
                1,
                channels,
                group_inter * group_channels,
                group_channels,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                ACC,
            )
        item -= weights1
    if dfc2_bias is not None:
        f = item * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = f < features
        if item >= 0:
            wait_for(counters, _LOGITS, logits)
            total = sum_rows(dlogits + f, features, batch, inside, BLOCK_ROWS, BLOCK_F, ACC)
            tl.store(dfc2_bias + f, total.to(dfc2_bias.dtype.element_ty), mask=inside)


@triton.jit
def _batch_norm_backward(
    item,
    hidden,
    du,
    bn1_weight,
    bn1_bias,
    bn1_mean,
    bn1_var,
    dhidden,
    u,
    dweight,
    dbias,
    dfc1_bias,
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

    Items: blocks of features.
    """
    f = item * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
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


class Gradients(NamedTuple):
    """Where the gradients go; None if not wanted."""

    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None
    bn1_weight: Tensor | None
    bn1_bias: Tensor | None
    bn0_weight: Tensor | None
    bn0_bias: Tensor | None
    bn0_means: tuple[Tensor, Tensor] | None  # of dz and of dz * xhat


def attention_backward(
    m: Map,
    pooled: PooledBackward,
    mlp: Mlp,
    gap: Tensor,
    hidden: Tensor,
    attention: Tensor,
    grads: Gradients,
) -> Tensor:
    """dgap (B, C); fills ``grads``."""
    batch, radix, channels = attention.shape
    groups, inter = mlp.fcs.cardinality, mlp.fcs.inter
    inputs, hiddens = mlp.group_channels, mlp.group_inter
    outputs = radix * inputs
    splits = launch.power_of_2(radix)
    block, columns = launch.PRODUCT, launch.COLUMNS
    partials = launch.partial_block(pooled.tiles)
    dlogits = m.empty(batch, groups, radix, inputs)
    dgap = m.empty(batch, channels)
    means = grads.bn0_means or (None, None)
    of_bn0 = (*means, grads.bn0_weight, grads.bn0_bias)
    sums = None
    if any(tensor is not None for tensor in of_bn0):
        sums = m.empty(batch, PROLOGUE_SUMS, radix, channels)
    items = (
        partials.blocks(batch * channels * splits),
        groups * block.tiles(batch, hiddens),
        columns.blocks(inter),
        groups * block.tiles(batch, inputs),
        0 if sums is None else columns.blocks(m.features),
        0 if grads.fc2_weight is None else groups * block.tiles(outputs, hiddens),
        0 if grads.fc1_weight is None else groups * block.tiles(hiddens, inputs),
    )
    launch.run(
        attention_backward_kernel,
        sum(items) + (0 if grads.fc2_bias is None else columns.blocks(m.features)),
        (
            pooled.partial,
            *m.bn0[:2],
            attention,
            sums,
            dlogits,
            mlp.fcs.fc2_weight,
            m.empty(batch, inter),
            hidden,
            *mlp.bn1[:4],
            m.empty(batch, inter),
            m.empty(batch, inter),
            mlp.fcs.fc1_weight,
            gap,
            dgap,
            *of_bn0,
            grads.fc1_weight,
            grads.fc1_bias,
            grads.fc2_weight,
            grads.fc2_bias,
            grads.bn1_weight,
            grads.bn1_bias,
            pooled.counters,
            batch,
            pooled.tiles,
            m.pixels,
            inputs,
            hiddens,
            *items,
        ),
        CARDINALITY=groups,
        RELU=m.relu,
        RADIX=radix,
        SPLITS=splits,
        BATCH_STATS=mlp.bn1.batch_stats,
        EPS=mlp.bn1.eps,
        ACC=launch.acc(m.x),
        **block.options(),
        **columns.constants(),
        **partials.of_partials(),
    )
    return dgap
