"""The autograd Functions around a backend's kernels; saved are x and (B, C)-sized crumbs.

:func:`split_attention` is one Function over all phases. :func:`attend` lets any module map gap to
attention: it is one Function cut in two around that module, :class:`_Pool` and :class:`_Recombine`.
Backward runs through the second half first, which needs a read of x and dout; only the first half,
which then knows dgap too, writes dx. So the passes over x are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnest_fused import reference, sync
from resnest_fused.backends import FusedBackend, kernels
from resnest_fused.reference import BatchNormArgs


class Statistics(NamedTuple):
    """What normalised a call: mean and biased variance by feature, over so many elements."""

    mean: Tensor
    var: Tensor
    elements: int | Tensor


def _norm(bn: BatchNormArgs | None, batch_stats: bool) -> tuple[Any, ...]:
    """weight, bias, mean, var, eps as the ops take them; the batch's statistics come later."""
    if bn is None:
        return None, None, None, None, 0.0
    if batch_stats:
        return bn.weight, bn.bias, None, None, bn.eps
    return bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps


def _records(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled() or all(t is None or not t.requires_grad for t in tensors):
        return False
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record this op's gradient: trace under torch.no_grad() for "
            'inference, or with resnest_fused.use_backend("reference")'
        )
    return True


def split_attention(
    backend: str,
    x: Tensor,
    relu: bool,
    bn0: BatchNormArgs | None,
    bn0_batch_stats: bool,
    fcs: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    bn1: BatchNormArgs | None,
    bn1_batch_stats: bool,
    radix: int,
    cardinality: int,
) -> tuple[Tensor, Statistics | None, Statistics | None]:
    """Run checked arguments on the named backend.

    ``fcs`` are fc1's weight and bias, then fc2's. Returns out and the batch statistics of bn0 and
    of bn1, None where others normalised. Without a gradient to compute nothing is saved.
    """
    norm0, norm1 = _norm(bn0, bn0_batch_stats), _norm(bn1, bn1_batch_stats)
    if _records(x, *norm0[:2], *fcs, *norm1[:2]):
        run: Callable[..., Any] = _SplitAttention.apply
        arguments: tuple[Any, ...] = (backend,)
    elif bn0_batch_stats or bn1_batch_stats:
        run, arguments = kernels(backend).forward_train, ()
    else:
        out = kernels(backend).forward(x, relu, *norm0, *fcs, *norm1, radix, cardinality)
        return out, None, None
    out, _, _, _, mean0, var0, mean1, var1 = run(
        *arguments,
        x,
        relu,
        *norm0,
        bn0_batch_stats,
        *fcs,
        *norm1,
        bn1_batch_stats,
        radix,
        cardinality,
    )
    batch, _, height, width = x.shape
    return (
        out,
        Statistics(mean0, var0, batch * height * width) if bn0_batch_stats else None,
        Statistics(mean1, var1, batch) if bn1_batch_stats else None,
    )


# Where the differentiable inputs of _SplitAttention stand, in the order of their gradients.
_DIFFERENTIABLE = (1, 3, 4, 9, 10, 11, 12, 13, 14)


