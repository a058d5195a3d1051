"""Phase 3, recombine: the second read of x. Forward: the weighted sum over radix; backward: dx."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.backends.triton.map import aligned, at, locate
from resnest_fused.backends.triton.problem import Map
from resnest_fused.backends.triton.prologue import norm_at, preactivation, relu, relu_backward
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
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[b,c,p] = sum_r attention[b,r,c] z[b,r,c,p].

    Grid: tiles of the map in reverse, because the last tiles that the pool read may still be in L2.
    Reads R units, writes 1.
    """
    channels, pixels = aligned(channels, pixels, NHWC, ALIGN)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, _, c, p = locate(program, channels, pixels, BLOCK_C, BLOCK_P)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    features = RADIX * channels
    total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
    for r in tl.static_range(RADIX):
        f = r * channels + c
        z = tl.load(x + at(sample, f, p, features, pixels, NHWC), mask=inside, other=0).to(ACC)
        if RELU:
            gamma, beta, center, invstd = norm_at(
                bn0_weight, bn0_bias, bn0_mean, bn0_var, f, c < channels, EPS, ACC
            )
            z = relu(preactivation(z, gamma, beta, center, invstd))
        a = tl.load(attention + sample * features + f, mask=c < channels, other=0)
        total = tl.fma(tl.broadcast_to(a[:, None], total.shape), z, total)
    tl.store(
        out + at(sample, c, p, channels, pixels, NHWC),
        total.to(out.dtype.element_ty),
        mask=inside,
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
    channels, pixels = aligned(channels, pixels, NHWC, ALIGN)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, _, c, p = locate(program, channels, pixels, BLOCK_C, BLOCK_P)
    inside = (c < channels)[:, None] & (p < pixels)[None, :]
    features = RADIX * channels
    g = tl.load(dout + at(sample, c, p, channels, pixels, NHWC), mask=inside, other=0).to(ACC)
    per_pixel = tl.load(dgap + sample * channels + c, mask=c < channels, other=0) / pixels
    for r in tl.static_range(RADIX):
        f = r * channels + c
        to = at(sample, f, p, features, pixels, NHWC)
        a = tl.load(attention + sample * features + f, mask=c < channels, other=0)
        if RELU:
            value = tl.load(x + to, mask=inside, other=0).to(ACC)
            gamma, beta, center, invstd = norm_at(
                bn0_weight, bn0_bias, bn0_mean, bn0_var, f, c < channels, EPS, ACC
            )
            n = preactivation(value, gamma, beta, center, invstd)
            scale = gamma * invstd
            grad = relu_backward((a * scale)[:, None] * g + (per_pixel * scale)[:, None], n)
            if mean_dz is not None:
                offset = scale * tl.load(mean_dz + f, mask=c < channels, other=0)
                of_xhat = tl.load(mean_dz_xhat + f, mask=c < channels, other=0)
                slope = scale * invstd * of_xhat
                grad -= offset[:, None] + (value - center[:, None]) * slope[:, None]
        else:
            grad = a[:, None] * g + per_pixel[:, None]
        tl.store(dx + to, grad.to(dx.dtype.element_ty), mask=inside)


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
