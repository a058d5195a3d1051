"""Swap the split-attention modules of a model for fused ones, in place, and back.

A module is fused by giving the instance another class, whose forward runs conv, bn0 and activation
as before and then the fused op. The object itself, its children, parameters, hooks and state_dict
stay what they were. A peer's fused class derives from the peer's own, so ``isinstance`` holds.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from resnest_fused.backends import check_name
from resnest_fused.modules import (
    FusedSplitAttention,
    FusedSplitAttentionConv2d,
    fused_attention,
    unsupported_norm,
)


class FuseEntry(NamedTuple):
    """What :func:`fuse` did with one module.

    Attributes:
        name: the module's name in the model; "" for the model itself.
        kind: the module's original class, as ``package.module.Class``.
        fused: whether the module is fused now.
        reason: why it was left alone, or that it already was fused; None for newly fused.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None


@dataclass(frozen=True)
class FuseReport:
    """Every split-attention module of a model and what became of it, in the model's order.

    ``len(report)`` is the number of fused modules, so a report is true when there is one.
    ``str(report)`` has a line for each module.
    """

    entries: tuple[FuseEntry, ...]

    @property
    def fused(self) -> tuple[FuseEntry, ...]:
        """The modules that are fused now."""
        return tuple(entry for entry in self.entries if entry.fused)

    @property
    def left_alone(self) -> tuple[FuseEntry, ...]:
        """The modules that were left as they are, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.fused)

    def __len__(self) -> int:
        return len(self.fused)

    def __str__(self) -> str:
        if not self.entries:
            return f"no split-attention module found; known are {', '.join(_KNOWN)}"
        groups = {"fused": self.fused, "left alone": self.left_alone}
        lines = [", ".join(f"{len(entries)} {title}" for title, entries in groups.items())]
        for title, entries in groups.items():
            for name, kind, _, reason in entries:
                line = f"{title}: {name or '(the model itself)'}, {kind}"
                lines.append(line if reason is None else f"{line}: {reason}")
        return "\n".join(lines)


def fuse(model: nn.Module, *, backend: str = "auto") -> FuseReport:
    """Fuse every split-attention module of ``model`` that can be, in place.

    Known are our own ``SplitAttention`` and ``SplitAttentionConv2d``, ``SplAtConv2d`` of the
    official ``resnest`` package and ``SplitAttn`` of timm; the model itself may be one of them.
    Results, parameters, state_dict, hooks and ``isinstance`` stay the same, and deepcopy and pickle
    work. A module whose result would change is left alone, and the report says why.

    Three things differ in a fused module. ``fc1``, ``bn1``, ``fc2``, the activation between them
    and the softmax are not called, so hooks put on them later do not run. The output keeps the
    feature map's memory format, where peers force NCHW, and its dtype, where peers give float32
    under CUDA's autocast. ``torch.jit.script``, and loading a pickle where this package is missing,
    need :func:`unfuse` first.

    Args:
        model: any module, wrapped by ``torch.compile`` or ``DataParallel`` or not.
        backend: as in :func:`resnest_fused.split_attention`, for every module that this function
            fuses now or fused before. Modules built fused keep their own.

    Returns:
        The report, one entry for each module; a module used in several places is reported once.

    Raises:
        TypeError: when ``model`` is not a module.
        ValueError: when there is no such backend. The model is then untouched.
    """
    check_name(backend, "backend")
    found = [(module, _examine(name, module)) for name, module in _named_modules(model)]
    for module, entry in found:
        if entry is not None and entry.fused and entry.reason is None:
            original = type(module)
            module.__class__ = _fused_class(original)
            vars(module)["_unfused_class"] = original
        if _is_swapped(module):
            vars(module)["backend"] = backend
    return FuseReport(tuple(entry for _, entry in found if entry is not None))


def unfuse(model: nn.Module) -> None:
    """Give every module that :func:`fuse` fused its own class back, in place.

    Modules built as ``FusedSplitAttention`` or ``FusedSplitAttentionConv2d`` stay fused.

    Raises:
        TypeError: when ``model`` is not a module.
    """
    for _, module in _named_modules(model):
        if _is_swapped(module):
            module.__class__ = vars(module).pop("_unfused_class")
            vars(module).pop("backend", None)


class _PeerAttention(nn.Module):
    """What the forwards below use; the peer's class that they are mixed into sets it up."""

    backend: str = "auto"
    radix: int
    conv: nn.Module
    bn0: nn.Module
    fc1: nn.Conv2d
    bn1: nn.Module
    fc2: nn.Conv2d