class _SplitAttention(torch.autograd.Function):
    """(x, bn0, fc1, fc2, bn1) -> out, with crumbs; all phases."""

    @staticmethod
    def forward(backend: str, *args: Any) -> Any:
        return kernels(backend).forward_train(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (backend, x, relu, weight0, bias0, mean0, var0, eps0, batch_stats0) = inputs[:9]
        fcs, (weight1, bias1, mean1, var1, eps1, batch_stats1) = inputs[9:13], inputs[13:19]
        _, *crumbs = output
        gap, hidden, attention, batch_mean0, batch_var0, batch_mean1, batch_var1 = crumbs
        ctx.mark_non_differentiable(*crumbs)
        ctx.set_materialize_grads(False)
        if batch_stats0:
            mean0, var0 = batch_mean0, batch_var0
        if batch_stats1:
            mean1, var1 = batch_mean1, batch_var1
        ctx.save_for_backward(
            x,
            weight0,
            bias0,
            mean0,
            var0,
            *fcs,
            weight1,
            bias1,
            mean1,
            var1,
            gap,
            hidden,
            attention,
        )
        ctx.backend = backend
        ctx.options = (relu, eps0, batch_stats0, eps1, batch_stats1, *inputs[19:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> Any:
        result: list[Tensor | None] = [None] * 21
        if dout is None:
            return tuple(result)
        needed = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE]
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient is itself to be differentiated: take it through the reference formulas.
            grads = _reference_gradients(dout, saved, ctx.options, needed)
        else:
            x, weight0, bias0, mean0, var0, *fcs, weight1, bias1, mean1, var1 = saved[:13]
            relu, eps0, batch_stats0, eps1, batch_stats1, radix, cardinality = ctx.options
            grads = kernels(ctx.backend).backward(
                dout,
                x,
                relu,
                weight0,
                bias0,
                mean0,
                var0,
                eps0,
                batch_stats0,
                fcs[0],
                fcs[2],
                weight1,
                bias1,
                mean1,
                var1,
                eps1,
                batch_stats1,
                *saved[13:],
                radix,
                cardinality,
                needed,
            )
        for place, wanted, grad in zip(_DIFFERENTIABLE, needed, grads, strict=True):
            result[place] = grad if wanted else None
        return tuple(result)


def _known(
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    batch_stats: bool,
    group: str | None = None,
) -> BatchNormArgs | None:
    """The norm that these saved tensors belong to, without running statistics to update."""
    if mean is None:
        return None
    if batch_stats:
        mean = var = None
    return BatchNormArgs(
        weight, bias, mean, var, eps=eps, batch_stats=batch_stats, process_group=group
    )


def _aliases(tensors: Any) -> list[Any]:
    """Views to differentiate by: x may itself have been computed from a parameter, and the gradient
    must stop here."""
    return [None if t is None else t.view_as(t) for t in tensors]


def _gradients(
    results: list[Tensor], inputs: list[Any], needed: list[bool], grads: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of ``results`` by those of ``inputs`` that need one, as a graph."""
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(results, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(
        next(found) if need and t is not None else None
        for t, need in zip(inputs, needed, strict=True)
    )


def _reference_gradients(
    dout: Tensor, saved: Any, options: tuple[Any, ...], needed: list[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients as a differentiable graph over dout and the inputs."""
    relu, eps0, batch_stats0, eps1, batch_stats1, radix, cardinality = options
    _, _, _, mean0, var0, _, _, _, _, _, _, mean1, var1 = saved[:13]
    inputs = _aliases((*saved[:3], *saved[5:11]))
    x, weight0, bias0, *fcs, weight1, bias1 = inputs
    out = reference.split_attention(
        x,
        *fcs,
        radix=radix,
        cardinality=cardinality,
        bn0=_known(weight0, bias0, mean0, var0, eps0, batch_stats0),
        bn1=_known(weight1, bias1, mean1, var1, eps1, batch_stats1),
        relu=relu,
    )
    return _gradients([out], inputs, needed, [dout])


def attend(
    backend: str,
    x: Tensor,
    attention_of: Callable[[Tensor], Tensor],
    relu: bool,
    bn0: BatchNormArgs | None,
    batch_stats: bool,
    radix: int,
) -> tuple[Tensor, Statistics | None]:
    """Split attention around any map from gap ``(B, C, 1, 1)`` to attention ``(B, R, C, 1, 1)``.

    Returns out and bn0's batch statistics, None where others normalised. With a process group in
    bn0 they are those of all its processes.
    """
    weight, bias, mean, var, eps = _norm(bn0, batch_stats)
    group = None if bn0 is None else bn0.process_group
    eps = float(eps)  # before the Functions: Dynamo may hold it as a symbol
    statistics = None
    if batch_stats:
        with torch.no_grad():
            statistics = _batch_statistics(kernels(backend), x, group)
        mean, var = statistics.mean, statistics.var
    norm0 = (weight, bias, mean, var, eps)
    if _records(x, weight, bias):
        gap, *carriers = _Pool.apply(
            backend, x, relu, *norm0, batch_stats, statistics and statistics.elements, group, radix
        )
    else:
        gap, carriers = kernels(backend).pool(x, relu, *norm0, radix), [None] * 3
    attention = attention_of(gap[..., None, None])[..., 0, 0].to(gap.dtype)
    if _records(x, weight, bias, attention):
        out = _Recombine.apply(backend, x, relu, *norm0, batch_stats, group, attention, *carriers)
    else:
        out = kernels(backend).recombine(x, relu, *norm0, attention)
    return out, statistics


def _batch_statistics(run: FusedBackend, x: Tensor, group: str | None) -> Statistics:
    batch, _, height, width = x.shape
    mean, var = run.batch_statistics(x)
    count = batch * height * width
    if group is None:
        return Statistics(mean, var, count)
    return Statistics(*sync.combine_statistics(mean, var, count, group))


class _Pool(torch.autograd.Function):
    """(x, bn0) -> gap, and three carriers.

    The carriers hold no data. They stand for what :class:`_Recombine` computes with, so that its
    backward can hand over, as their gradients, what the backward here goes on with: dout, attention
    and the sums over pixels.
    """

    @staticmethod
    def forward(
        backend: str,
        x: Tensor,
        relu: bool,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        batch_stats: bool,
        count: int | Tensor | None,
        group: str | None,
        radix: int,
    ) -> Any:
        gap = kernels(backend).pool(x, relu, weight, bias, mean, var, eps, radix)
        batch, channels = gap.shape
        out_shape = (batch, channels, *x.shape[2:])
        splits = (batch, radix, channels)
        return (
            gap,
            x.new_zeros(()).expand(out_shape),
            gap.new_zeros(()).expand(splits),
            gap.new_zeros(()).expand((batch, 4, radix, channels) if relu else (0,)),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        backend, x, relu, weight, bias, mean, var, eps, batch_stats, count, group, radix = inputs
        ctx.set_materialize_grads(False)
        counted = count if isinstance(count, Tensor) else None
        ctx.save_for_backward(x, weight, bias, mean, var, counted)
        ctx.backend = backend
        ctx.options = (relu, eps, batch_stats, group, radix)

    @staticmethod
    def backward(
        ctx: Any,
        dgap: Tensor | None,
        dout: Tensor | None,
        attention: Tensor | None,
        sums: Tensor | None,
    ) -> Any:
        result: list[Tensor | None] = [None] * 12
        x, weight, bias, mean, var, counted = ctx.saved_tensors
        relu, eps, batch_stats, group, radix = ctx.options
        needed = [ctx.needs_input_grad[place] for place in (1, 3, 4)]
        batch, features, height, width = x.shape
        if dout is None or attention is None:
            # Only what stands between the phases has a gradient: the other half saw none.
            if dgap is None:
                return tuple(result)
            dout = x.new_zeros(batch, features // radix, height, width)
            attention = dgap.new_zeros(batch, radix, features // radix)
        if dgap is None:
            dgap = attention.new_zeros(batch, features // radix)
        if torch.is_grad_enabled():
            inputs = _aliases((x, weight, bias))
            bn0 = _known(inputs[1], inputs[2], mean, var, eps, batch_stats, group)
            splits = reference.as_splits(
                reference.prologue(inputs[0], bn0, relu, training=False), radix
            )
            gap = reference.pool(splits)[..., 0, 0].to(dgap.dtype)
            out = reference.recombine(splits, attention.to(x.dtype)[..., None, None])
            result[1], result[3], result[4] = _gradients([gap, out], inputs, needed, [dgap, dout])
            return tuple(result)
        run = kernels(ctx.backend)
        mean_dz = mean_dz_xhat = None
        if needed[1] or needed[2] or (needed[0] and batch_stats):
            if sums is None:
                _, sums = run.pool_backward(dout, x, relu, weight, bias, mean, var, eps, radix)
            # The division here, as a graph for any image size cannot hold it as the op's integer.
            mean_dgap = dgap / (height * width)
            dweight, dbias = run.prologue_backward(sums, attention, mean_dgap, 1)
            if weight is not None and needed[1]:
                result[3] = dweight.to(weight.dtype)
            if bias is not None and needed[2]:
                result[4] = dbias.to(bias.dtype)
            if batch_stats:
                count = batch * height * width if counted is None else counted
                totals = torch.stack((dbias, dweight))
                if group is not None:
                    totals = sync.all_reduce(totals, group)
                mean_dz, mean_dz_xhat = (totals / count).to(dgap.dtype).unbind()
        if needed[0]:
            norm0 = (weight, bias, mean, var, eps)
            result[1] = run.recombine_backward(
                dout, x, relu, *norm0, attention, dgap, mean_dz, mean_dz_xhat
            )
        return tuple(result)


class _Recombine(torch.autograd.Function):
    """(x, bn0, attention, carriers) -> out; the gradients of x and bn0 are :class:`_Pool`'s."""

    @staticmethod
    def forward(
        backend: str,
        x: Tensor,
        relu: bool,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        batch_stats: bool,
        group: str | None,
        attention: Tensor,
        *carriers: Tensor | None,
    ) -> Tensor:
        return kernels(backend).recombine(x, relu, weight, bias, mean, var, eps, attention)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        backend, x, relu, weight, bias, mean, var, eps, batch_stats, group, attention = inputs[:11]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, var, attention)
        ctx.backend = backend
        ctx.options = (relu, eps, batch_stats, group)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> Any:
        unused = (None,) * 10
        if dout is None:
            return (*unused, None, None, None, None)
        x, weight, bias, mean, var, attention = ctx.saved_tensors
        relu, eps, batch_stats, group = ctx.options
        radix = attention.shape[1]
        if torch.is_grad_enabled():
            z = reference.prologue(
                x, _known(weight, bias, mean, var, eps, batch_stats, group), relu, training=False
            )
            (alias,) = _aliases([attention])
            weights = alias.to(x.dtype)[..., None, None]
            out = reference.recombine(reference.as_splits(z, radix), weights)
            (dattention,) = _gradients([out], [alias], [True], [dout])
            sums = None
        else:
            dattention, sums = kernels(ctx.backend).pool_backward(
                dout, x, relu, weight, bias, mean, var, eps, radix
            )
        wanted = ctx.needs_input_grad[10:]
        grads = (dattention, dout, attention, sums)
        return (*unused, *(g if want else None for g, want in zip(grads, wanted, strict=True)))
