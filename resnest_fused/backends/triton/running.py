"""Running statistics in Triton, of both norms in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import launch
from resnest_fused.ops import RunningArguments


@triton.jit
def _update(
    running,  # (F)
    batch,  # (F)
    features,
    factor,
    momentum,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """running = (1 - momentum) running + momentum factor batch."""
    for first in range(0, features, BLOCK):
        f = first + tl.arange(0, BLOCK)
        inside = f < features
        before = tl.load(running + f, mask=inside, other=0).to(ACC)
        of_batch = tl.load(batch + f, mask=inside, other=0) * factor
        after = (1 - momentum) * before + momentum * of_batch
        tl.store(running + f, after.to(running.dtype.element_ty), mask=inside)


@triton.jit
def _update_norm(
    running_mean,  # (F) or None
    running_var,  # (F) or None
    num_batches_tracked,  # () or None
    mean,  # (F) or None
    var,  # (F) or None
    elements,
    features,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    momentum = tl.full((), 0 if MOMENTUM is None else MOMENTUM, ACC)
    if num_batches_tracked is not None:
        batches = tl.load(num_batches_tracked) + 1
        tl.store(num_batches_tracked, batches)
        if MOMENTUM is None:
            momentum = 1 / batches.to(ACC)
    if running_mean is not None:
        count = elements.to(ACC)
        _update(running_mean, mean, features, tl.full((), 1, ACC), momentum, BLOCK, ACC)
        _update(running_var, var, features, count / (count - 1), momentum, BLOCK, ACC)


# One program, because both norms may be the same one.
@triton.jit(do_not_specialize=["elements0", "features0", "elements1", "features1"])
def update_running_statistics_kernel(
    running_mean0,  # (R*C) or None
    running_var0,  # (R*C) or None
    num_batches_tracked0,  # () or None
    mean0,  # (R*C) or None
    var0,  # (R*C) or None
    running_mean1,  # (I) or None
    running_var1,  # (I) or None
    num_batches_tracked1,  # () or None
    mean1,  # (I) or None
    var1,  # (I) or None
    elements0,
    features0,
    elements1,
    features1,
    MOMENTUM0: tl.constexpr,
    MOMENTUM1: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    _update_norm(
        running_mean0,
        running_var0,
        num_batches_tracked0,
        mean0,
        var0,
        elements0,
        features0,
        MOMENTUM0,
        BLOCK,
        ACC,
    )
    tl.debug_barrier()
    _update_norm(
        running_mean1,
        running_var1,
        num_batches_tracked1,
        mean1,
        var1,
        elements1,
        features1,
        MOMENTUM1,
        BLOCK,
        ACC,
    )


def update_running_statistics(x: Tensor, bn0: RunningArguments, bn1: RunningArguments) -> None:
    batch, _, height, width = x.shape

    def size(statistics: Tensor | None) -> int:
        """How many features are updated: none from an empty batch."""
        return 0 if statistics is None or batch == 0 else statistics.shape[0]

    launch.run(
        update_running_statistics_kernel,
        1,
        (*bn0[:5], *bn1[:5], batch * height * width, size(bn0.mean), batch, size(bn1.mean)),
        MOMENTUM0=bn0.momentum,
        MOMENTUM1=bn1.momentum,
        ACC=launch.acc(x),
        BLOCK=launch.RUNNING_BLOCK,
        num_warps=4,
    )
