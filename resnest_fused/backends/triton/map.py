"""How the programs of a kernel walk over a feature map: each takes one tile of one sample.

A tile is BLOCK_C channels by BLOCK_P pixels of ``out`` and so of every split of x. Programs are
numbered by sample, then by tile of pixels, then by block of channels. Kernels count the memory that
they read and write in units: one unit is as many bytes as ``out`` has.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(program, channels, pixels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """A program's sample, tile of pixels, channels and pixels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(pixels, BLOCK_P)
    tile = (program // blocks) % tiles
    sample = (program // (blocks * tiles)).to(tl.int64)
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    return sample, tile, c, p


@triton.jit
def aligned(channels, pixels, NHWC: tl.constexpr, ALIGN: tl.constexpr):
    """The same sizes; the compiler now knows that ALIGN divides the one contiguous in memory.

    By itself Triton detects multiples of 16 only. For all others it would load single elements.
    """
    if ALIGN > 1:
        if NHWC:
            channels = channels // ALIGN * ALIGN
        else:
            pixels = pixels // ALIGN * ALIGN
    return channels, pixels


@triton.jit
def at(sample, f, p, features, pixels, NHWC: tl.constexpr):
    """The offset of feature f, pixel p of a sample in a map with this many features."""
    first = sample * features * pixels
    f = f.to(tl.int64)[:, None]
    p = p.to(tl.int64)[None, :]
    if NHWC:
        return first + p * features + f
    else:
        return first + f * pixels + p
