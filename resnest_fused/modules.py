"""The fused modules; they have the same parameters and results as the unfused ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from resnest_fused.children import (
    RELU,
    batch_norm_args,
    calls_are_watched,
    has_child,
    intercepted,
    is_folded,
    is_nothing,
    is_pointwise,
    is_r_softmax,
    is_relu,
    tensor_of,
    weight_of,
)
from resnest_fused.functional import attend, split_attention
from resnest_fused.layout import Layout, Other, read
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
        x: ``(B, radix*channels, *size)``, a map of one, two or three dimensions.
        bn0, drop, act0: modules that are applied to x first, or None. If act0 is a child of bn0, so
            is drop, and bn0 calls both.
        fc1, bn1, act1, fc2: the map from gap ``(B, channels, 1, 1)`` to logits; bn1 and act1 may be
            None. There are as many ones as the map has dimensions, and none for linear layers.
        softmax: from logits to attention, radix-major; None for the r-softmax.
        radix, cardinality, backend: as in :func:`resnest_fused.split_attention`.
    """
    absorbs = not calls_are_watched()
    relu = act0 is RELU or (absorbs and is_relu(act0))
    activated = isinstance(act0, nn.Module) and bn0 is not None and has_child(bn0, act0)
    norm0 = batch_norm_args(bn0, activated) if absorbs and relu and is_nothing(drop) else None
    # Of a folded norm that calls its children, a ReLU is left for the op.
    if norm0 is None and not (activated and relu and is_nothing(drop) and is_folded(bn0)):
        relu = relu and not activated
        for module in (bn0,) if activated else (bn0, drop, None if relu else act0):
            if module is not None:
                x = module(x)
    size = None
    if isinstance(x, Tensor) and x.dim() in (3, 5) and not isinstance(fc1, nn.Conv2d):
        size = x.shape[2:]  # the op's maps have two dimensions, so these are folded into two
        x = x[:, :, None] if x.dim() == 3 else x.flatten(3)
    norm1 = batch_norm_args(bn1) if absorbs else None
    if (
        absorbs
        and softmax is None
        and (norm1 is not None or is_nothing(bn1))
        and is_relu(act1)
        and is_pointwise(fc1, cardinality)
        and is_pointwise(fc2, cardinality)
    ):
        out = split_attention(
            x,
            weight_of(fc1),
            tensor_of(fc1, "bias"),
            weight_of(fc2),
            tensor_of(fc2, "bias"),
            radix=radix,
            cardinality=cardinality,
            bn0=norm0,
            bn1=norm1,
            relu=relu,
            backend=backend,
        )
        return out if size is None else out.reshape(*out.shape[:2], *size)

    def mlp(gap: Tensor) -> Tensor:
        hidden = fc1(_as_input(gap, x, fc1, 2 if size is None else len(size)))
        if bn1 is not None:
            hidden = bn1(hidden)
        logits = fc2(hidden if act1 is None else act1(hidden))
        return logits if logits.dim() == 4 else logits.reshape(*logits.shape[:2], 1, 1)

    def own_softmax(logits: Tensor) -> Tensor:
        return softmax(
            logits if size is None else logits.reshape(*logits.shape[:2], *[1] * len(size))
        )

    out = attend(
        x,
        mlp,
        None if softmax is None else own_softmax,
        radix=radix,
        cardinality=cardinality,
        bn0=norm0,
        relu=relu,
        backend=backend,
    )
    return out if size is None else out.reshape(*out.shape[:2], *size)


def _as_input(gap: Tensor, x: Tensor, fc1: nn.Module, dimensions: int) -> Tensor:
    """gap in fc1's shape and dtype; under autocast in its own dtype, since autocast casts it."""
    if isinstance(fc1, nn.Linear):
        gap = gap.flatten(1)
    elif dimensions != 2:
        gap = gap.reshape(*gap.shape[:2], *[1] * dimensions)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return gap
    parameter = next(fc1.parameters(), None)
    return gap.to(x.dtype if parameter is None else parameter.dtype)


class _Exchanged:
    """Stands for a block while its forward runs: functions take the place of some children."""

    def __init__(self, block: nn.Module, functions: dict[str, Callable[[Tensor], Tensor]]) -> None:
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_functions", functions)

    def __getattr__(self, name: str) -> Any:
        functions, block = vars(self)["_functions"], vars(self)["_block"]
        if name in functions:
            return functions[name]
        found = getattr(block, name)
        # The block's other methods get what is exchanged, too.
        own = type(found) is MethodType and found.__self__ is block
        return partial(found.__func__, self) if own else found  # which the compiler knows

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._block, name, value)

    def __iter__(self) -> Iterator[Any]:
        """A ``Sequential``'s children in order."""
        return (getattr(self, name) for name in self._block._modules)


