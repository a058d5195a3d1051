"""The prologue, z = relu(bn0(x)) or relu(x): bn0 itself, its batch statistics and its gradients.

Every kernel that loads x computes z on the fly. All take bn0(x) from one function here. Otherwise
forward and backward could disagree on the elements that the ReLU passes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.backends.triton.map import aligned, inside, load_tile, locate, spread
from resnest_fused.backends.triton.problem import Map


@triton.jit
def norm_at(weight, bias, mean, var, f, inside, EPS: tl.constexpr, ACC: tl.constexpr):
    """A batch norm's gamma, beta, mean and 1 / standard deviation at features f.

    Absent ones have the values of the identity.
    """
    center = tl.zeros(f.shape, ACC)
    invstd = tl.full(f.shape, 1, ACC)
    if mean is not None:
        center = tl.load(mean + f, mask=inside, other=0).to(ACC)
        invstd = inverse_std(tl.load(var + f, mask=inside, other=1).to(ACC), EPS)
    gamma = tl.full(f.shape, 1, ACC)
    if weight is not None:
        gamma = tl.load(weight + f, mask=inside, other=0).to(ACC)
    beta = tl.zeros(f.shape, ACC)
    if bias is not None:
        beta = tl.load(bias + f, mask=inside, other=0).to(ACC)
    return gamma, beta, center, invstd


@triton.jit
def norm_of_tile(
    weight, bias, mean, var, f, inside, EPS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr
):
    """`norm_at` for the channels of a tile."""
    gamma, beta, center, invstd = norm_at(weight, bias, mean, var, f, inside, EPS, ACC)
    if mean is not None:
        center, invstd = spread(center, BLOCK_C), spread(invstd, BLOCK_C)
    if weight is not None:
        gamma = spread(gamma, BLOCK_C)
    if bias is not None:
        beta = spread(beta, BLOCK_C)
    return gamma, beta, center, invstd


@triton.jit
def inverse_std(var, EPS: tl.constexpr):
    """1 / sqrt(var + eps), in which every operation rounds to nearest."""
    one = tl.full(var.shape, 1, var.dtype)
    if var.dtype == tl.float64:
        return one / tl.sqrt(var + EPS)
    else:
        return tl.div_rn(one, tl.sqrt_rn(var + EPS))


@triton.jit
def relu(x):
    """NaN passes."""
    return tl.where(x <= 0, 0, x)


@triton.jit
def relu_backward(dy, n):
    """The gradient of the ReLU at pre-activation n."""
    return tl.where(n <= 0, 0, dy)


@triton.jit
def batch_norm(x, gamma, beta, center, invstd):
    """gamma * (x - mean) / std + beta; no digit is lost, because the mean is subtracted first."""
    none = tl.zeros_like(x)
    return tl.fma(x - center, gamma * invstd + none, beta + none)


@triton.jit
def preactivation(x, gamma, beta, center, invstd):
    """bn0 of a tile of x (pixels, channels); gamma to invstd have one value per channel."""
    return batch_norm(x, gamma[None, :], beta[None, :], center[None, :], invstd[None, :])


# --- statistics


@triton.jit(do_not_specialize=["batch", "chunk_samples"])
def statistics_kernel(
    x,  # (B, F, H, W)
    partial_mean,  # (chunks, tiles, F)
    partial_squares,  # (chunks, tiles, F)
    batch,
    features,
    pixels,
    chunk_samples,
    NHWC: tl.constexpr,
    ALIGN: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Mean and sum of squared deviations by feature, of one tile's pixels in a chunk of samples.

    Each sample's are computed in registers. The rule of Chan, Golub and LeVeque (1979) joins them
    to those before. All are taken of distances from the first element, so that no sum cancels.
    Reads R units.
    """
    features, pixels = aligned(features, pixels, NHWC, ALIGN, SLAB)
    chunk, first, tile = locate(tl.program_id(0), features, pixels, BLOCK_C, BLOCK_P)
    f = first + tl.arange(0, BLOCK_C)
    within = inside(first, tile, features, pixels, BLOCK_C, BLOCK_P)
    start = chunk * chunk_samples
    stop = tl.minimum(start + chunk_samples, batch)
    here = tl.minimum(pixels - tile * BLOCK_P, BLOCK_P).to(ACC)  # pixels of each sample

    corner = load_tile(x, start, 0, first, tile * BLOCK_P, 1, features, pixels, NHWC, 0, BLOCK_C, 1)
    origin = tl.sum(corner.to(ACC), 0)
    mean = tl.zeros((BLOCK_C,), ACC)
    squares = tl.zeros((BLOCK_C,), ACC)
    # Two samples are on their way while one is added up.
    for sample in tl.range(start, stop, num_stages=3):
        values = load_tile(
            x, sample, 0, first, tile, 1, features, pixels, NHWC, SLAB, BLOCK_C, BLOCK_P
        )
        apart = tl.where(within, values.to(ACC) - origin[None, :], 0)
        own_mean = tl.sum(apart, 0) / here
        apart = tl.where(within, apart - own_mean[None, :], 0)
        own_squares = tl.sum(apart * apart, 0)
        before = (sample - start).to(ACC)  # the number of samples before this one
        share = 1 / (before + 1)
        delta = own_mean - mean
        mean += delta * share
        squares += own_squares + delta * delta * (before * share * here)
    to = (chunk * tl.cdiv(pixels, BLOCK_P) + tile) * features + f
    tl.store(partial_mean + to, origin + mean, mask=f < features)
    tl.store(partial_squares + to, squares, mask=f < features)


