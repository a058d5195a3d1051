"""The autograd Functions around a backend's kernels; saved are x and (B, C)-sized tensors.

:func:`split_attention` is one Function over all phases. :func:`attend` lets any module map gap to
attention. It has two Functions around that module: :class:`_Pool` and :class:`_Recombine`. The
backward of :class:`_Recombine` runs first and reads x and dout. The backward of :class:`_Pool` then
knows dgap and writes dx. So both functions make the same number of passes over x.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnest_fused import reference, sync
from resnest_fused.backends import FusedBackend, kernels
from resnest_fused.ops import NO_NORM, TABLE, MapArguments, NormArguments, Op
from resnest_fused.reference import BatchNormArgs

_TRAIN, _POOL, _RECOMBINE = (TABLE[n] for n in ("split_attention_train", "pool", "recombine"))


class Statistics(NamedTuple):
    """A call's batch statistics: mean and biased variance by feature, and the element count."""

    mean: Tensor
    var: Tensor
    elements: int | Tensor


def _norm(bn: BatchNormArgs | None, batch_stats: bool) -> tuple[Any, ...]:
    """The norm's fields as in ``NormArguments``; the batch's statistics come later."""
    if bn is None:
        return NO_NORM
    if batch_stats:
        return bn.weight, bn.bias, None, None, bn.eps, True
    return bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, False


def _records(op: Op, args: Sequence[Any]) -> bool:
    """Whether autograd must record a call of the op with these arguments."""
    if not torch.is_grad_enabled():
        return False
    for tensor in op.differentiable(args):
        if tensor is not None and tensor.requires_grad:
            break
    else:
        return False
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record this op's gradient: trace under torch.no_grad() for "
            'inference, or with resnest_fused.use_backend("reference")'
        )
    return True


class _Bound(NamedTuple):
    """Arguments that are bound as they are."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


class _Signature(inspect.Signature):
    """Of a function without defaults that is called by position: there is nothing to bind."""

    def bind(self, /, *args: Any, **kwargs: Any) -> Any:
        return _Bound(args, kwargs)


def _signed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the signature with the function: PyTorch asks for it and binds to it at each call."""
    known = inspect.signature(forward)
    forward.__signature__ = _Signature([*known.parameters.values()])  # type: ignore[attr-defined]
    return forward


def split_attention(
    backend: str,
    x: tuple[Any, ...],
    bn0: BatchNormArgs | None,
    bn0_batch_stats: bool,
    fcs: tuple[Any, ...],
    bn1: BatchNormArgs | None,
    bn1_batch_stats: bool,
) -> tuple[Tensor, Statistics | None, Statistics | None]:
    """Run checked arguments on the named backend.

    x and fcs are the fields of ``MapArguments`` and of ``FcArguments``. Returns out and the batch
    statistics of bn0 and of bn1; each is None if the norm used running ones. Nothing is saved if
    no gradient is needed.
    """
    args = (*x, *_norm(bn0, bn0_batch_stats), *fcs, *_norm(bn1, bn1_batch_stats))
    if _records(_TRAIN, args):
        results = _SplitAttention.apply(backend, *args)
    elif bn0_batch_stats or bn1_batch_stats:
        results = kernels(backend).split_attention_train(*args)
    else:
        return kernels(backend).split_attention(*args), None, None
    out, _, _, _, mean0, var0, mean1, var1 = results
    batch, _, height, width = out.shape
    return (
        out,
        Statistics(mean0, var0, batch * height * width) if bn0_batch_stats else None,
        Statistics(mean1, var1, batch) if bn1_batch_stats else None,
    )


