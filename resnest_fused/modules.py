"""The fused modules: drop-in replacements whose parameters and numbers are the reference's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnest_fused.functional import attend, split_attention
from resnest_fused.reference import BatchNormArgs, SplitAttention, SplitAttentionConv2d

# The activation of our own modules, which they have no child for.
RELU = nn.ReLU()


def fused_attention(
    x: Tensor,
    *,
    bn0: Any = None,
    drop: Any = None,
    act0: Any = None,
    fc1: Any,
    bn1: Any,
    act1: Any,
    fc2: Any,
    radix: int,
    cardinality: int,
    backend: str,
) -> Tensor:
    """act0(drop(bn0(x))), then split attention with fc2(act1(bn1(fc1(gap)))), by the fused op.

    The modules' parameters go into the op wherever it computes what they do: a batch normalisation
    and a ReLU in front, and 1x1 convolutions with batch normalisation and ReLU between them. Any
    other module, and one with hooks, is called; the map is then still read and written as often.

    Args:
        x: ``(B, radix*channels, H, W)``.
        bn0, drop, act0: what is to be applied to x first; None for what there is none of.
        fc1, bn1, act1, fc2: the map from gap ``(B, channels, 1, 1)`` to logits; bn1 may be None.
        radix, cardinality, backend: as in :func:`resnest_fused.split_attention`.
    """
    relu = _is_relu(act0)
    norm0 = batch_norm_args(bn0) if relu and _is_nothing(drop) else None
    if norm0 is None:
        for module in (bn0, drop, None if relu else act0):
            if module is not None:
                x = module(x)
    norm1 = batch_norm_args(bn1)
    if (
        (norm1 is not None or _is_nothing(bn1))
        and _is_relu(act1)
        and _is_pointwise(fc1, cardinality)
        and _is_pointwise(fc2, cardinality)
    ):
        out = split_attention(
            x,
            _tensor(fc1, "weight"),
            _tensor(fc1, "bias"),
            _tensor(fc2, "weight"),
            _tensor(fc2, "bias"),
            radix=radix,
            cardinality=cardinality,
            bn0=norm0,
            bn1=norm1,
            relu=relu,
            backend=backend,
        )
    else:
        norm1 = None  # its module counts for itself

        def mlp(gap: Tensor) -> Tensor:
            hidden = fc1(_as_input(gap, x, fc1))
            if bn1 is not None:
                hidden = bn1(hidden)
            return fc2(act1(hidden))

        out = attend(
            x,
            mlp,
            radix=radix,
            cardinality=cardinality,
            bn0=norm0,
            relu=relu,
            backend=backend,
        )
    # After the call, so that a call that raises leaves the counts as they were.
    for bn, norm in ((bn0, norm0), (bn1, norm1)):
        if norm is not None and norm.batch_stats and _counts_batches(bn):
            bn.num_batches_tracked.add_(1)
    return out


def _as_input(gap: Tensor, x: Tensor, fc1: nn.Module) -> Tensor:
    """gap in the dtype that fc1 computes in; autocast casts for itself."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return gap
    parameter = next(fc1.parameters(), None)
    return gap.to(x.dtype if parameter is None else parameter.dtype)


def intercepted(module: Any) -> str | None:
    """What would be lost if ``module`` were not called, or None."""
    state = vars(module)
    if "forward" in state:
        return "its forward was replaced"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "it has hooks"
    return None


