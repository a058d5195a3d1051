"""The public ``split_attention`` and ``attend``: their contract, checks and dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from resnest_fused import autograd, reference
from resnest_fused.backends import choose, kernels
from resnest_fused.checks import check_counter, check_fcs, check_map, check_norm, check_number
from resnest_fused.ops import NOTHING_RUNS, FcArguments, MapArguments, RunningArguments
from resnest_fused.reference import BatchNormArgs


def split_attention(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    radix: int,
    cardinality: int = 1,
    bn0: BatchNormArgs | None = None,
    bn1: BatchNormArgs | None = None,
    relu: bool = False,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """ResNeSt's split attention (arXiv:2004.08955) as one op.

    With B batch, R radix, K cardinality, C channels, I inter_channels::

        z[b,r,c,p] = relu(bn0(x)) when bn0 is given, else relu(x) or x
        gap[b,c]   = mean_p sum_r z[b,r,c,p]
        logits     = fc2(relu(bn1(fc1(gap))))       grouped by K; laid out (B, K, R, C/K)
        a[b,r,c]   = softmax over r of logits       (R = 1: sigmoid)
        out[b,c,p] = sum_r a[b,r,c] z[b,r,c,p]

    For example::

        fc1, fc2 = nn.Conv2d(64, 32, 1), nn.Conv2d(32, 128, 1)
        fcs = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        out = rf.split_attention(torch.randn(8, 128, 56, 56), *fcs, radix=2)  # (8, 64, 56, 56)

    Args:
        x: ``(B, R*C, H, W)``, radix-major; float32, float64, bfloat16 or float16. Contiguous and
            channels_last tensors are read in place. Tensors with other strides are copied once.
        fc1_weight: ``(I, C/K, 1, 1)``. Every parameter has x's dtype or float32.
        fc1_bias: ``(I,)`` in fc1_weight's dtype, or None.
        fc2_weight: ``(R*C, I/K, 1, 1)``.
        fc2_bias: ``(R*C,)`` in fc2_weight's dtype, or None.
        radix: R, at least 1.
        cardinality: K, at least 1; divides C and I.
        bn0: the normalisation of x over R*C features, which a ReLU follows. None when x is already
            normalised. Its output is never stored.
        bn1: the normalisation between the FCs, over I features, or None.
        relu: z = relu(x) when bn0 is None; False when x is already activated.
        training: normalise with batch statistics and update the running ones in place. The
            ``batch_stats`` of a ``BatchNormArgs`` overrides it.
        backend: "auto", "native", "triton" or "reference". "auto" takes the backend that
            ``use_backend`` or ``RESNEST_FUSED_BACKEND`` names, else the first that can run this
            call.

    Returns:
        ``(B, C, H, W)`` in x's dtype and memory format. NaN and infinity pass through to it as in
        PyTorch. Differentiable twice (the second time through the reference formulas).

    Raises:
        ValueError: a shape, a count or a device does not fit. The message names the tensor, the
            expected value and the given one. Batch statistics of one value per channel raise, as
            in ``nn.BatchNorm2d``. An eps raises if it is NaN, below 0, or 0 with batch statistics.
            An environment variable for this call has a wrong value.
        TypeError: a dtype does not fit, or an argument has a wrong type.
        RuntimeError: the named backend cannot run this call. The message gives the reason.

    Results are bitwise repeatable for a fixed number of threads. In eval a sample's result does
    not depend on the rest of its batch.
    """
    if type(x) is not Tensor and has_torch_function_unary(x):
        return handle_torch_function(
            split_attention,
            (x,),
            x,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            radix=radix,
            cardinality=cardinality,
            bn0=bn0,
            bn1=bn1,
            relu=relu,
            training=training,
            backend=backend,
        )
    # A plain tuple with FcArguments' fields: making a named tuple costs time at each call.
    fcs = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, cardinality)
    arguments = (x, radix, fcs, bn0, bn1, training)
    try:
        chosen = choose(backend, x)
        batch_stats0 = bn0 is not None and bn0.uses_batch_stats(training)
        batch_stats1 = bn1 is not None and bn1.uses_batch_stats(training)
        # Else PyTorch's functions do it, one after the other.
        op_updates = (not batch_stats0 or _op_updates(x, bn0)) and (
            not batch_stats1 or _op_updates(x, bn1)
        )
    except AttributeError:
        _check(*arguments)
        raise
    # In eager mode the op makes the same checks; the native one makes them ten times faster. The
    # checks here then run only after it refuses, for a better message. They run first in all other
    # modes, and where no op sees the running statistics. Ops accept bools and tensors as numbers,
    # so numbers of other types are checked here too.
    checked = (
        chosen == "reference"
        or not op_updates
        or torch.compiler.is_compiling()
        or type(radix) is not int
        or type(cardinality) is not int
        or (bn0 is not None and type(bn0.eps) is not float)
        or (bn1 is not None and type(bn1.eps) is not float)
    )
    if checked:
        _check(*arguments)
    if chosen == "reference":
        return reference.split_attention(
            x,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            radix=radix,
            cardinality=cardinality,
            bn0=bn0,
            bn1=bn1,
            relu=relu,
            training=training,
        )
    relu = relu or bn0 is not None
    if _spans_processes(bn0, batch_stats0) or _spans_processes(bn1, batch_stats1):
        mlp = reference.plain_mlp(
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            bn1,
            cardinality=cardinality,
            training=training,
        )

        def attention_of(gap: Tensor) -> Tensor:
            return reference.r_softmax(mlp(gap), radix, cardinality)

        out, statistics0 = autograd.attend(
            chosen, MapArguments(x, relu, radix), attention_of, bn0, batch_stats0
        )
        _update(chosen, x, (bn0, statistics0))
        return out
    try:
        out, statistics0, statistics1 = autograd.split_attention(
            chosen,
            (x, relu, radix),
            bn0,
            batch_stats0,
            fcs,
            bn1,
            batch_stats1,
        )
        _update(chosen, x, (bn0, statistics0), (bn1, statistics1), op_updates)
    except (AttributeError, RuntimeError, TypeError):
        if not checked:
            _check(*arguments)
        raise
    return out


def attend(
    x: Tensor,
    mlp: Callable[[Tensor], Tensor],
    softmax: Callable[[Tensor], Tensor] | None = None,
    *,
    radix: int,
    cardinality: int = 1,
    bn0: BatchNormArgs | None = None,
    relu: bool = False,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """:func:`split_attention` around any map from gap to logits, instead of the two FCs.

    With B batch, R radix, K cardinality, C channels (arXiv:2004.08955)::

        z[b,r,c,p] = relu(bn0(x)) when bn0 is given, else relu(x) or x
        gap[b,c]   = mean_p sum_r z[b,r,c,p]
        logits     = mlp(gap)                       laid out (B, K, R, C/K)
        a[b,r,c]   = softmax(logits); by default the softmax over r (R = 1: sigmoid)
        out[b,c,p] = sum_r a[b,r,c] z[b,r,c,p]

    For example, with another activation between the FCs::

        fc1, fc2 = nn.Conv2d(64, 32, 1), nn.Conv2d(32, 128, 1)
        x = torch.randn(8, 128, 56, 56)
        out = rf.attend(x, lambda gap: fc2(F.silu(fc1(gap))), radix=2)  # (8, 64, 56, 56)

    x is read and written as often as by :func:`split_attention`. Gradients flow through ``mlp``.

    Args:
        x, radix, cardinality, bn0, relu, training, backend: as in :func:`split_attention`.
        mlp: called once with gap, ``(B, C, 1, 1)`` in float32 (float64 for float64 x); returns the
            logits, ``(B, R*C, 1, 1)``, cardinality-major.
        softmax: called once with the logits; returns the attention, R*C numbers for each sample,
            radix-major. None for the softmax over radix (R = 1: the sigmoid).

    Returns:
        ``(B, C, H, W)`` in x's dtype and memory format.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`split_attention`; ValueError when the logits
            or the attention do not have that shape, TypeError when they are no tensors.
    """
    if type(x) is not Tensor and has_torch_function_unary(x):
        return handle_torch_function(
            attend,
            (x,),
            x,
            mlp,
            softmax,
            radix=radix,
            cardinality=cardinality,
            bn0=bn0,
            relu=relu,
            training=training,
            backend=backend,
        )
    check_map(x, radix, cardinality)
    _check_bn0(x, bn0, training)
    chosen = choose(backend, x)
    for name, function in (("mlp", mlp), ("softmax", softmax)):
        if not (callable(function) or (function is None and name == "softmax")):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}")

    def attention_of(gap: Tensor) -> Tensor:
        logits = mlp(gap)
        expected = (x.shape[0], x.shape[1], 1, 1)
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
        if logits.shape != expected:
            raise ValueError(f"logits: expected shape {expected}, got {tuple(logits.shape)}")
        if softmax is None:
            wide = torch.promote_types(logits.dtype, gap.dtype)
            return reference.r_softmax(logits.to(wide), radix, cardinality)
        attention = softmax(logits)
        if not isinstance(attention, Tensor):
            raise TypeError(f"attention: expected a tensor, got {type(attention).__name__}")
        if attention.numel() != logits.numel():
            raise ValueError(
                f"attention: expected {x.shape[1]} numbers for each of {x.shape[0]} samples, got "
                f"shape {tuple(attention.shape)}"
            )
        return attention.reshape(x.shape[0], radix, -1, 1, 1)

    if chosen == "reference":
        z = reference.prologue(x, bn0, relu, training)
        return reference.attend(z, attention_of, radix)
    batch_stats = bn0 is not None and bn0.uses_batch_stats(training)
    relu = relu or bn0 is not None
    out, statistics = autograd.attend(
        chosen, MapArguments(x, relu, radix), attention_of, bn0, batch_stats
    )
    _update(chosen, x, (bn0, statistics))
    return out


def _spans_processes(bn: BatchNormArgs | None, batch_stats: bool) -> bool:
    return batch_stats and bn is not None and bn.process_group is not None


_Norm = tuple[BatchNormArgs | None, autograd.Statistics | None]


def _update(
    backend: str,
    x: Tensor,
    of_bn0: _Norm,
    of_bn1: _Norm = (None, None),
    op_updates: bool | None = None,
) -> None:
    """Let the norms' running statistics take in the batch's, where there are both.

    ``op_updates``: whether the op can do so for both, where that is known already.
    """
    norms = of_bn0, of_bn1
    if of_bn0[1] is None and of_bn1[1] is None:
        return
    if op_updates is None:
        op_updates = all(statistics is None or _op_updates(x, bn) for bn, statistics in norms)
    if op_updates:
        # Detached: an exported program records the op, but not that autograd skips it.
        kernels(backend).update_running_statistics(
            x.detach(), *_running(*of_bn0), *_running(*of_bn1)
        )
        return
    for bn, statistics in norms:
        if bn is not None and statistics is not None:
            reference.update_running_statistics(bn, *statistics)


def _op_updates(x: Tensor, bn: BatchNormArgs | None) -> bool:
    """Whether the op can update the norm's running statistics, if they fit."""
    if bn is None or bn.process_group is not None:
        return False
    if (bn.running_mean is None) != (bn.running_var is None):
        return False
    if bn.momentum is not None and type(bn.momentum) is not float:
        return False  # maybe a tensor, which an op would accept
    counter, device = bn.num_batches_tracked, x.device
    for tensor in (bn.running_mean, bn.running_var, counter):
        if tensor is not None and not (tensor.is_contiguous() and tensor.device == device):
            return False
    return counter is None or counter.dtype == torch.int64


