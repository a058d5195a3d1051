"""How the programs of a kernel walk over a feature map: each takes one tile of one sample.

A tile is BLOCK_C channels by BLOCK_P pixels of ``out`` and so of every split of x. Programs are
numbered by sample, then by tile of pixels, then by block of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(program, channels, pixels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of a program its sample, its tile of pixels, its channels and its pixels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(pixels, BLOCK_P)
    tile = (program // blocks) % tiles
    sample = (program // (blocks * tiles)).to(tl.int64)
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    return sample, tile, c, p


@triton.jit
def aligned(channels, pixels, NHWC: tl.constexpr, ALIGN: tl.constexpr):
    """The sizes, of which the one that is contiguous in memory is a multiple of ALIGN.

    Triton sees that by itself for 16 only, and without it loads element by element.
    """
    if ALIGN > 1:
        if NHWC:
            channels = channels // ALIGN * ALIGN
        else:
            pixels = pixels // ALIGN * ALIGN
    return channels, pixels


@triton.jit
def at(sample, f, p, features, pixels, NHWC: tl.constexpr):
    """Where feature f, pixel p of a sample lies in a map of so many features."""
    first = sample * features * pixels
    f = f.to(tl.int64)[:, None]
    p = p.to(tl.int64)[None, :]
    if NHWC:
        return first + p * features + f
    else:
        return first + f * pixels + p
