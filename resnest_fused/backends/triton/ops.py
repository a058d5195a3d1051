"""The ops of ``csrc/schemas.h`` once more, by Triton's kernels, in a namespace of their own.

Each public function is an op: its signature is the schema, its body the sequence of phases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnest_fused.backends import fakes, flops
from resnest_fused.backends.registration import latest
from resnest_fused.backends.triton import attention as attention_phase
from resnest_fused.backends.triton import pool as pool_phase
from resnest_fused.backends.triton import prologue as prologue_phase
from resnest_fused.backends.triton import recombine as recombine_phase
from resnest_fused.backends.triton.compat import INTERPRETED
from resnest_fused.backends.triton.problem import (
    Fcs,
    Map,
    Norm,
    check,
    make_map,
    take_crumb,
    take_dout,
    take_fcs,
)

NAMESPACE = "resnest_fused_triton"


def split_attention(
    x: Tensor,
    relu: bool,
    bn0_weight: Tensor | None,
    bn0_bias: Tensor | None,
    bn0_mean: Tensor | None,
    bn0_var: Tensor | None,
    bn0_eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    bn1_mean: Tensor | None,
    bn1_var: Tensor | None,
    bn1_eps: float,
    radix: int,
    cardinality: int,
) -> Tensor:
    m = make_map(x, relu, Norm(bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps), radix)
    bn1 = Norm(bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps)
    fcs = take_fcs(m, Fcs(fc1_weight, fc1_bias, bn1, fc2_weight, fc2_bias, cardinality))
    gap = pool_phase.pool(m)
    attention = attention_phase.attention(m, gap, fcs, hidden=None, statistics=None)
    return recombine_phase.recombine(m, attention)


def split_attention_train(
    x: Tensor,
    relu: bool,
    bn0_weight: Tensor | None,
    bn0_bias: Tensor | None,
    bn0_mean: Tensor | None,
    bn0_var: Tensor | None,
    bn0_eps: float,
    bn0_batch_stats: bool,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    bn1_mean: Tensor | None,
    bn1_var: Tensor | None,
    bn1_eps: float,
    bn1_batch_stats: bool,
    radix: int,
    cardinality: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bn0 = Norm(bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, bn0_batch_stats)
    m = make_map(x, relu, bn0, radix)
    bn1 = Norm(bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps, bn1_batch_stats)
    fcs = take_fcs(m, Fcs(fc1_weight, fc1_bias, bn1, fc2_weight, fc2_bias, cardinality))
    statistics0 = m.empty(0), m.empty(0)
    if bn0_batch_stats:
        statistics0 = prologue_phase.batch_statistics(m)
        m = m.with_statistics(*statistics0)
    inter = fcs.inter if bn1_batch_stats else 0
    statistics1 = m.empty(inter), m.empty(inter)
    gap, hidden = pool_phase.pool(m), m.empty(m.batch, fcs.inter)
    attention = attention_phase.attention(
        m, gap, fcs, hidden, statistics1 if bn1_batch_stats else None
    )
    out = recombine_phase.recombine(m, attention)
    return out, gap, hidden, attention, *statistics0, *statistics1


def split_attention_backward(
    dout: Tensor,
    x: Tensor,
    relu: bool,
    bn0_weight: Tensor | None,
    bn0_bias: Tensor | None,
    bn0_mean: Tensor | None,
    bn0_var: Tensor | None,
    bn0_eps: float,
    bn0_batch_stats: bool,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    bn1_mean: Tensor | None,
    bn1_var: Tensor | None,
    bn1_eps: float,
    bn1_batch_stats: bool,
    gap: Tensor,
    hidden: Tensor,
    attention: Tensor,
    radix: int,
    cardinality: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bn0 = Norm(bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps, bn0_batch_stats)
    m = make_map(x, relu, bn0, radix)
    bn1 = Norm(bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_eps, bn1_batch_stats)
    fcs = take_fcs(m, Fcs(fc1_weight, None, bn1, fc2_weight, None, cardinality))
    dout = take_dout(m, dout)
    gap = take_crumb("gap", gap, (m.batch, m.channels), x)
    hidden = take_crumb("hidden", hidden, (m.batch, fcs.inter), x)
    attention = take_crumb("attention", attention, (m.batch, radix, m.channels), x)
    check(len(needed) == 9, f"needed: expected 9 flags, got {len(needed)}")
    check(
        relu or not (needed[1] or needed[2]),
        "needed: bn0 has no gradients where it is not given",
    )

    def gradient(i: int, like: Tensor | None, *shape: int) -> Tensor:
        return (x if like is None else like).new_empty(shape if needed[i] else (0,))

    grads = (
        gradient(1, bn0_weight, m.features),
        gradient(2, bn0_bias, m.features),
        gradient(3, fc1_weight, *fc1_weight.shape),
        gradient(4, fc1_weight, fcs.inter),
        gradient(5, fc2_weight, *fc2_weight.shape),
        gradient(6, fc2_weight, m.features),
        gradient(7, bn1_weight, fcs.inter),
        gradient(8, bn1_bias, fcs.inter),
    )
    dweight0, dbias0, dw1, db1, dw2, db2, dweight1, dbias1 = (
        grad if grad.numel() > 0 else None for grad in grads
    )
    dlogits = m.empty(m.batch, cardinality, radix, m.channels // cardinality)
    dgap = m.empty(m.batch, m.channels)
    _, sums = pool_phase.pool_backward(m, dout, attention, dlogits)
    attention_phase.attention_backward(
        m,
        fcs,
        gap,
        hidden,
        dlogits,
        attention_phase.Gradients(dw1, db1, dw2, db2, dweight1, dbias1, dgap),
    )
    means = None
    if needed[0] and bn0_batch_stats:
        means = m.empty(m.features), m.empty(m.features)
    if sums is not None and (needed[1] or needed[2] or means):
        prologue_phase.prologue_backward(sums, attention, dgap, m.pixels, dweight0, dbias0, means)
    dx = x.new_empty(0)
    if needed[0]:
        dx = recombine_phase.recombine_backward(m, dout, attention, dgap, means)
    return dx, *grads


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return prologue_phase.batch_statistics(make_map(x, False, Norm(), 1))


def pool(
    x: Tensor,
    relu: bool,
    bn0_weight: Tensor | None,
    bn0_bias: Tensor | None,
    bn0_mean: Tensor | None,
    bn0_var: Tensor | None,
    bn0_eps: float,
    radix: int,
) -> Tensor:
    bn0 = Norm(bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps)
    return pool_phase.pool(make_map(x, relu, bn0, radix))


def recombine(
    x: Tensor,
    relu: bool,
    bn0_weight: Tensor | None,
    bn0_bias: Tensor | None,
    bn0_mean: Tensor | None,
    bn0_var: Tensor | None,
    bn0_eps: float,
    attention: Tensor,
) -> Tensor:
    bn0 = Norm(bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps)
    m, attention = _map_and_attention(x, relu, bn0, attention)
    return recombine_phase.recombine(m, attention)


def pool_backward(
    dout: Tensor,
    x: Tensor,
    relu: bool,
    bn0_weight: Tensor | None,
    bn0_bias: Tensor | None,
    bn0_mean: Tensor | None,
    bn0_var: Tensor | None,
    bn0_eps: float,
    radix: int,
) -> tuple[Tensor, Tensor]:
    bn0 = Norm(bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps)
    m = make_map(x, relu, bn0, radix)
    dattention, sums = pool_phase.pool_backward(m, take_dout(m, dout), None, None)
    return dattention, m.empty(0) if sums is None else sums


def prologue_backward(
    sums: Tensor, attention: Tensor, dgap: Tensor, pixels: int
) -> tuple[Tensor, Tensor]:
    check(
        sums.dim() == 4 and sums.shape[1] == pool_phase.PROLOGUE_SUMS,
        "sums: expected the shape (B, 4, R, C)",
    )
    check(pixels > 0, f"pixels: expected at least 1, got {pixels}")
    batch, _, radix, channels = sums.shape
    sums = take_crumb("sums", sums, tuple(sums.shape), sums)
    attention = take_crumb("attention", attention, (batch, radix, channels), sums)
    dgap = take_crumb("dgap", dgap, (batch, channels), sums)
    dweight, dbias = sums.new_empty(radix * channels), sums.new_empty(radix * channels)
    prologue_phase.prologue_backward(sums, attention, dgap, pixels, dweight, dbias, None)
    return dweight, dbias


def recombine_backward(
    dout: Tensor,
    x: Tensor,
    relu: bool,
    bn0_weight: Tensor | None,
    bn0_bias: Tensor | None,
    bn0_mean: Tensor | None,
    bn0_var: Tensor | None,
    bn0_eps: float,
    attention: Tensor,
    dgap: Tensor,
    mean_dz: Tensor | None,
    mean_dz_xhat: Tensor | None,
) -> Tensor:
    bn0 = Norm(bn0_weight, bn0_bias, bn0_mean, bn0_var, bn0_eps)
    m, attention = _map_and_attention(x, relu, bn0, attention)
    dout = take_dout(m, dout)
    dgap = take_crumb("dgap", dgap, (m.batch, m.channels), x)
    check(
        (mean_dz is None) == (mean_dz_xhat is None) and (mean_dz is None or bn0_mean is not None),
        "mean_dz, mean_dz_xhat: expected both or neither, and neither without bn0",
    )
    means = None
    if mean_dz is not None and mean_dz_xhat is not None:
        means = (
            take_crumb("mean_dz", mean_dz, (m.features,), x),
            take_crumb("mean_dz_xhat", mean_dz_xhat, (m.features,), x),
        )
    return recombine_phase.recombine_backward(m, dout, attention, dgap, means)


def _map_and_attention(x: Tensor, relu: bool, bn0: Norm, attention: Tensor) -> tuple[Map, Tensor]:
    check(attention.dim() == 3, "attention: expected 3 dimensions (B, R, C)")
    m = make_map(x, relu, bn0, attention.shape[1])
    shape = (m.batch, m.radix, m.channels)
    return m, take_crumb("attention", attention, shape, x)


OPS = (
    split_attention,
    split_attention_train,
    split_attention_backward,
    batch_statistics,
    pool,
    recombine,
    pool_backward,
    prologue_backward,
    recombine_backward,
)


def _on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels are launched on the current device, which that of the first tensor becomes."""

    def run(first: Tensor, *args: Any) -> Any:
        guard = torch.accelerator.device_index(first.device.index)
        with contextlib.nullcontext() if first.is_cpu else guard:
            return op(first, *args)

    return run


for _op in OPS:
    # Defined once in a process, and kept by PyTorch.
    if not hasattr(getattr(torch.ops, NAMESPACE), _op.__name__):
        _name = f"{NAMESPACE}::{_op.__name__}"
        torch.library.define(_name, torch.library.infer_schema(_op, mutates_args=()))
        _devices = "cpu" if INTERPRETED else ("cuda", "xpu")
        torch.library.impl(_name, _devices, _on_its_device(latest(_op)))
fakes.register(NAMESPACE)
flops.register(NAMESPACE)
