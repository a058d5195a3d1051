"""Phase 1, pool: the first read of x. Forward: prologue, radix sum, global average; backward: the
sums over pixels of dout and x."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.backends.triton.columns import sum_rows
from resnest_fused.backends.triton.map import aligned, inside, load_tile, locate
from resnest_fused.backends.triton.problem import Map
from resnest_fused.backends.triton.prologue import (
    norm_at,
    norm_of_tile,
    preactivation,
    relu,
    relu_backward,
)
from resnest_fused.backends.triton.stages import make_counters, open_stages

# With a prologue the sums are S1 to S4 of finish_prologue_backward, in this order.
PROLOGUE_SUMS = 4


@triton.jit
def pool_kernel(
    x,  # (B, R*C, H, W)
    bn0_weight,  # (R*C) or None, as the next three
    bn0_bias,
    bn0_mean,
    bn0_var,
    gap,  # (B, tiles, C)
    counters,
    channels,
    pixels,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    RADIX: tl.constexpr,
    NHWC: tl.constexpr,
    ALIGN: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """gap[b,t,c] = 1/HW * sum_{r, p in tile t} z[b,r,c,p].

    Grid: tiles of the map. Reads R units.
    """
    open_stages(counters)
    channels, pixels = aligned(channels, pixels, NHWC, ALIGN, SLAB)
    sample, first, tile = locate(tl.program_id(0), channels, pixels, BLOCK_C, BLOCK_P)
    c = first + tl.arange(0, BLOCK_C)
    within = inside(first, tile, channels, pixels, BLOCK_C, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for r in tl.static_range(RADIX):
        f = r * channels + c
        z = load_tile(
            x, sample, r, first, tile, RADIX, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
        ).to(ACC)
        if RELU:
            gamma, beta, center, invstd = norm_of_tile(
                bn0_weight, bn0_bias, bn0_mean, bn0_var, f, c < channels, EPS, BLOCK_C, ACC
            )
            z = tl.where(within, relu(preactivation(z, gamma, beta, center, invstd)), 0)
        total += z
    row = sample * tl.cdiv(pixels, BLOCK_P) + tile
    tl.store(gap + row * channels + c, tl.sum(total, 0) / pixels, mask=c < channels)


@triton.jit
def finish_gap(
    item,
    partial,  # (B, tiles, C)
    gap,  # (B, C)
    batch,
    channels,
    tiles,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    ACC: tl.constexpr,
):
    """gap[b,c] = sum_t partial[b,t,c]. Items: blocks of pairs (b, c)."""
    i = item.to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    inside = i < batch.to(tl.int64) * channels
    from_ = partial + i // channels * tiles * channels + i % channels
    total = sum_rows(from_, channels, tiles, inside, BLOCK_TILES, BLOCK_PAIRS, ACC)
    tl.store(gap + i, total, mask=inside)


@triton.jit(do_not_specialize=["batch", "tiles"])
def pool_finish_kernel(
    partial,
    gap,
    batch,
    channels,
    tiles,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    ACC: tl.constexpr,
):
    """`finish_gap` alone. Grid: its items."""
    item = tl.program_id(0)
    finish_gap(item, partial, gap, batch, channels, tiles, BLOCK_TILES, BLOCK_PAIRS, ACC)


class Pooled(NamedTuple):
    """What the pool leaves for phase 2."""

    gap: Tensor  # (B, C), to be filled from the partial sums, if there are any
    partial: Tensor | None  # (B, tiles, C); None where a program pools whole channels
    tiles: int
    counters: Tensor  # of phase 2's stages


def start_pool(m: Map) -> Pooled:
    """The pool up to the sums of its programs."""
    counters = make_counters(m)

    def run(block: launch.MapBlock) -> Pooled:
        blocks, tiles = block.tiles(m.channels, m.pixels)
        gap = m.empty(m.batch, m.channels)
        partial = None if tiles == 1 else m.empty(m.batch, tiles, m.channels)
        launch.run(
            pool_kernel,
            m.batch * tiles * blocks,
            (
                m.x,
                *m.bn0[:4],
                gap if partial is None else partial,
                counters,
                m.channels,
                m.pixels,
            ),
            **launch.map_options(m, block),
        )
        return Pooled(gap, partial, tiles, counters)

    return launch.best("pool", m, run)


def pool(m: Map) -> Tensor:
    """gap (B, C)."""
    gap, partial, tiles, _ = start_pool(m)
    if partial is not None:
        block = launch.partial_block(tiles)
        launch.run(
            pool_finish_kernel,
            block.blocks(m.batch * m.channels),
            (partial, gap, m.batch, m.channels, tiles),
            ACC=launch.acc(m.x),
            num_warps=block.num_warps,
            **block.of_partials(),
        )
    return gap


@triton.jit
def pool_backward_kernel(
    dout,  # (B, C, H, W)
    x,  # (B, R*C, H, W)
    bn0_weight,  # (R*C) or None, as the next three
    bn0_bias,
    bn0_mean,
    bn0_var,
    partial,  # (B, tiles, kinds, R, C)
    counters,
    channels,
    pixels,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    RADIX: tl.constexpr,
    NHWC: tl.constexpr,
    ALIGN: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """partial[b,t,r,c] = sum_{p in tile t} dout x, or with a prologue partial[b,t,s,r,c], the sums
    S1 to S4 of finish_prologue_backward.

    Grid: tiles of STEPS times BLOCK_P pixels. Reads R + 1 units, dout once a split.
    """
    open_stages(counters)
    channels, pixels = aligned(channels, pixels, NHWC, ALIGN, SLAB)
    sample, first, tile = locate(tl.program_id(0), channels, pixels, BLOCK_C, STEPS * BLOCK_P)
    c = first + tl.arange(0, BLOCK_C)
    features = RADIX * channels
    row = sample * tl.cdiv(pixels, STEPS * BLOCK_P) + tile
    start = tile * STEPS
    stop = tl.minimum(start + STEPS, tl.cdiv(pixels, BLOCK_P))
    for r in tl.static_range(RADIX):
        f = r * channels + c
        gamma, beta, center, invstd = norm_of_tile(
            bn0_weight, bn0_bias, bn0_mean, bn0_var, f, c < channels, EPS, BLOCK_C, ACC
        )
        s1 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        s2 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        s3 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        s4 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        # Three blocks are on their way while one is added up.
        for step in tl.range(start, stop, num_stages=4):
            g = load_tile(
                dout, sample, 0, first, step, 1, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
            ).to(ACC)
            value = load_tile(
                x, sample, r, first, step, RADIX, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
            ).to(ACC)
            if RELU:
                n = preactivation(value, gamma, beta, center, invstd)
                within = inside(first, step, channels, pixels, BLOCK_C, BLOCK_P)
                # The ReLU's mask zeroes both factors, because 0 times infinity is NaN.
                m = tl.where(within, relu_backward(tl.full(n.shape, 1, ACC), n), 0)
                passed_g = relu_backward(g, n)
                passed_x = tl.where(within, relu_backward(value - center[None, :], n), 0)
                s1 += passed_g
                s2 += m
                s3 += passed_g * passed_x
                s4 += passed_x
            else:
                s1 += g * value
        if RELU:
            to = partial + row * 4 * features + f
            tl.store(to, tl.sum(s1, 0), mask=c < channels)
            tl.store(to + features, tl.sum(s2, 0), mask=c < channels)
            tl.store(to + 2 * features, tl.sum(s3, 0) * invstd, mask=c < channels)
            tl.store(to + 3 * features, tl.sum(s4, 0) * invstd, mask=c < channels)
        else:
            tl.store(partial + row * features + f, tl.sum(s1, 0), mask=c < channels)


@triton.jit
def finish_pool_backward(
    item,
    partial,  # (B, tiles, kinds, R, C)
    bn0_weight,  # (R*C) or None
    bn0_bias,  # (R*C) or None
    attention,  # (B, R, C), needed for dlogits
    sums,  # (B, 4, R, C) or None, without a prologue
    dattention,  # (B, R, C) or None
    dlogits,  # (B, K, R, C/K) or None
    batch,
    group_channels,
    tiles,
    CARDINALITY: tl.constexpr,
    RELU: tl.constexpr,
    RADIX: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradients of the attention and of the logits, where asked for, from the partial sums.

    dattention = sum_p dout z = gamma S3 + beta S1, or without a prologue the sum itself;
    dlogits = a (da - sum_r a da), or with radix 1, for the sigmoid, a (1 - a) da.

    Items: blocks of pairs (b, c). A block has BLOCK_PAIRS columns: each pair's SPLITS splits.
    SPLITS is the radix, rounded up to a power of two.
    """
    COUNT: tl.constexpr = BLOCK_PAIRS // SPLITS
    channels = CARDINALITY * group_channels
    features = RADIX * channels
    j = tl.arange(0, BLOCK_PAIRS)
    i = item.to(tl.int64) * COUNT + j % COUNT
    r = j // COUNT
    inside = (i < batch.to(tl.int64) * channels) & (r < RADIX)
    b, c = i // channels, i % channels
    f = r * channels + c
    if RELU:
        step = 4 * features
        from_ = partial + b * tiles * step + f
        s1 = sum_rows(from_, step, tiles, inside, BLOCK_TILES, BLOCK_PAIRS, ACC)
        s3 = sum_rows(from_ + 2 * features, step, tiles, inside, BLOCK_TILES, BLOCK_PAIRS, ACC)
        if sums is not None:
            s2 = sum_rows(from_ + features, step, tiles, inside, BLOCK_TILES, BLOCK_PAIRS, ACC)
            s4 = sum_rows(from_ + 3 * features, step, tiles, inside, BLOCK_TILES, BLOCK_PAIRS, ACC)
            to = sums + b * step + f
            tl.store(to, s1, mask=inside)
            tl.store(to + features, s2, mask=inside)
            tl.store(to + 2 * features, s3, mask=inside)
            tl.store(to + 3 * features, s4, mask=inside)
        gamma, beta, _, _ = norm_at(bn0_weight, bn0_bias, None, None, f, inside, 0, ACC)
        da = gamma * s3 + beta * s1
    else:
        from_ = partial + b * tiles * features + f
        da = sum_rows(from_, features, tiles, inside, BLOCK_TILES, BLOCK_PAIRS, ACC)
    if dattention is not None:
        tl.store(dattention + b * features + f, da, mask=inside)
    if dlogits is not None:
        a = tl.load(attention + b * features + f, mask=inside, other=0)
        if RADIX == 1:
            dl = a * (1 - a) * da
        else:
            # No NaN of a split that does not exist: both factors are zero there.
            a_da = tl.reshape(tl.where(inside, a * da, 0), (SPLITS, COUNT))
            whole = tl.broadcast_to(tl.sum(a_da, 0)[None, :], (SPLITS, COUNT))
            dl = a * (da - tl.reshape(whole, (BLOCK_PAIRS,)))
        group = c // group_channels
        row = (group * RADIX + r) * group_channels + c % group_channels
        tl.store(dlogits + b * features + row, dl, mask=inside)