@triton.jit(do_not_specialize=["batch", "pixels", "chunk_samples", "rows", "tiles", "tile_pixels"])
def combine_kernel(
    partial_mean,  # (chunks, tiles, F)
    partial_squares,  # (chunks, tiles, F)
    mean,  # (F)
    var,  # (F)
    batch,
    features,
    pixels,
    chunk_samples,
    rows,
    tiles,
    tile_pixels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """The whole batch's mean and biased variance from those of its parts."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    origin = tl.load(partial_mean + f, mask=f < features * tl.minimum(rows, 1), other=0)
    count = tl.zeros((BLOCK_ROWS,), ACC)
    total = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        elements = _elements(row, batch, pixels, chunk_samples, rows, tiles, tile_pixels, ACC)
        inside = (row < rows)[:, None] & (f < features)[None, :]
        from_ = row.to(tl.int64)[:, None] * features + f[None, :]
        apart = tl.load(partial_mean + from_, mask=inside, other=0) - origin[None, :]
        count += elements
        total += tl.where(inside, elements[:, None] * apart, 0)
    # An empty batch gives zeros, which change nothing in a sum over processes.
    whole = tl.maximum(tl.sum(count, 0), 1)
    center = tl.sum(total, 0) / whole
    total = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        elements = _elements(row, batch, pixels, chunk_samples, rows, tiles, tile_pixels, ACC)
        inside = (row < rows)[:, None] & (f < features)[None, :]
        from_ = row.to(tl.int64)[:, None] * features + f[None, :]
        apart = tl.load(partial_mean + from_, mask=inside, other=0) - (origin + center)[None, :]
        squares = tl.load(partial_squares + from_, mask=inside, other=0)
        total += tl.where(inside, elements[:, None] * apart * apart + squares, 0)
    tl.store(mean + f, origin + center, mask=f < features)
    tl.store(var + f, tl.sum(total, 0) / whole, mask=f < features)


@triton.jit
def _elements(row, batch, pixels, chunk_samples, rows, tiles, tile_pixels, ACC: tl.constexpr):
    """How many elements of a feature belong to these rows of partial statistics."""
    samples = tl.minimum(batch - (row // tiles) * chunk_samples, chunk_samples)
    of_tile = tl.minimum(pixels - (row % tiles) * tile_pixels, tile_pixels)
    return tl.where(row < rows, samples.to(ACC) * of_tile.to(ACC), 0)


def batch_statistics(m: Map) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x by feature."""
    m = m._replace(radix=1)
    mean, var = m.empty(m.features), m.empty(m.features)

    def run(block: launch.MapBlock) -> tuple[Tensor, Tensor]:
        blocks, tiles = block.tiles(m.features, m.pixels)
        chunk = launch.samples_per_program(m.batch, blocks * tiles)
        rows = launch.parts(m.batch, chunk) * tiles
        partial_mean, partial_squares = m.empty(rows, m.features), m.empty(rows, m.features)
        acc = launch.acc(m.x)
        launch.run(
            statistics_kernel,
            rows * blocks,
            (m.x, partial_mean, partial_squares, m.batch, m.features, m.pixels, chunk),
            NHWC=m.nhwc,
            ALIGN=launch.alignment(m),
            SLAB=launch.slab(m),
            ACC=acc,
            **block.options(),
        )
        columns = launch.COLUMNS
        launch.run(
            combine_kernel,
            columns.blocks(m.features),
            (partial_mean, partial_squares, mean, var),
            batch=m.batch,
            features=m.features,
            pixels=m.pixels,
            chunk_samples=chunk,
            rows=rows,
            tiles=tiles,
            tile_pixels=block.pixels,
            ACC=acc,
            **columns.options(),
        )
        return mean, var

    return launch.best("statistics", m, run)


# --- gradients


@triton.jit
def finish_prologue_backward(
    item,
    sums,  # (B, 4, R, C)
    attention,  # (B, R, C)
    dgap,  # (B, C)
    dweight,  # (R*C) or None
    dbias,  # (R*C) or None
    mean_dz,  # (R*C) or None
    mean_dz_xhat,  # (R*C) or None
    batch,
    channels,
    pixels,
    RADIX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """dgamma and dbeta of bn0, and their means over batch and pixels.

    With m = [bn0(x) > 0] and S1 to S4 the sums over pixels of m dout, m, m dout xhat and m xhat:
    dbeta = sum_b (a S1 + dgap/HW S2), dgamma = sum_b (a S3 + dgap/HW S4).

    Items: blocks of features.
    """
    features = RADIX * channels
    f = item * BLOCK_F + tl.arange(0, BLOCK_F)
    of_weight = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    of_bias = tl.zeros((BLOCK_ROWS, BLOCK_F), ACC)
    for first in range(0, batch, BLOCK_ROWS):
        b = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        inside = (b < batch) & (f < features)[None, :]
        s = sums + b * 4 * features + f[None, :]
        s2 = tl.load(s + features, mask=inside, other=0)
        # If the ReLU passes nothing, not even a NaN in attention or dgap may count.
        passed = inside & (s2 != 0)
        s1 = tl.load(s, mask=passed, other=0)
        s3 = tl.load(s + 2 * features, mask=passed, other=0)
        s4 = tl.load(s + 3 * features, mask=passed, other=0)
        a = tl.load(attention + b * features + f[None, :], mask=passed, other=0)
        d = tl.load(dgap + b * channels + (f % channels)[None, :], mask=passed, other=0) / pixels
        of_weight += a * s3 + d * s4
        of_bias += a * s1 + tl.where(passed, d * s2, 0)
    weight_sum = tl.sum(of_weight, 0)
    bias_sum = tl.sum(of_bias, 0)
    elements = tl.maximum(batch.to(ACC) * pixels.to(ACC), 1)
    if dweight is not None:
        tl.store(dweight + f, weight_sum, mask=f < features)
    if dbias is not None:
        tl.store(dbias + f, bias_sum, mask=f < features)
    if mean_dz is not None:
        tl.store(mean_dz + f, bias_sum / elements, mask=f < features)
        tl.store(mean_dz_xhat + f, weight_sum / elements, mask=f < features)


@triton.jit(do_not_specialize=["batch", "pixels"])
def prologue_backward_kernel(
    sums,
    attention,
    dgap,
    dweight,
    dbias,
    batch,
    channels,
    pixels,
    RADIX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACC: tl.constexpr,
):
    """`finish_prologue_backward` alone, without the means. Grid: its items."""
    finish_prologue_backward(
        tl.program_id(0),
        sums,
        attention,
        dgap,
        dweight,
        dbias,
        None,
        None,
        batch,
        channels,
        pixels,
        RADIX,
        BLOCK_ROWS,
        BLOCK_F,
        ACC,
    )


def prologue_backward(
    sums: Tensor, attention: Tensor, dgap: Tensor, pixels: int
) -> tuple[Tensor, Tensor]:
    """bn0's gradients (R*C)."""
    batch, radix, channels = attention.shape
    dweight, dbias = sums.new_empty(radix * channels), sums.new_empty(radix * channels)
    columns = launch.COLUMNS
    launch.run(
        prologue_backward_kernel,
        columns.blocks(radix * channels),
        (sums, attention, dgap, dweight, dbias, batch, channels, pixels),
        RADIX=radix,
        ACC=launch.acc(attention),
        **columns.options(),
    )
    return dweight, dbias