class _SplitAttention(torch.autograd.Function):
    """All phases; the inputs are those of the op ``split_attention_train``."""

    @staticmethod
    @_signed
    def forward(backend: str, *args: Any) -> Any:
        return kernels(backend).split_attention_train(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # Dynamo of torch 2.11 would make a tuple of `*args`.
        ctx.backend, args = inputs[0], list(inputs[1:])
        _, gap, hidden, attention, mean0, var0, mean1, var1 = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        place = _TRAIN.place
        if args[place["bn0_batch_stats"]]:
            args[place["bn0_mean"]], args[place["bn0_var"]] = mean0, var0
        if args[place["bn1_batch_stats"]]:
            args[place["bn1_mean"]], args[place["bn1_var"]] = mean1, var1
        ctx.save_for_backward(*_TRAIN.tensors(args), gap, hidden, attention)
        ctx.others = _TRAIN.others(args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> Any:
        if dout is None:
            return (None, *_TRAIN.gradients({}))
        *tensors, gap, hidden, attention = ctx.saved_tensors
        args = _TRAIN.merge(tensors, ctx.others)
        flags = ctx.needs_input_grad[1:]
        needed = _TRAIN.differentiable(flags)
        grads: Iterable[Tensor | None]
        if torch.is_grad_enabled():
            # A second derivative is wanted: the reference formulas give one.
            grads = _reference_gradients(dout, args, _TRAIN.needed(flags))
        else:
            grads = kernels(ctx.backend).split_attention_backward(
                dout, *args, gap, hidden, attention, [*needed]
            )
        wanted = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        return (None, *_TRAIN.spread(wanted))


def _known(bn: NormArguments, process_group: str | None = None) -> BatchNormArgs | None:
    """The norm that these saved tensors belong to, without running statistics to update."""
    if bn.mean is None:
        return None
    mean, var = (None, None) if bn.batch_stats else (bn.mean, bn.var)
    return BatchNormArgs(
        bn.weight,
        bn.bias,
        mean,
        var,
        eps=bn.eps,
        batch_stats=bn.batch_stats,
        process_group=process_group,
    )


def _aliases(op: Op, args: Sequence[Any]) -> list[Any]:
    """An op's arguments, with a view of each differentiable one.

    A gradient with respect to a view stops there, even if x was computed from a parameter.
    """
    return [
        arg.view_as(arg) if argument.differentiable and arg is not None else arg
        for argument, arg in zip(op.arguments, args, strict=True)
    ]


def _gradients(
    op: Op, args: Sequence[Any], results: list[Tensor], grads: list[Tensor], needed: dict[str, bool]
) -> dict[str, Tensor | None]:
    """The gradients of ``results`` with respect to the needed arguments, as a graph."""
    by_name = {a.name: arg for a, arg in zip(op.arguments, args, strict=True)}
    names = [name for name, need in needed.items() if need and by_name[name] is not None]
    inputs = [by_name[name] for name in names]
    found = torch.autograd.grad(results, inputs, grads, create_graph=True, allow_unused=True)
    return dict.fromkeys(needed) | dict(zip(names, found, strict=True))


def _reference_gradients(
    dout: Tensor, args: Sequence[Any], needed: dict[str, bool]
) -> Iterable[Tensor | None]:
    """The gradients as a differentiable graph over dout and the inputs."""
    args = _aliases(_TRAIN, args)
    m, bn0, fcs, bn1 = _TRAIN.unpack(args)
    out = reference.split_attention(
        m.x,
        fcs.fc1_weight,
        fcs.fc1_bias,
        fcs.fc2_weight,
        fcs.fc2_bias,
        radix=m.radix,
        cardinality=fcs.cardinality,
        bn0=_known(bn0),
        bn1=_known(bn1),
        relu=m.relu,
    )
    return _gradients(_TRAIN, args, [out], [dout], needed).values()


def attend(
    backend: str,
    x: MapArguments,
    attention_of: Callable[[Tensor], Tensor],
    bn0: BatchNormArgs | None,
    batch_stats: bool,
) -> tuple[Tensor, Statistics | None]:
    """Split attention around any map from gap ``(B, C, 1, 1)`` to attention ``(B, R, C, 1, 1)``.

    Returns out and bn0's batch statistics, or None if bn0 used running ones. If bn0 has a process
    group, the statistics are over all its processes.
    """
    norm, statistics, shared = NormArguments(*_norm(bn0, batch_stats)), None, _Shared()
    # Dynamo may hold eps as a symbol, so it becomes a float before the Functions.
    norm = norm._replace(eps=float(norm.eps), batch_stats=False)
    if batch_stats:
        process_group = None if bn0 is None else bn0.process_group
        with torch.no_grad():
            statistics = _batch_statistics(kernels(backend), x.x, process_group)
        norm = norm._replace(mean=statistics.mean, var=statistics.var)
        shared = _Shared(True, statistics.elements, process_group)
    args = (*x, *norm)
    if _records(_POOL, args):
        gap, *carriers = _Pool.apply(backend, *shared, *args)
    else:
        gap, carriers = kernels(backend).pool(*args), [None] * 3
    attention = attention_of(gap[..., None, None])[..., 0, 0].to(gap.dtype)
    if _records(_RECOMBINE, (*args, attention)):
        out = _Recombine.apply(backend, *shared, *carriers, *args, attention)
    else:
        out = kernels(backend).recombine(*args, attention)
    return out, statistics


class _Shared(NamedTuple):
    """Facts about bn0's statistics that the two Functions below need and the ops do not."""

    batch_stats: bool = False
    elements: int | Tensor | None = None
    process_group: str | None = None

    def norm(self, bn0: NormArguments) -> BatchNormArgs | None:
        """bn0 for the reference formulas."""
        return _known(bn0._replace(batch_stats=self.batch_stats), self.process_group)


def _batch_statistics(run: FusedBackend, x: Tensor, process_group: str | None) -> Statistics:
    batch, _, height, width = x.shape
    mean, var = run.batch_statistics(x)
    count = batch * height * width
    if process_group is None:
        return Statistics(mean, var, count)
    return Statistics(*sync.combine_statistics(mean, var, count, process_group))


class _Pool(torch.autograd.Function):
    """The op ``pool``: gap, and three carriers.

    The carriers hold no data and are inputs of :class:`_Recombine`. Its backward returns dout,
    attention and the sums over pixels as their gradients. So the backward here receives them.
    """

    @staticmethod
    @_signed
    def forward(
        backend: str, batch_stats: bool, elements: Any, process_group: str | None, *args: Any
    ) -> Any:
        gap = kernels(backend).pool(*args)
        m, _ = _POOL.unpack(args)
        batch, channels = gap.shape
        splits = (batch, m.radix, channels)
        return (
            gap,
            m.x.new_zeros(()).expand(batch, channels, *m.x.shape[2:]),
            gap.new_zeros(()).expand(splits),
            gap.new_zeros(()).expand((batch, 4, m.radix, channels) if m.relu else (0,)),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.backend, batch_stats, elements, process_group, *args = inputs
        ctx.set_materialize_grads(False)
        counted = elements if isinstance(elements, Tensor) else None
        ctx.save_for_backward(*_POOL.tensors(args), counted)
        ctx.others = _POOL.others(args)
        ctx.shared = _Shared(batch_stats, None if counted is not None else elements, process_group)

    @staticmethod
    def backward(
        ctx: Any,
        dgap: Tensor | None,
        dout: Tensor | None,
        attention: Tensor | None,
        sums: Tensor | None,
    ) -> Any:
        unused = (None,) * (1 + len(ctx.shared))
        *tensors, counted = ctx.saved_tensors
        args = _POOL.merge(tensors, ctx.others)
        m, bn0 = _POOL.unpack(args)
        needed = _POOL.needed(ctx.needs_input_grad[len(unused) :])
        batch, features, height, width = m.x.shape
        channels = features // m.radix
        if dout is None or attention is None:
            # out has no gradient, so the backward of _Recombine did not run.
            if dgap is None:
                return (*unused, *_POOL.gradients({}))
            dout = m.x.new_zeros(batch, channels, height, width)
            attention = dgap.new_zeros(batch, m.radix, channels)
        if dgap is None:
            dgap = attention.new_zeros(batch, channels)
        if torch.is_grad_enabled():
            aliases = _aliases(_POOL, args)
            m, bn0 = _POOL.unpack(aliases)
            z = reference.prologue(m.x, ctx.shared.norm(bn0), m.relu, training=False)
            splits = reference.as_splits(z, m.radix)
            gap = reference.pool(splits)[..., 0, 0].to(dgap.dtype)
            out = reference.recombine(splits, attention.to(m.x.dtype)[..., None, None])
            grads = _gradients(_POOL, aliases, [gap, out], [dgap, dout], needed)
            return (*unused, *_POOL.gradients(grads))
        run = kernels(ctx.backend)
        grads = {}
        mean_dz = mean_dz_xhat = None
        batch_stats, process_group = ctx.shared.batch_stats, ctx.shared.process_group
        if needed["bn0_weight"] or needed["bn0_bias"] or (needed["x"] and batch_stats):
            if sums is None:
                _, sums = run.pool_backward(dout, *args)
            # Divided here: a graph for any image size cannot pass the size as the op's integer.
            mean_dgap = dgap / (height * width)
            dweight, dbias = run.prologue_backward(sums, attention, mean_dgap, 1)
            if bn0.weight is not None and needed["bn0_weight"]:
                grads["bn0_weight"] = dweight.to(bn0.weight.dtype)
            if bn0.bias is not None and needed["bn0_bias"]:
                grads["bn0_bias"] = dbias.to(bn0.bias.dtype)
            if batch_stats:
                elements = ctx.shared.elements if counted is None else counted
                totals = torch.stack((dbias, dweight))
                if process_group is not None:
                    totals = sync.all_reduce(totals, process_group)
                mean_dz, mean_dz_xhat = (totals / elements).to(dgap.dtype).unbind()
        if needed["x"]:
            grads["x"] = run.recombine_backward(dout, *args, attention, dgap, mean_dz, mean_dz_xhat)
        return (*unused, *_POOL.gradients(grads))


class _Recombine(torch.autograd.Function):
    """The op ``recombine``, with the carriers; the gradients of x and bn0 are :class:`_Pool`'s."""

    @staticmethod
    @_signed
    def forward(
        backend: str,
        batch_stats: bool,
        elements: Any,
        process_group: str | None,
        of_dout: Tensor | None,
        of_attention: Tensor | None,
        of_sums: Tensor | None,
        *args: Any,
    ) -> Tensor:
        return kernels(backend).recombine(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.backend, batch_stats, _, process_group, _, _, _, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_RECOMBINE.tensors(args))
        ctx.others = _RECOMBINE.others(args)
        ctx.shared = _Shared(batch_stats, None, process_group)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> Any:
        unused = (None,) * (1 + len(ctx.shared))
        if dout is None:
            return (*unused, None, None, None, *_RECOMBINE.gradients({}))
        args = _RECOMBINE.merge(ctx.saved_tensors, ctx.others)
        m, bn0, attention = _RECOMBINE.unpack(args)
        if torch.is_grad_enabled():
            z = reference.prologue(m.x, ctx.shared.norm(bn0), m.relu, training=False)
            alias = attention.view_as(attention)
            out = reference.recombine(
                reference.as_splits(z, m.radix), alias.to(m.x.dtype)[..., None, None]
            )
            (dattention,) = torch.autograd.grad(out, alias, dout, create_graph=True)
            sums = None
        else:
            dattention, sums = kernels(ctx.backend).pool_backward(dout, *m, *bn0)
        handed = zip((dout, attention, sums), ctx.needs_input_grad[len(unused) :], strict=False)
        carriers = (grad if wanted else None for grad, wanted in handed)
        wanted = _RECOMBINE.needed(ctx.needs_input_grad[len(unused) + 3 :])["attention"]
        grads = {"attention": dattention if wanted else None}
        return (*unused, *carriers, *_RECOMBINE.gradients(grads))
