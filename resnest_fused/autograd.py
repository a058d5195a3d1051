"""One autograd Function around a backend's kernels; it saves x and (B, C)-sized crumbs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnest_fused import reference
from resnest_fused.backends import kernels
from resnest_fused.reference import BatchNormArgs


def split_attention(
    backend: str,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    bn1: BatchNormArgs | None,
    batch_stats: bool,
    radix: int,
    cardinality: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run checked arguments on the named backend; return out, bn1's batch mean and biased variance.

    The statistics are None unless ``batch_stats``. Without a gradient to compute nothing is saved.
    """
    weight, bias, mean, var, eps = None, None, None, None, 0.0
    if bn1 is not None:
        weight, bias, eps = bn1.weight, bn1.bias, bn1.eps
        if not batch_stats:
            mean, var = bn1.running_mean, bn1.running_var
    differentiable = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        out, _, _, _, batch_mean, batch_var = _SplitAttention.apply(
            backend, *differentiable, mean, var, eps, batch_stats, radix, cardinality
        )
    elif batch_stats:
        out, _, _, _, batch_mean, batch_var = kernels(backend).forward_train(
            *differentiable, mean, var, eps, batch_stats, radix, cardinality
        )
    else:
        run = kernels(backend).forward
        return run(*differentiable, mean, var, eps, radix, cardinality), None, None
    return (out, batch_mean, batch_var) if batch_stats else (out, None, None)


class _SplitAttention(torch.autograd.Function):
    """(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, bn1_weight, bn1_bias) -> out, with crumbs."""

    @staticmethod
    def forward(backend: str, *args: Any) -> Any:
        return kernels(backend).forward_train(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        backend, *differentiable, mean, var, eps, batch_stats, radix, cardinality = inputs
        _, gap, hidden, attention, batch_mean, batch_var = output
        ctx.mark_non_differentiable(gap, hidden, attention, batch_mean, batch_var)
        ctx.set_materialize_grads(False)
        if batch_stats:
            mean, var = batch_mean, batch_var
        ctx.save_for_backward(*differentiable, mean, var, gap, hidden, attention)
        ctx.backend = backend
        ctx.options = (eps, batch_stats, radix, cardinality)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> Any:
        no_grads = (None,) * 6
        if dout is None:
            return (None,) * 8 + no_grads
        *differentiable, mean, var, gap, hidden, attention = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:8]
        if torch.is_grad_enabled():
            # The gradient is itself to be differentiated: take it through the reference formulas.
            grads = _reference_gradients(dout, differentiable, mean, var, ctx.options, needed)
        else:
            x, fc1_weight, _, fc2_weight, _, bn1_weight, bn1_bias = differentiable
            grads = kernels(ctx.backend).backward(
                dout,
                x,
                fc1_weight,
                fc2_weight,
                bn1_weight,
                bn1_bias,
                mean,
                var,
                gap,
                hidden,
                attention,
                *ctx.options,
                needed,
            )
        grads = tuple(g if wanted else None for g, wanted in zip(grads, needed, strict=True))
        return (None, *grads, *no_grads)


def _reference_gradients(
    dout: Tensor,
    differentiable: list[Tensor | None],
    mean: Tensor | None,
    var: Tensor | None,
    options: tuple[float, bool, int, int],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients as a differentiable graph over dout and the inputs."""
    eps, batch_stats, radix, cardinality = options
    # Aliases, as x may itself have been computed from a parameter: the gradient must stop here.
    differentiable = [None if t is None else t.view_as(t) for t in differentiable]
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, bn1_weight, bn1_bias = differentiable
    assert x is not None and fc1_weight is not None and fc2_weight is not None
    bn1 = None
    if mean is not None:
        bn1 = BatchNormArgs(
            bn1_weight,
            bn1_bias,
            running_mean=None if batch_stats else mean,
            running_var=None if batch_stats else var,
            eps=eps,
            batch_stats=batch_stats,
        )
    out = reference.split_attention(
        x,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        radix=radix,
        cardinality=cardinality,
        bn1=bn1,
    )
    wanted = [t for t, need in zip(differentiable, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
    return tuple(
        next(found) if need and t is not None else None
        for t, need in zip(differentiable, needed, strict=True)
    )
