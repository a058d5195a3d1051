"""Phase 1, pool: the first read of x. Forward: prologue, radix sum, global average; backward: the
sums over pixels of dout and x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.backends.triton.map import aligned, inside, load_tile, locate
from resnest_fused.backends.triton.problem import Map
from resnest_fused.backends.triton.prologue import (
    norm_at,
    norm_of_tile,
    preactivation,
    relu,
    relu_backward,
)

# With a prologue the sums are S1 to S4 of prologue_backward_kernel, in this order.
PROLOGUE_SUMS = 4


@triton.jit
def pool_kernel(
    x,  # (B, R*C, H, W)
    bn0_weight,  # (R*C) or None, as the next three
    bn0_bias,
    bn0_mean,
    bn0_var,
    gap,  # (B, tiles, C)
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


@triton.jit(do_not_specialize=["batch", "tiles"])
def pool_finish_kernel(
    partial,  # (B, tiles, C)
    gap,  # (B, C)
    batch,
    channels,
    tiles,
    BLOCK: tl.constexpr,
):
    """gap[b,c] = sum_t partial[b,t,c].

    Grid: blocks of BLOCK pairs (b, c).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < batch.to(tl.int64) * channels
    b, c = i // channels, i % channels
    total = _over_tiles(partial + b * tiles * channels + c, channels, tiles, inside)
    tl.store(gap + i, total, mask=inside)


def pool(m: Map) -> Tensor:
    """gap (B, C)."""
    gap = m.empty(m.batch, m.channels)

    def run(block: launch.MapBlock) -> Tensor:
        blocks, tiles = block.tiles(m.channels, m.pixels)
        partial = gap if tiles == 1 else m.empty(m.batch, tiles, m.channels)
        launch.run(
            pool_kernel,
            m.batch * tiles * blocks,
            (m.x, *m.bn0[:4], partial, m.channels, m.pixels),
            **launch.map_options(m, block),
        )
        if tiles > 1:
            launch.run(
                pool_finish_kernel,
                triton.cdiv(m.batch * m.channels, launch.FLAT_BLOCK),
                (partial, gap, m.batch, m.channels, tiles),
                BLOCK=launch.FLAT_BLOCK,
            )
        return gap

    return launch.best("pool", m, run)


