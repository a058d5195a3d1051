"""The ops of the table by Triton's kernels.

Each public function is an op; its body is the sequence of phases.
"""

from __future__ import annotations

from torch import Tensor

from resnest_fused import ops
from resnest_fused.backends.triton import attention as attention_phase
from resnest_fused.backends.triton import attention_backward as attention_backward_phase
from resnest_fused.backends.triton import pool as pool_phase
from resnest_fused.backends.triton import prologue as prologue_phase
from resnest_fused.backends.triton import recombine as recombine_phase
from resnest_fused.backends.triton import running
from resnest_fused.backends.triton.problem import (
    check,
    check_no_batch_stats,
    make_map,
    make_phase_map,
    take_dout,
    take_mlp,
    take_running,
    take_sums,
)
from resnest_fused.ops import (
    NO_NORM,
    FcArguments,
    GradientResults,
    MapArguments,
    NormArguments,
    PoolBackwardResults,
    PrologueBackwardResults,
    RunningArguments,
    SavedArguments,
    StatisticsResults,
    TrainResults,
)


def split_attention(
    map: MapArguments, bn0: NormArguments, fcs: FcArguments, bn1: NormArguments
) -> Tensor:
    check_no_batch_stats("bn1", bn1)
    m = make_phase_map(map, bn0)
    mlp = take_mlp(m, fcs, bn1)
    pooled = pool_phase.start_pool(m)
    attention = attention_phase.attention(m, pooled, mlp, hidden=None, statistics=None)
    return recombine_phase.recombine(m, attention)


def split_attention_train(
    map: MapArguments, bn0: NormArguments, fcs: FcArguments, bn1: NormArguments
) -> TrainResults:
    m = make_map(map, bn0)
    mlp = take_mlp(m, fcs, bn1)
    statistics0 = m.empty(0), m.empty(0)
    if bn0.batch_stats:
        statistics0 = prologue_phase.batch_statistics(m)
        m = m.with_statistics(*statistics0)
    inter = fcs.inter if bn1.batch_stats else 0
    statistics1 = m.empty(inter), m.empty(inter)
    pooled, hidden = pool_phase.start_pool(m), m.empty(m.batch, fcs.inter)
    attention = attention_phase.attention(
        m, pooled, mlp, hidden, statistics1 if bn1.batch_stats else None
    )
    out = recombine_phase.recombine(m, attention)
    return TrainResults(out, pooled.gap, hidden, attention, *statistics0, *statistics1)


def split_attention_backward(
    dout: Tensor,
    map: MapArguments,
    bn0: NormArguments,
    fcs: FcArguments,
    bn1: NormArguments,
    saved: SavedArguments,
    needed: list[bool],
) -> GradientResults:
    m = make_map(map, bn0)
    mlp = take_mlp(m, fcs, bn1)
    dout = take_dout(m, dout)
    gap = take_sums("gap", saved.gap, (m.batch, m.channels), m.x)
    hidden = take_sums("hidden", saved.hidden, (m.batch, fcs.inter), m.x)
    attention = take_sums("attention", saved.attention, (m.batch, m.radix, m.channels), m.x)
    check(len(needed) == 9, f"needed: expected 9 flags, got {len(needed)}")
    check(
        m.relu or not (needed[1] or needed[2]),
        "needed: bn0 has gradients only where a ReLU follows",
    )
    # The fake kernel makes empty tensors of the right shapes, here for all but dx.
    grads = ops.split_attention_backward(dout, map, bn0, fcs, bn1, saved, [False, *needed[1:]])
    wanted = GradientResults._make(grad if grad.numel() > 0 else None for grad in grads)
    means = None
    if needed[0] and bn0.batch_stats:
        means = m.empty(m.features), m.empty(m.features)
    dgap = attention_backward_phase.attention_backward(
        m,
        pool_phase.start_pool_backward(m, dout),
        mlp,
        gap,
        hidden,
        attention,
        attention_backward_phase.Gradients(
            wanted.dfc1_weight,
            wanted.dfc1_bias,
            wanted.dfc2_weight,
            wanted.dfc2_bias,
            wanted.dbn1_weight,
            wanted.dbn1_bias,
            wanted.dbn0_weight,
            wanted.dbn0_bias,
            means,
        ),
    )
    if needed[0]:
        dx = recombine_phase.recombine_backward(m, dout, attention, dgap, means)
        grads = grads._replace(dx=dx)
    return grads


def batch_statistics(x: Tensor) -> StatisticsResults:
    m = make_map(MapArguments(x=x, relu=False, radix=1), NO_NORM)
    return StatisticsResults(*prologue_phase.batch_statistics(m))


def pool(map: MapArguments, bn0: NormArguments) -> Tensor:
    return pool_phase.pool(make_phase_map(map, bn0))


def recombine(map: MapArguments, bn0: NormArguments, attention: Tensor) -> Tensor:
    m = make_phase_map(map, bn0)
    attention = take_sums("attention", attention, (m.batch, m.radix, m.channels), m.x)
    return recombine_phase.recombine(m, attention)


def pool_backward(dout: Tensor, map: MapArguments, bn0: NormArguments) -> PoolBackwardResults:
    m = make_phase_map(map, bn0)
    dattention, sums = pool_phase.pool_backward(m, take_dout(m, dout))
    return PoolBackwardResults(dattention, m.empty(0) if sums is None else sums)


def prologue_backward(
    sums: Tensor, attention: Tensor, dgap: Tensor, pixels: int
) -> PrologueBackwardResults:
    check(
        sums.dim() == 4 and sums.shape[1] == pool_phase.PROLOGUE_SUMS,
        "sums: expected the shape (B, 4, R, C)",
    )
    check(pixels > 0, f"pixels: expected at least 1, got {pixels}")
    batch, _, radix, channels = sums.shape
    sums = take_sums("sums", sums, tuple(sums.shape), sums)
    attention = take_sums("attention", attention, (batch, radix, channels), sums)
    dgap = take_sums("dgap", dgap, (batch, channels), sums)
    return PrologueBackwardResults(*prologue_phase.prologue_backward(sums, attention, dgap, pixels))


def recombine_backward(
    dout: Tensor,
    map: MapArguments,
    bn0: NormArguments,
    attention: Tensor,
    dgap: Tensor,
    mean_dz: Tensor | None,
    mean_dz_xhat: Tensor | None,
) -> Tensor:
    m = make_phase_map(map, bn0)
    attention = take_sums("attention", attention, (m.batch, m.radix, m.channels), m.x)
    dout = take_dout(m, dout)
    dgap = take_sums("dgap", dgap, (m.batch, m.channels), m.x)
    check(
        (mean_dz is None) == (mean_dz_xhat is None) and (mean_dz is None or bn0.mean is not None),
        "mean_dz, mean_dz_xhat: expected both or neither, and neither without bn0",
    )
    means = None
    if mean_dz is not None and mean_dz_xhat is not None:
        means = (
            take_sums("mean_dz", mean_dz, (m.features,), m.x),
            take_sums("mean_dz_xhat", mean_dz_xhat, (m.features,), m.x),
        )
    return recombine_phase.recombine_backward(m, dout, attention, dgap, means)


def update_running_statistics(x: Tensor, bn0: RunningArguments, bn1: RunningArguments) -> None:
    batch, _, height, width = x.shape
    bn0 = take_running("bn0", bn0, batch * height * width, x)
    bn1 = take_running("bn1", bn1, batch, x)
    running.update_running_statistics(x, bn0, bn1)