def _running(
    bn: BatchNormArgs | None, statistics: autograd.Statistics | None
) -> RunningArguments | tuple[Any, ...]:
    if bn is None or statistics is None:
        return NOTHING_RUNS
    if bn.running_mean is None:
        return NOTHING_RUNS._replace(num_batches_tracked=bn.num_batches_tracked)
    return (
        bn.running_mean,
        bn.running_var,
        bn.num_batches_tracked,
        statistics.mean.detach(),
        statistics.var.detach(),
        bn.momentum,
    )


def _check_bn0(x: Tensor, bn0: BatchNormArgs | None, training: bool) -> None:
    if bn0 is not None:
        batch, features, height, width = x.shape
        _check_norm("bn0", bn0, batch * height * width, features, x, training)


def _check(
    x: Tensor,
    radix: int,
    fc_args: tuple[Any, ...],
    bn0: BatchNormArgs | None,
    bn1: BatchNormArgs | None,
    training: bool,
) -> None:
    fcs = FcArguments(*fc_args)
    check_map(x, radix, fcs.cardinality)
    check_fcs(x, radix, fcs)
    _check_bn0(x, bn0, training)
    if bn1 is not None:
        # Not fcs.inter: Dynamo of torch 2.10 knows no properties of named tuples.
        _check_norm("bn1", bn1, x.shape[0], fcs.fc1_weight.shape[0], x, training)


def _check_norm(
    name: str, bn: BatchNormArgs, elements: int, features: int, x: Tensor, training: bool
) -> None:
    # Not by its class: a second import of the package makes a second BatchNormArgs.
    if not hasattr(bn, "uses_batch_stats"):
        raise TypeError(f"{name}: expected BatchNormArgs or None, got {type(bn).__name__}")
    fields = ("weight", "bias", "running_mean", "running_var")
    tensors = {field: getattr(bn, field) for field in fields}
    batch_stats = bn.uses_batch_stats(training)
    # Other processes have more elements.
    count = elements if bn.process_group is None else 0
    check_norm(name, tensors, bn.eps, batch_stats, count, features, x)
    if not batch_stats:
        return
    check_counter(f"{name}.num_batches_tracked", bn.num_batches_tracked, x)
    for field in fields[2:]:
        tensor = tensors[field]
        if tensor is not None and features > 1 and 0 in tensor.stride():
            raise ValueError(
                f"{name}.{field}: expected memory for each feature, got an expanded one"
            )
    if bn.running_mean is not None and (bn.momentum is not None or bn.num_batches_tracked is None):
        check_number(f"{name}.momentum", bn.momentum)