@triton.jit
def pool_backward_kernel(
    dout,  # (B, C, H, W)
    x,  # (B, R*C, H, W)
    bn0_weight,  # (R*C) or None, as the next three
    bn0_bias,
    bn0_mean,
    bn0_var,
    partial,  # (B, tiles, kinds, R, C)
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
    """partial[b,t,r,c] = sum_{p in tile t} dout x, or with a prologue partial[b,t,s,r,c], the sums
    S1 to S4 of prologue_backward_kernel.

    Grid: tiles of the map. Reads R + 1 units.
    """
    channels, pixels = aligned(channels, pixels, NHWC, ALIGN, SLAB)
    sample, first, tile = locate(tl.program_id(0), channels, pixels, BLOCK_C, BLOCK_P)
    c = first + tl.arange(0, BLOCK_C)
    within = inside(first, tile, channels, pixels, BLOCK_C, BLOCK_P)
    features = RADIX * channels
    row = sample * tl.cdiv(pixels, BLOCK_P) + tile
    g = load_tile(
        dout, sample, 0, first, tile, 1, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
    ).to(ACC)
    for r in tl.static_range(RADIX):
        f = r * channels + c
        value = load_tile(
            x, sample, r, first, tile, RADIX, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
        ).to(ACC)
        if RELU:
            gamma, beta, center, invstd = norm_of_tile(
                bn0_weight, bn0_bias, bn0_mean, bn0_var, f, c < channels, EPS, BLOCK_C, ACC
            )
            n = preactivation(value, gamma, beta, center, invstd)
            # The ReLU's mask zeroes both factors, because 0 times infinity is NaN.
            m = tl.where(within, relu_backward(tl.full(n.shape, 1, ACC), n), 0)
            passed_g = relu_backward(g, n)
            passed_x = tl.where(within, relu_backward(value - center[None, :], n), 0)
            to = partial + row * 4 * features + f
            tl.store(to, tl.sum(passed_g, 0), mask=c < channels)
            tl.store(to + features, tl.sum(m, 0), mask=c < channels)
            of_xhat = tl.sum(passed_g * passed_x, 0) * invstd
            tl.store(to + 2 * features, of_xhat, mask=c < channels)
            tl.store(to + 3 * features, tl.sum(passed_x, 0) * invstd, mask=c < channels)
        else:
            tl.store(partial + row * features + f, tl.sum(g * value, 0), mask=c < channels)


@triton.jit(do_not_specialize=["batch", "tiles"])
def pool_backward_finish_kernel(
    partial,  # (B, tiles, kinds, R, C)
    bn0_weight,  # (R*C) or None
    bn0_bias,  # (R*C) or None
    attention,  # (B, R, C), needed for dlogits
    sums,  # (B, 4, R, C) or None, without a prologue
    dattention,  # (B, R, C)
    dlogits,  # (B, K, R, C/K) or None
    batch,
    channels,
    group_channels,
    tiles,
    RELU: tl.constexpr,
    RADIX: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradients of the attention and, if asked for, of the logits, from the partial sums.

    dattention = sum_p dout z = gamma S3 + beta S1, or without a prologue the sum itself;
    dlogits = a (da - sum_r a da), or with radix 1, for the sigmoid, a (1 - a) da.

    Grid: blocks of BLOCK pairs (b, c).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < batch.to(tl.int64) * channels
    b, c = i // channels, i % channels
    features = RADIX * channels
    sum_a_da = tl.zeros((BLOCK,), ACC)
    for r in tl.static_range(RADIX):
        f = r * channels + c
        da = _dattention(
            partial, bn0_weight, bn0_bias, sums, b, f, inside, features, tiles, RELU, ACC
        )
        tl.store(dattention + b * features + f, da, mask=inside)
        if dlogits is not None:
            sum_a_da += tl.load(attention + b * features + f, mask=inside, other=0) * da
    if dlogits is not None:
        for r in tl.static_range(RADIX):
            f = r * channels + c
            da = _dattention(
                partial, bn0_weight, bn0_bias, None, b, f, inside, features, tiles, RELU, ACC
            )
            a = tl.load(attention + b * features + f, mask=inside, other=0)
            dl = a * (1 - a) * da if RADIX == 1 else a * (da - sum_a_da)
            group = c // group_channels
            row = (group * RADIX + r) * group_channels + c % group_channels
            tl.store(dlogits + b * features + row, dl, mask=inside)


@triton.jit
def _dattention(
    partial,
    bn0_weight,
    bn0_bias,
    sums,
    b,
    f,
    inside,
    features,
    tiles,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
):
    """dattention of samples b, features f. The sums over all pixels go to ``sums``, if given."""
    if RELU:
        from_ = partial + b * tiles * 4 * features + f
        s1 = _over_tiles(from_, 4 * features, tiles, inside)
        s3 = _over_tiles(from_ + 2 * features, 4 * features, tiles, inside)
        if sums is not None:
            to = sums + b * 4 * features + f
            s2 = _over_tiles(from_ + features, 4 * features, tiles, inside)
            s4 = _over_tiles(from_ + 3 * features, 4 * features, tiles, inside)
            tl.store(to, s1, mask=inside)
            tl.store(to + features, s2, mask=inside)
            tl.store(to + 2 * features, s3, mask=inside)
            tl.store(to + 3 * features, s4, mask=inside)
        gamma, beta, _, _ = norm_at(bn0_weight, bn0_bias, None, None, f, inside, 0, ACC)
        return gamma * s3 + beta * s1
    else:
        return _over_tiles(partial + b * tiles * features + f, features, tiles, inside)


@triton.jit
def _over_tiles(partial, step, tiles, inside):
    total = tl.load(partial, mask=inside, other=0)
    for _ in range(1, tiles):
        partial += step
        total += tl.load(partial, mask=inside, other=0)
    return total


def pool_backward(
    m: Map, dout: Tensor, attention: Tensor | None, dlogits: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dattention (B, R, C), and with a prologue the sums (B, 4, R, C); fills dlogits, if given."""
    splits = (m.radix, m.channels)
    kinds = PROLOGUE_SUMS if m.relu else 1
    dattention = m.empty(m.batch, *splits)
    sums = m.empty(m.batch, PROLOGUE_SUMS, *splits) if m.relu else None
    group_channels = m.channels if dlogits is None else dlogits.shape[3]

    def run(block: launch.MapBlock) -> tuple[Tensor, Tensor | None]:
        blocks, tiles = block.tiles(m.channels, m.pixels)
        partial = m.empty(m.batch, tiles, kinds, *splits)
        options = launch.map_options(m, block)
        launch.run(
            pool_backward_kernel,
            m.batch * tiles * blocks,
            (dout, m.x, *m.bn0[:4], partial, m.channels, m.pixels),
            **options,
        )
        launch.run(
            pool_backward_finish_kernel,
            triton.cdiv(m.batch * m.channels, launch.FLAT_BLOCK),
            (partial, *m.bn0[:2], attention, sums, dattention, dlogits),
            batch=m.batch,
            channels=m.channels,
            group_channels=group_channels,
            tiles=tiles,
            RELU=m.relu,
            RADIX=m.radix,
            BLOCK=launch.FLAT_BLOCK,
            ACC=options["ACC"],
        )
        return dattention, sums

    return launch.best("pool_backward", m, run)