@triton.jit(do_not_specialize=["batch", "tiles"])
def pool_backward_finish_kernel(
    partial,
    bn0_weight,
    bn0_bias,
    sums,
    dattention,
    batch,
    channels,
    tiles,
    RELU: tl.constexpr,
    RADIX: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    ACC: tl.constexpr,
):
    """`finish_pool_backward` alone, for the sums and the gradients of the attention.

    Grid: its items.
    """
    finish_pool_backward(
        tl.program_id(0),
        partial,
        bn0_weight,
        bn0_bias,
        None,
        sums,
        dattention,
        None,
        batch,
        channels,
        tiles,
        1,
        RELU,
        RADIX,
        SPLITS,
        BLOCK_TILES,
        BLOCK_PAIRS,
        ACC,
    )


class PooledBackward(NamedTuple):
    """What the backward's first read of the map leaves for phase 2."""

    partial: Tensor  # (B, tiles, kinds, R, C)
    tiles: int
    counters: Tensor  # of phase 2's stages


def start_pool_backward(m: Map, dout: Tensor) -> PooledBackward:
    """The sums over pixels up to those of its programs."""
    kinds = PROLOGUE_SUMS if m.relu else 1
    counters = make_counters(m)

    def run(block: launch.MapBlock) -> PooledBackward:
        steps = min(launch.STEPS, block.tiles(m.channels, m.pixels)[1])
        blocks, tiles = block.tiles(m.channels, m.pixels, steps)
        partial = m.empty(m.batch, tiles, kinds, m.radix, m.channels)
        launch.run(
            pool_backward_kernel,
            m.batch * tiles * blocks,
            (dout, m.x, *m.bn0[:4], partial, counters, m.channels, m.pixels),
            STEPS=steps,
            **launch.map_options(m, block),
        )
        return PooledBackward(partial, tiles, counters)

    return launch.best("pool_backward", m, run)


def pool_backward(m: Map, dout: Tensor) -> tuple[Tensor, Tensor | None]:
    """dattention (B, R, C), and with a prologue the sums (B, 4, R, C)."""
    splits = (m.radix, m.channels)
    dattention = m.empty(m.batch, *splits)
    sums = m.empty(m.batch, PROLOGUE_SUMS, *splits) if m.relu else None
    partial, tiles, _ = start_pool_backward(m, dout)
    block, padded = launch.partial_block(tiles), launch.power_of_2(m.radix)
    launch.run(
        pool_backward_finish_kernel,
        block.blocks(m.batch * m.channels * padded),
        (partial, *m.bn0[:2], sums, dattention, m.batch, m.channels, tiles),
        RELU=m.relu,
        RADIX=m.radix,
        SPLITS=padded,
        ACC=launch.acc(m.x),
        num_warps=block.num_warps,
        **block.of_partials(),
    )
    return dattention, sums
