"""How the programs of a kernel walk over a feature map: each takes one tile of one sample.

A tile is BLOCK_P pixels by BLOCK_C channels of ``out`` and so of every split of x. Programs are
numbered by sample, then by tile of pixels, then by block of channels. Kernels count the memory that
they read and write in units: one unit is as many bytes as ``out`` has.

In NCHW the rows of a small map, such as 7x7 in 16 bits, are no multiples of 16 bytes. A thread
could load only single elements of one row. But the rows of neighbouring channels lie one after the
other. So there a tile is a slab: whole rows of all its channels, loaded and stored as one flat
piece of memory in vectors of 16 bytes. Shared memory is the way between the flat piece and the tile
(`tl.gather`). SLAB is the length of a row then, and 0 for other maps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(program, channels, pixels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """A program's sample, first channel and tile of pixels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    tiles = tl.cdiv(pixels, BLOCK_P)
    tile = (program // blocks) % tiles
    sample = (program // (blocks * tiles)).to(tl.int64)
    return sample, (program % blocks) * BLOCK_C, tile


@triton.jit
def aligned(channels, pixels, NHWC: tl.constexpr, ALIGN: tl.constexpr, SLAB: tl.constexpr):
    """The same sizes; the compiler now knows that ALIGN divides the one that decides.

    By itself Triton detects multiples of 16 only. For all others it would load single elements.
    """
    if SLAB > 0:
        pixels = SLAB
    if ALIGN > 1:
        if NHWC or SLAB > 0:
            channels = channels // ALIGN * ALIGN
        else:
            pixels = pixels // ALIGN * ALIGN
    return channels, pixels


@triton.jit
def inside(first, tile, channels, pixels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Which elements of a tile the map has."""
    c = first + tl.arange(0, BLOCK_C)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    return (p < pixels)[:, None] & (c < channels)[None, :]


@triton.jit
def load_tile(
    x,
    sample,
    split,
    first,
    tile,
    splits: tl.constexpr,
    channels,
    pixels,
    NHWC: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A tile of one of the splits of a map, (BLOCK_P, BLOCK_C), with zeros outside."""
    within = inside(first, tile, channels, pixels, BLOCK_C, BLOCK_P)
    if SLAB > 0:
        from_, i, there = _slab(sample, split, first, splits, channels, SLAB, BLOCK_C, BLOCK_P)
        flat = tl.load(x + from_ + i, mask=there, other=0)
        of_row = tl.minimum(i // BLOCK_C, SLAB - 1)
        values = tl.gather(flat, i % BLOCK_C * SLAB + of_row, 0)
        return tl.where(within, tl.reshape(values, (BLOCK_P, BLOCK_C)), 0)
    else:
        from_ = _at(sample, split, first, tile, splits, channels, pixels, NHWC, BLOCK_C, BLOCK_P)
        return tl.load(x + from_, mask=within, other=0)


@triton.jit
def store_tile(
    out,
    values,
    sample,
    split,
    first,
    tile,
    splits: tl.constexpr,
    channels,
    pixels,
    NHWC: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Store a tile (BLOCK_P, BLOCK_C) where `load_tile` loads it."""
    values = values.to(out.dtype.element_ty)
    if SLAB > 0:
        to, i, there = _slab(sample, split, first, splits, channels, SLAB, BLOCK_C, BLOCK_P)
        # Those behind the last row are not stored, but must be in the tile.
        row = tl.minimum(i // SLAB, BLOCK_C - 1)
        values = tl.reshape(values, (BLOCK_P * BLOCK_C,))
        flat = tl.gather(values, i % SLAB * BLOCK_C + row, 0)
        tl.store(out + to + i, flat, mask=there)
    else:
        to = _at(sample, split, first, tile, splits, channels, pixels, NHWC, BLOCK_C, BLOCK_P)
        within = inside(first, tile, channels, pixels, BLOCK_C, BLOCK_P)
        tl.store(out + to, values, mask=within)


@triton.jit
def spread(values, BLOCK_C: tl.constexpr):
    """The same values, one for each channel of a tile, for every thread that needs them.

    A thread may hold elements of many channels. It computes or loads one or two channels' values,
    and gets the others' from the threads that did: so the compiler lays out the source of a gather.
    """
    return tl.gather(values, tl.arange(0, BLOCK_C), 0)


@triton.jit
def _slab(
    sample,
    split,
    first,
    splits: tl.constexpr,
    channels,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A slab's offset, its elements' numbers, and which of them it has."""
    i = tl.arange(0, BLOCK_C * BLOCK_P)
    there = (i < BLOCK_C * SLAB) & (i < (channels - first) * SLAB)
    return (sample * splits * channels + split * channels + first) * SLAB, i, there


@triton.jit
def _at(
    sample,
    split,
    first,
    tile,
    splits: tl.constexpr,
    channels,
    pixels,
    NHWC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The offsets of a tile's elements."""
    features = splits * channels
    from_ = sample * features * pixels
    f = (split * channels + first + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    p = (tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)[:, None]
    if NHWC:
        return from_ + p * features + f
    else:
        return from_ + f * pixels + p
