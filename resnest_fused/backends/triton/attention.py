"""Phase 2, attention: fc1, bn1, ReLU, fc2 and the r-softmax on (B, C)-sized data, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.backends.triton.pool import Pooled, finish_gap
from resnest_fused.backends.triton.problem import Map, Mlp
from resnest_fused.backends.triton.product import locate_product, multiply
from resnest_fused.backends.triton.prologue import batch_norm, inverse_std, norm_at, relu
from resnest_fused.backends.triton.stages import finish, take, wait_for

_GAP = tl.constexpr(0)
_HIDDEN = tl.constexpr(1)
_NORM = tl.constexpr(2)


@triton.jit(do_not_specialize=["batch", "tiles", "gaps", "hiddens", "norms"])
def attention_kernel(
    partial,  # (B, tiles, C) or None
    gap,  # (B, C)
    fc1_weight,  # (I, C/K)
    fc1_bias,  # (I) or None
    bn1_weight,  # (I) or None, as the next three
    bn1_bias,
    bn1_mean,
    bn1_var,
    hidden,  # (B, I) or None
    mean,  # (I) or None, as the next: with batch statistics
    var,
    u,  # (B, I)
    fc2_weight,  # (R*C, I/K)
    fc2_bias,  # (R*C) or None
    attention,  # (B, R, C)
    counters,
    batch,
    tiles,
    group_channels,
    group_inter,
    gaps,
    hiddens,
    norms,
    CARDINALITY: tl.constexpr,
    RADIX: tl.constexpr,
    SPLITS: tl.constexpr,
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
    """Stages: gap from the pool's partial sums, if there are any; hidden; with batch statistics
    these and u; attention. So many items have the first three.
    """
    item = take(counters)
    if partial is not None:
        if item < gaps:
            channels = CARDINALITY * group_channels
            finish_gap(item, partial, gap, batch, channels, tiles, BLOCK_TILES, BLOCK_PAIRS, ACC)
            finish(counters, _GAP)
        item -= gaps
    if (item >= 0) & (item < hiddens):
        if partial is not None:
            wait_for(counters, _GAP, gaps)
        _hidden(
            item,
            gap,
            fc1_weight,
            fc1_bias,
            bn1_weight,
            bn1_bias,
            bn1_mean,
            bn1_var,
            hidden,
            u if mean is None else None,
            batch,
            group_channels,
            group_inter,
            CARDINALITY,
            EPS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            ACC,
        )
        finish(counters, _HIDDEN)
    item -= hiddens
    if mean is not None:
        if (item >= 0) & (item < norms):
            wait_for(counters, _HIDDEN, hiddens)
            inter = CARDINALITY * group_inter
            _batch_statistics(
                item,
                hidden,
                bn1_weight,
                bn1_bias,
                mean,
                var,
                u,
                batch,
                inter,
                EPS,
                BLOCK_ROWS,
                BLOCK_F,
                ACC,
            )
            finish(counters, _NORM)
        item -= norms
    if item >= 0:
        if mean is not None:
            wait_for(counters, _NORM, norms)
        else:
            wait_for(counters, _HIDDEN, hiddens)
        _attention(
            item,
            u,
            fc2_weight,
            fc2_bias,
            attention,
            batch,
            group_inter,
            group_channels,
            CARDINALITY,
            RADIX,
            SPLITS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            ACC,
        )


@triton.jit
def _hidden(
    item,
    gap,
    weight,
    bias,
    bn1_weight,
    bn1_bias,
    bn1_mean,
    bn1_var,
    hidden,
    u,
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

    Items: for each group, tiles of samples by outputs.
    """
    group, m, first = locate_product(item, batch, outputs, BLOCK_M, BLOCK_N)
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


@triton.jit
def _batch_statistics(
    item,
    hidden,
    bn1_weight,
    bn1_bias,
    mean,
    var,
    u,
    batch,
    inter,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """bn1's batch statistics, and u = relu(bn1(hidden)) with them.

    Items: blocks of features.
    """
    f = item * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
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


@triton.jit
def _attention(
    item,
    u,
    weight,
    bias,
    attention,
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

    Items: for each group, tiles of samples by channels. A tile has all SPLITS splits of its
    channels. SPLITS is the radix, rounded up to a power of two.
    """
    CHANNELS: tl.constexpr = BLOCK_N // SPLITS
    group, m, first = locate_product(item, batch, outputs, BLOCK_M, CHANNELS)
    j = tl.arange(0, BLOCK_N)[None, :]
    r = j // CHANNELS
    n = first + j % CHANNELS
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
        BLOCK_N,
        BLOCK_D,
        ACC,
    )
    if bias is not None:
        total += tl.load(bias + row, mask=valid, other=0).to(ACC)
    if RADIX == 1:
        a = tl.sigmoid(total)
    else:
        logits = tl.where(r < RADIX, total, float("-inf"))
        logits = tl.reshape(logits, (BLOCK_M, SPLITS, CHANNELS))
        e = tl.exp(logits - tl.max(logits, 1)[:, None, :])
        a = tl.reshape(e / tl.sum(e, 1)[:, None, :], (BLOCK_M, BLOCK_N))
    channels = CARDINALITY * outputs
    to = attention + m * RADIX * channels + r * channels + group * outputs + n
    tl.store(to, a, mask=(m < batch) & valid)


def attention(
    m: Map,
    pooled: Pooled,
    mlp: Mlp,
    hidden: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """attention (B, R, C); ``hidden`` and bn1's batch ``statistics`` are filled if given."""
    block, columns, groups = launch.PRODUCT, launch.COLUMNS, mlp.fcs.cardinality
    result = m.empty(m.batch, m.radix, m.channels)
    splits = launch.power_of_2(m.radix)
    partials = launch.partial_block(pooled.tiles)
    gaps = 0 if pooled.partial is None else partials.blocks(m.batch * m.channels)
    hiddens = groups * block.tiles(m.batch, mlp.group_inter)
    norms = columns.blocks(mlp.fcs.inter) if statistics else 0
    attentions = groups * block.tiles(m.batch, mlp.group_channels * splits)
    launch.run(
        attention_kernel,
        gaps + hiddens + norms + attentions,
        (
            pooled.partial,
            pooled.gap,
            mlp.fcs.fc1_weight,
            mlp.fcs.fc1_bias,
            *mlp.bn1[:4],
            hidden,
            *(statistics or (None, None)),
            m.empty(m.batch, mlp.fcs.inter),
            mlp.fcs.fc2_weight,
            mlp.fcs.fc2_bias,
            result,
            pooled.counters,
            m.batch,
            pooled.tiles,
            mlp.group_channels,
            mlp.group_inter,
            gaps,
            hiddens,
            norms,
        ),
        CARDINALITY=groups,
        RADIX=m.radix,
        SPLITS=splits,
        EPS=mlp.bn1.eps,
        ACC=launch.acc(m.x),
        **block.options(),
        **columns.constants(),
        **partials.of_partials(),
    )
    return result
