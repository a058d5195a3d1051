"""Phase 3, recombine: the second read of x. Forward: the weighted sum over radix; backward: dx."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.backends.triton.map import aligned, load_tile, locate, spread, store_tile
from resnest_fused.backends.triton.problem import Map
from resnest_fused.backends.triton.prologue import norm_of_tile, preactivation, relu, relu_backward
from resnest_fused.ops import empty_map


@triton.jit
def recombine_kernel(
    x,  # (B, R*C, H, W)
    bn0_weight,  # (R*C) or None, as the next three
    bn0_bias,
    bn0_mean,
    bn0_var,
    attention,  # (B, R, C)
    out,  # (B, C, H, W)
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
    """out[b,c,p] = sum_r attention[b,r,c] z[b,r,c,p].

    Grid: tiles of the map in reverse, because the last tiles that the pool read may still be in L2.
    Reads R units, writes 1.
    """
    channels, pixels = aligned(channels, pixels, NHWC, ALIGN, SLAB)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, first, tile = locate(program, channels, pixels, BLOCK_C, BLOCK_P)
    c = first + tl.arange(0, BLOCK_C)
    features = RADIX * channels
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
            z = relu(preactivation(z, gamma, beta, center, invstd))
        a = spread(tl.load(attention + sample * features + f, mask=c < channels, other=0), BLOCK_C)
        total = tl.fma(tl.broadcast_to(a[None, :], total.shape), z, total)
    store_tile(
        out, total, sample, 0, first, tile, 1, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
    )


def recombine(m: Map, attention: Tensor) -> Tensor:
    """out (B, C, H, W)."""
    out = empty_map(m.x, m.channels)

    def run(block: launch.MapBlock) -> Tensor:
        blocks, tiles = block.tiles(m.channels, m.pixels)
        launch.run(
            recombine_kernel,
            m.batch * tiles * blocks,
            (m.x, *m.bn0[:4], attention, out, m.channels, m.pixels),
            **launch.map_options(m, block),
        )
        return out

    return launch.best("recombine", m, run)


@triton.jit
def recombine_backward_kernel(
    dout,  # (B, C, H, W)
    x,  # (B, R*C, H, W)
    bn0_weight,  # (R*C) or None, as the next three
    bn0_bias,
    bn0_mean,
    bn0_var,
    attention,  # (B, R, C)
    dgap,  # (B, C)
    mean_dz,  # (R*C) or None
    mean_dz_xhat,  # (R*C) or None
    dx,  # (B, R*C, H, W)
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
    """dz_r = attention_r dout + dgap / HW, and
      dx = dz                                                      plain form
      dx = gamma invstd (m dz - mean_dz - xhat mean_dz_xhat)       m = [bn0(x) > 0]; the means only
                                                                   with batch statistics
    Grid: as in the forward. Reads 1 unit, with a prologue R more, and writes R.
    """
    channels, pixels = aligned(channels, pixels, NHWC, ALIGN, SLAB)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, first, tile = locate(program, channels, pixels, BLOCK_C, BLOCK_P)
    c = first + tl.arange(0, BLOCK_C)
    features = RADIX * channels
    g = load_tile(
        dout, sample, 0, first, tile, 1, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
    ).to(ACC)
    of_gap = tl.load(dgap + sample * channels + c, mask=c < channels, other=0)
    per_pixel = spread(of_gap / pixels, BLOCK_C)
    for r in tl.static_range(RADIX):
        f = r * channels + c
        a = spread(tl.load(attention + sample * features + f, mask=c < channels, other=0), BLOCK_C)
        if RELU:
            value = load_tile(
                x, sample, r, first, tile, RADIX, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
            ).to(ACC)
            gamma, beta, center, invstd = norm_of_tile(
                bn0_weight, bn0_bias, bn0_mean, bn0_var, f, c < channels, EPS, BLOCK_C, ACC
            )
            n = preactivation(value, gamma, beta, center, invstd)
            scale = gamma * invstd
            grad = relu_backward((a * scale)[None, :] * g + (per_pixel * scale)[None, :], n)
            if mean_dz is not None:
                of_dz = tl.load(mean_dz + f, mask=c < channels, other=0)
                of_xhat = tl.load(mean_dz_xhat + f, mask=c < channels, other=0)
                offset = scale * spread(of_dz, BLOCK_C)
                slope = scale * invstd * spread(of_xhat, BLOCK_C)
                grad -= offset[None, :] + (value - center[None, :]) * slope[None, :]
        else:
            grad = a[None, :] * g + per_pixel[None, :]
        store_tile(
            dx, grad, sample, r, first, tile, RADIX, channels, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
        )


def recombine_backward(
    m: Map,
    dout: Tensor,
    attention: Tensor,
    dgap: Tensor,
    means: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """dx (B, R*C, H, W); ``means`` are those of dz and of dz * xhat, with batch statistics."""
    dx = empty_map(m.x, m.features)

    def run(block: launch.MapBlock) -> Tensor:
        blocks, tiles = block.tiles(m.channels, m.pixels)
        launch.run(
            recombine_backward_kernel,
            m.batch * tiles * blocks,
            (dout, m.x, *m.bn0[:4], attention, dgap, *(means or (None, None)), dx),
            channels=m.channels,
            pixels=m.pixels,
            **launch.map_options(m, block),
        )
        return dx

    return launch.best("recombine_backward", m, run)