class _OfficialForward(_PeerAttention):
    """The fused forward of the official ``SplAtConv2d``."""

    use_bn: bool
    relu: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, channels, H', W')``."""
        x = self.conv(x)
        if self.use_bn:
            x = self.bn0(x)
        x = self.relu(x)
        bn1 = self.bn1 if self.use_bn else None
        return fused_attention(
            x, self.fc1, bn1, self.fc2, self.radix, self.fc1.groups, self.backend
        )


class _TimmForward(_PeerAttention):
    """The fused forward of timm's ``SplitAttn``."""

    drop: nn.Module
    act0: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H', W')``."""
        x = self.act0(self.drop(self.bn0(self.conv(x))))
        return fused_attention(
            x, self.fc1, self.bn1, self.fc2, self.radix, self.fc1.groups, self.backend
        )


_OURS: dict[str, type[nn.Module]] = {
    "resnest_fused.reference.SplitAttention": FusedSplitAttention,
    "resnest_fused.reference.SplitAttentionConv2d": FusedSplitAttentionConv2d,
}


class _Peer(NamedTuple):
    source: str
    name: str
    forward: type[_PeerAttention]


# Keyed by the name of the fused class, which __getattr__ makes when it is first asked for.
_PEERS = {
    "FusedSplAtConv2d": _Peer("resnest.torch.splat", "SplAtConv2d", _OfficialForward),
    "FusedModelsSplAtConv2d": _Peer("resnest.torch.models.splat", "SplAtConv2d", _OfficialForward),
    "FusedSplitAttn": _Peer("timm.layers.split_attn", "SplitAttn", _TimmForward),
}
_KNOWN = (*_OURS, *(f"{peer.source}.{peer.name}" for peer in _PEERS.values()))


@functools.cache
def __getattr__(name: str) -> type[nn.Module]:
    """The fused class of a peer's: a module attribute, as a pickle must find it by its name."""
    if name not in _PEERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    peer = _PEERS[name]
    original = getattr(importlib.import_module(peer.source), peer.name)
    return type(name, (peer.forward, original), {"__module__": __name__})


def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    path = _path(original)
    if path in _OURS:
        return _OURS[path]
    return __getattr__(
        next(name for name, peer in _PEERS.items() if path == f"{peer.source}.{peer.name}")
    )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model.named_modules()


def _is_swapped(module: nn.Module) -> bool:
    return "_unfused_class" in vars(module)


def _examine(name: str, module: nn.Module) -> FuseEntry | None:
    """The entry for one module, before anything is done to it; None when it is something else."""
    cls = type(module)
    if _is_swapped(module):
        return FuseEntry(name, _path(vars(module)["_unfused_class"]), True, "already fused")
    if cls in _OURS.values():
        return FuseEntry(name, _path(cls), True, "already fused, as built")
    known = next((_path(base) for base in cls.__mro__ if _path(base) in _KNOWN), None)
    if known == _path(cls):
        reason = _obstacle(module)
    elif known is not None:
        reason = f"a subclass of {known}, which may compute something else"
    elif re.search("splat|split_?att", cls.__name__, re.IGNORECASE):
        reason = "unknown class"
    else:
        return None
    return FuseEntry(name, _path(cls), reason is None, reason)


def _obstacle(module: nn.Module) -> str | None:
    """Why ``module``, of a known class, would not compute the same when fused, or None."""
    if "forward" in vars(module) or type(module).forward.__module__ != type(module).__module__:
        return "its forward was replaced"
    if getattr(module, "dropblock_prob", 0) > 0:
        return "dropblock is active"
    drop = getattr(module, "drop", None)
    if not isinstance(drop, nn.Identity | None):
        return f"drop is active: {type(drop).__name__}"
    # Children that are no longer called, under the names of every known class.
    children = module._modules
    softmax = children.get("rsoftmax")
    cardinality = getattr(module if softmax is None else softmax, "cardinality", None)
    problems = {
        "rsoftmax": _unsupported_softmax(softmax, module),
        "fc1": _unsupported_fc(children.get("fc1"), cardinality),
        "bn1": unsupported_norm(children.get("bn1")),
        "relu": _unsupported_activation(children.get("relu")),
        "act1": _unsupported_activation(children.get("act1")),
        "fc2": _unsupported_fc(children.get("fc2"), cardinality),
    }
    for name, problem in problems.items():
        problem = problem or _intercepted(children.get(name))
        if problem is not None:
            return f"{name}: {problem}"
    return None


def _unsupported_fc(fc: nn.Module | None, cardinality: int | None) -> str | None:
    # A parametrized one passes: reading its weight computes it, and that is all a call would do.
    if (
        not isinstance(fc, nn.Conv2d)
        or type(fc).forward is not nn.Conv2d.forward
        or type(fc)._conv_forward is not nn.Conv2d._conv_forward
    ):
        return f"expected a plain Conv2d, got {type(fc).__name__}"
    found = (fc.kernel_size, fc.stride, fc.padding, fc.groups)
    expected = ((1, 1), (1, 1), (0, 0), cardinality)
    if found != expected:
        return f"expected kernel_size, stride, padding and groups {expected}, got {found}"
    return None


def _unsupported_activation(activation: nn.Module | None) -> str | None:
    if activation is None or type(activation) is nn.ReLU:
        return None
    return f"expected ReLU between the FCs, got {type(activation).__name__}"


def _unsupported_softmax(softmax: nn.Module | None, module: nn.Module) -> str | None:
    if softmax is None or type(softmax).__module__ == type(module).__module__:
        return None
    return f"expected the r-softmax of {type(module).__module__}, got {type(softmax).__name__}"


def _intercepted(child: nn.Module | None) -> str | None:
    """What would be lost when ``child`` is no longer called, or None."""
    if child is None:
        return None
    if "forward" in vars(child):
        return "its forward was replaced"
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    if any(vars(child).get(kind) for kind in hooks):
        return "it has hooks, which would no longer run"
    return None
