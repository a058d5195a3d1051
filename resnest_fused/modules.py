"""The fused modules; they have the same parameters and results as the unfused ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from resnest_fused.children import (
    RELU,
    batch_norm_args,
    calls_are_watched,
    is_nothing,
    is_pointwise,
    is_r_softmax,
    is_relu,
    tensor_of,
)
from resnest_fused.functional import attend, split_attention
from resnest_fused.reference import SplitAttention, SplitAttentionConv2d
from resnest_fused.tracing import as_one_node, is_traced


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
    softmax: Any = None,
    r_softmaxes: tuple[str, ...] = (),
    radix: int,
    cardinality: int,
    backend: str,
) -> Tensor:
    """act0(drop(bn0(x))), then split attention with fc2(act1(bn1(fc1(gap)))), by the fused op.

    The op replaces these modules: a batch normalisation and a ReLU in front, 1x1 convolutions with
    batch normalisation and ReLU between them, and an r-softmax. It takes their parameters. Any
    other module is called, and so is one with hooks. While global module hooks are registered, all
    modules are called. The number of reads and writes of the map stays the same.

    Args:
        x: ``(B, radix*channels, H, W)``.
        bn0, drop, act0: modules that are applied to x first, or None.
        fc1, bn1, act1, fc2: the map from gap ``(B, channels, 1, 1)`` to logits; bn1 may be None.
        softmax: from logits to attention, radix-major; None for the r-softmax.
        r_softmaxes: the peer's classes of r-softmax, as ``package.module.Class``.
        radix, cardinality, backend: as in :func:`resnest_fused.split_attention`.
    """
    absorbs = not calls_are_watched()
    relu = act0 is RELU or (absorbs and is_relu(act0))
    norm0 = batch_norm_args(bn0) if absorbs and relu and is_nothing(drop) else None
    if norm0 is None:
        for module in (bn0, drop, None if relu else act0):
            if module is not None:
                x = module(x)
    if absorbs and softmax is not None and is_r_softmax(softmax, r_softmaxes, radix, cardinality):
        softmax = None
    norm1 = batch_norm_args(bn1) if absorbs else None
    if (
        absorbs
        and softmax is None
        and (norm1 is not None or is_nothing(bn1))
        and is_relu(act1)
        and is_pointwise(fc1, cardinality)
        and is_pointwise(fc2, cardinality)
    ):
        return split_attention(
            x,
            tensor_of(fc1, "weight"),
            tensor_of(fc1, "bias"),
            tensor_of(fc2, "weight"),
            tensor_of(fc2, "bias"),
            radix=radix,
            cardinality=cardinality,
            bn0=norm0,
            bn1=norm1,
            relu=relu,
            backend=backend,
        )

    def mlp(gap: Tensor) -> Tensor:
        hidden = fc1(_as_input(gap, x, fc1))
        if bn1 is not None:
            hidden = bn1(hidden)
        return fc2(act1(hidden))

    return attend(
        x,
        mlp,
        softmax,
        radix=radix,
        cardinality=cardinality,
        bn0=norm0,
        relu=relu,
        backend=backend,
    )


def _as_input(gap: Tensor, x: Tensor, fc1: nn.Module) -> Tensor:
    """gap in fc1's dtype; under autocast unchanged, since autocast casts it."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return gap
    parameter = next(fc1.parameters(), None)
    return gap.to(x.dtype if parameter is None else parameter.dtype)


class FusedModule(nn.Module):
    """The base of every fused module: how it is called, and traced.

    Attributes:
        backend: "auto", "native", "triton" or "reference", as in
            :func:`resnest_fused.split_attention`.
    """

    backend: str = "auto"
    # The unfused class's forward when this class was made; each fused class has its own.
    _unfused_forward: Callable[..., Any]

    def forward(self, x: Tensor) -> Tensor:
        """The unfused module's result; while ``torch.fx`` traces, one node that calls this one."""
        if is_traced(x):
            return as_one_node(self, x)
        unfused = vars(self).get("_unfused_class")
        if unfused is not None and unfused.forward is not self._unfused_forward:
            return unfused.forward(self, x)  # it was replaced after fuse
        return self._fused_forward(x)

    def _fused_forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: call "
            "resnest_fused.unfuse(model) first, or build the model with unfused modules"
        )


class FusedSplitAttention(FusedModule, SplitAttention):
    """:class:`SplitAttention` by one fused op, with the same arguments, state_dict and results.

    ::

        attention = rf.FusedSplitAttention(channels=64, radix=2)
        out = attention(torch.randn(8, 128, 56, 56))  # (8, 64, 56, 56)

    The input is ``(B, radix*channels, H, W)``, radix-major. The output is ``(B, channels, H, W)``
    in the input's dtype and memory format. ``bn1`` is ``nn.BatchNorm2d``, ``nn.SyncBatchNorm``, a
    frozen batch normalisation or None: then ``fc1``, ``bn1`` and ``fc2`` are called only if they
    have hooks. Any other norm is always called. The equations are in :class:`SplitAttention`.

    Raises:
        ValueError, TypeError: as :func:`resnest_fused.split_attention`.
    """

    _unfused_forward = staticmethod(SplitAttention.forward)

    def _fused_forward(self, x: Tensor) -> Tensor:
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


class FusedSplitAttentionConv2d(FusedModule, SplitAttentionConv2d):
    """:class:`SplitAttentionConv2d` in two steps: the convolution, and one op for the rest.

    ::

        block = rf.FusedSplitAttentionConv2d(64, 64, kernel_size=3, padding=1)
        out = block(torch.randn(8, 64, 56, 56))  # (8, 64, 56, 56)

    Arguments, state_dict and results are the same. If ``bn0`` is ``nn.BatchNorm2d``,
    ``nn.SyncBatchNorm`` or frozen, its output and the ReLU's are never stored. The backward pass
    needs the convolution's output and a few numbers per sample and channel. See
    :class:`FusedSplitAttention`.
    """

    _unfused_forward = staticmethod(SplitAttentionConv2d.forward)

    def _fused_forward(self, x: Tensor) -> Tensor:
        return fused_attention(
            self.conv(x),
            bn0=self.bn0,
            drop=self.drop,
            act0=RELU if self.act0 is None else self.act0,
            fc1=self.fc1,
            bn1=self.bn1,
            act1=RELU if self.act1 is None else self.act1,
            fc2=self.fc2,
            radix=self.radix,
            cardinality=self.cardinality,
            backend=self.backend,
        )