class FusedModule(nn.Module):
    """The base of every fused module: how it is called, and traced.

    Attributes:
        backend: "auto", "native", "triton" or "reference", as in
            :func:`resnest_fused.split_attention`.
    """

    backend: str = "auto"
    # Each fused class has its own: the unfused class's forward when this class was made, where the
    # parts are, the forwards of the other submodules' classes, and that of the r-softmax that the
    # op may replace.
    _unfused_forward: Callable[..., Any]
    _layout: Layout
    _other_forwards: tuple[Any, ...] = ()
    _r_softmax_forward: Callable[..., Any] | None = None
    # Of a proven module an attribute that has another value than in the proof, or None.
    _changed_attribute: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The unfused module's result; while ``torch.fx`` traces, one node that calls this one."""
        if is_traced(x):
            return as_one_node(self, x)
        unfused = vars(self).get("_unfused_class")
        if unfused is not None and unfused.forward is not self._unfused_forward:
            return unfused.forward(self, x)  # it was replaced after fuse
        at = self._layout
        changed = self._changed_attribute is not None
        if changed or (at.others and self._needs_all(at.others)):
            return self._unfused_forward(self, x)
        if at.within is None:
            return self._fused_attention(self._fused_front(x))
        functions = zip(at.within, (self._fused_front, self._fused_attention), strict=True)
        return self._unfused_forward(_Exchanged(self, dict(functions)), x)

    # The names of these are no peer's, whose class may have methods of its own.

    def _fused_attention(self, x: Tensor) -> Tensor:
        """The op on the map that enters the attention, ``(B, radix*channels, *size)``."""
        at = self._layout
        norms = at.norms_if is None or read(self, at.norms_if)
        drops = at.drop_if is None or read(self, at.drop_if)
        # timm's own softmax alone holds the cardinality, and only with that softmax it is used.
        radix, cardinality = read(self, at.radix), read(self, at.cardinality, 1)
        softmax = read(self, at.softmax)
        if (
            at.r_softmax is not None
            and is_r_softmax(
                softmax,
                at.r_softmax,
                self._r_softmax_forward,
                at.groups_name,
                radix,
                cardinality,
            )
            and not calls_are_watched()
        ):
            softmax = None
        return fused_attention(
            x,
            bn0=read(self, at.bn0) if norms else None,
            drop=read(self, at.drop) if drops else None,
            act0=read(self, at.act0, None),
            fc1=read(self, at.fc1),
            bn1=read(self, at.bn1) if norms else None,
            act1=read(self, at.act1),
            fc2=read(self, at.fc2),
            softmax=softmax,
            radix=radix,
            cardinality=cardinality,
            backend=self.backend,
        )

    def _fused_front(self, x: Tensor) -> Tensor:
        """What the convolution or the paths make of x; x itself where there are none."""
        at = self._layout
        if at.conv is not None:
            return read(self, at.conv)(x)
        if not at.paths:
            return x
        paths = [read(self, path) for path in at.paths]
        divided = at.divided is not None and read(self, at.divided)
        inputs = x.chunk(len(paths), 1) if divided else [x] * len(paths)
        return torch.cat([path(part) for path, part in zip(paths, inputs, strict=True)], 1)

    def _needs_all(self, others: tuple[Other, ...]) -> bool:
        """Whether submodules that the op replaces silently must be called."""
        if calls_are_watched():
            return True
        for (path, kind, children), forward in zip(others, self._other_forwards, strict=True):
            child: Any = read(self, path)
            if path and (
                type(child) is not kind
                or kind.forward is not forward
                or intercepted(child) is not None
            ):
                return True
            if tuple(child._modules) != children:
                return True
        return False

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: call "
            "resnest_fused.unfuse(model) first, or build the model with unfused modules"
        )


class _OwnModule(FusedModule):
    """A module of this package, which has no child for an activation that is a ReLU."""

    act1: nn.Module | None

    @property
    def _act1(self) -> Any:
        return RELU if self.act1 is None else self.act1


class FusedSplitAttention(_OwnModule, SplitAttention):
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
    _layout = Layout(
        fc1=("fc1",),
        bn1=("bn1",),
        act1=("_act1",),
        fc2=("fc2",),
        radix=("radix",),
        cardinality=("cardinality",),
    )


class FusedSplitAttentionConv2d(_OwnModule, SplitAttentionConv2d):
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
    _layout = FusedSplitAttention._layout._replace(
        conv=("conv",), bn0=("bn0",), drop=("drop",), act0=("_act0",)
    )

    @property
    def _act0(self) -> Any:
        return RELU if self.act0 is None else self.act0