class FoldedNorm(nn.Identity):
    """In a norm's place when it has been folded into the convolution in front of it.

    Attributes:
        originals: the convolution and the norm, as they were; no part of this module's state.
        place: the parent of the convolution and its name there.
        dtype: of the convolution when it was folded.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, parent: nn.Module, name: str) -> None:
        super().__init__()
        # In tuples, as modules that were attributes would become children.
        self.originals = (conv, norm)
        self.place = (parent, name)
        self.dtype = conv.weight.dtype
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """x; in training mode an error, as there are no statistics to follow."""
        if self.training:
            raise RuntimeError(
                "this module's batch normalisation is folded for inference: "
                "call resnest_fused.unfuse before training"
            )
        return x


def _is_nothing(module: Any) -> bool:
    if type(module) is FoldedNorm:
        return not module.training  # where it is called, and raises
    return module is None or (type(module) is nn.Identity and intercepted(module) is None)


def _is_relu(module: Any) -> bool:
    return module is RELU or (type(module) is nn.ReLU and intercepted(module) is None)


def computes_as_conv(kind: type) -> bool:
    # A parametrized one does: reading its weight computes it, and that is all a call would do.
    return kind is nn.Conv2d or (
        issubclass(kind, nn.Conv2d)
        and kind.forward is nn.Conv2d.forward
        and kind._conv_forward is nn.Conv2d._conv_forward
    )


def _is_pointwise(fc: Any, cardinality: int) -> bool:
    return (
        computes_as_conv(type(fc))
        and fc.kernel_size == (1, 1)
        and fc.padding == (0, 0)
        and fc.groups == cardinality
        and intercepted(fc) is None
    )


def _norm_kind(kind: type) -> str | None:
    """Which batch normalisation a class computes: "plain", "sync", "frozen", or None for none."""
    if kind is nn.BatchNorm2d:
        return "plain"
    if issubclass(kind, nn.BatchNorm2d) and kind.forward is nn.BatchNorm2d.forward:
        return "plain"
    if issubclass(kind, nn.SyncBatchNorm) and kind.forward is nn.SyncBatchNorm.forward:
        return "sync"
    # torchvision's and detectron2's, whose weight and bias are buffers too.
    return "frozen" if kind.__name__ == "FrozenBatchNorm2d" else None


def _tensor(module: nn.Module, name: str) -> Any:
    """``module.name`` without the cost of ``nn.Module.__getattr__`` where it is a parameter."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _counts_batches(bn: Any) -> bool:
    return bn.training and bn.track_running_stats and bn.num_batches_tracked is not None


def batch_norm_args(bn: Any) -> BatchNormArgs | None:
    """The batch normalisation that ``bn`` computes in its present mode, or None to call it."""
    kind = None if bn is None else _norm_kind(type(bn))
    if kind is None or intercepted(bn) is not None:
        return None
    buffers = bn._buffers
    if kind == "frozen":
        if not isinstance(getattr(bn, "eps", None), float):
            return None
        statistics = buffers["running_mean"], buffers["running_var"]
        return BatchNormArgs(bn.weight, bn.bias, *statistics, eps=bn.eps, batch_stats=False)
    training = bn.training
    # Without tracking, running statistics neither take part nor change while training.
    running = not training or bn.track_running_stats
    mean = buffers["running_mean"] if running else None
    if bn.momentum is not None:
        momentum = bn.momentum
    elif _counts_batches(bn):
        momentum = 1.0 / (float(bn.num_batches_tracked) + 1.0)  # a cumulative average
    else:
        momentum = 0.0
    return BatchNormArgs(
        _tensor(bn, "weight"),
        _tensor(bn, "bias"),
        mean,
        buffers["running_var"] if running else None,
        momentum,
        bn.eps,
        training or mean is None,
        _process_group(bn) if kind == "sync" and training else None,
    )


def _process_group(bn: nn.SyncBatchNorm) -> str | None:
    """The name of the group whose processes share ``bn``'s statistics; None for this one alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group: Any = bn.process_group or distributed.group.WORLD
    return group.group_name if distributed.get_world_size(group) > 1 else None


class FusedSplitAttention(SplitAttention):
    """:class:`SplitAttention` by one fused op: same arguments, state_dict and results.

    ``(B, radix*channels, H, W)``, radix-major, to ``(B, channels, H, W)`` in the input's dtype and
    memory format. With ``nn.BatchNorm2d`` (or ``nn.SyncBatchNorm``, a frozen one, or none) as
    ``bn1``, the modules ``fc1``, ``bn1`` and ``fc2`` are not called but for their hooks' sake; any
    other norm is.

    Raises:
        ValueError, TypeError: as :func:`resnest_fused.split_attention`.
    """

    backend: str = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """``(B, radix*channels, H, W)`` to ``(B, channels, H, W)``."""
        modules = self._modules
        return fused_attention(
            x,
            fc1=modules["fc1"],
            bn1=self.bn1,
            act1=RELU,
            fc2=modules["fc2"],
            radix=self.radix,
            cardinality=self.cardinality,
            backend=self.backend,
        )


class FusedSplitAttentionConv2d(SplitAttentionConv2d):
    """:class:`SplitAttentionConv2d` in two steps: the convolution, and one op for all after it.

    Same arguments, state_dict and results. With ``nn.BatchNorm2d`` (or ``nn.SyncBatchNorm``, or a
    frozen one) as ``bn0``, its output and the ReLU's are never stored; saved for backward are the
    convolution's output and a few numbers per sample and channel. See :class:`FusedSplitAttention`.
    """

    backend: str = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, channels, H', W')``."""
        return fused_attention(
            self.conv(x),
            bn0=self.bn0,
            act0=RELU,
            fc1=self.fc1,
            bn1=self.bn1,
            act1=RELU,
            fc2=self.fc2,
            radix=self.radix,
            cardinality=self.cardinality,
            backend=self.backend,
        )
