"""Swap the split-attention modules of a model for fused ones, in place, and back.

A module is fused by giving the instance another class, whose forward runs the convolution and then
the fused op for all that follows. The object itself, its children, parameters, hooks and state_dict
stay what they were. A peer's fused class derives from the peer's own, so ``isinstance`` holds.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnest_fused import fold as folding
from resnest_fused import proof
from resnest_fused.backends import check_name
from resnest_fused.children import own_method
from resnest_fused.modules import (
    FusedModule,
    FusedSplitAttention,
    FusedSplitAttentionConv2d,
    fused_attention,
)


class FuseEntry(NamedTuple):
    """What :func:`fuse` did with one module.

    Attributes:
        name: the module's name in the model; "" for the model itself.
        kind: the module's original class, as ``package.module.Class``.
        fused: whether the module is fused now.
        reason: why it was left alone, or that it already was fused; None for newly fused. With
            ``fold`` also which norm could not be folded, and why.
        folded: whether it has a norm that is folded now.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None
    folded: bool = False


@dataclass(frozen=True)
class FuseReport:
    """Every split-attention module of a model and what became of it, in the model's order.

    ``len(report)`` is the number of fused modules, so a report is true when there is one.
    ``str(report)`` has a line for each module.

    Attributes:
        entries: one for each module.
        folded_norms: the batch normalisations that are folded now, in the whole model.
    """

    entries: tuple[FuseEntry, ...]
    folded_norms: int = 0

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
        if self.folded_norms:
            lines[0] += f"; {self.folded_norms} batch normalisations folded"
        for title, entries in groups.items():
            for name, kind, _, reason, folded in entries:
                what = f"{title} and folded" if folded else title
                line = f"{what}: {name or '(the model itself)'}, {kind}"
                lines.append(line if reason is None else f"{line}: {reason}")
        return "\n".join(lines)


def fuse(
    model: nn.Module, *, backend: str = "auto", fold: bool = False, verify: bool = False
) -> FuseReport:
    """Fuse every split-attention module of ``model`` that can be, in place.

    Known are our own ``SplitAttention`` and ``SplitAttentionConv2d``, ``SplAtConv2d`` of the
    official ``resnest`` package and ``SplitAttn`` of timm; the model itself may be one of them.
    Results, parameters, state_dict, hooks and ``isinstance`` stay the same, and deepcopy and pickle
    work. A module whose result would change is left alone, and the report says why.

    Everything after the convolution becomes one op where ``bn0`` is a batch normalisation and the
    activations are ReLU. Other norms, activations and softmaxes, an active DropBlock, and children
    that are hooked or patched, now or later, are called as before, and the op does the rest; while
    hooks for all modules are registered every child is called. Functions of
    ``torch.nn.functional`` that somebody replaced are not seen.

    Two things differ in a fused module. The output keeps the feature map's memory format, where
    peers force NCHW, and its dtype, where peers give float32 under CUDA's autocast.
    ``torch.jit.script``, and loading a pickle where this package is missing, need :func:`unfuse`
    first.

    Args:
        model: any module, wrapped by ``torch.compile`` or ``DataParallel`` or not.
        backend: as in :func:`resnest_fused.split_attention`, for every module that this function
            fuses now or fused before. Modules built fused keep their own.
        fold: for inference, of a model in eval mode: also fold each fused module's ``bn0`` into its
            convolution and ``bn1`` into ``fc1``, and what else of batch normalisation stands behind
            a convolution, in ResNeSt's blocks and in every ``nn.Sequential``. The state_dict then
            holds the folded weights instead, without gradients, and a call in training mode raises;
            :func:`unfuse` brings back the original layers.
        verify: try every module that would be fused now first, as it is and fused, in float64 on
            synthetic inputs (some time and memory, but the model stays as it is); one that would
            compute something else is left alone, and the report says by how much it differs.
            Folding comes after that; :func:`resnest_fused.verify` looks at both, on real inputs.

    Returns:
        The report, one entry for each module; a module used in several places is reported once.

    Raises:
        TypeError: when ``model`` is not a module.
        ValueError: when there is no such backend, or ``fold`` is asked of a module in training
            mode. The model is then untouched.
    """
    check_name(backend, "backend")
    found = [(module, _examine(name, module)) for name, module in _named_modules(model)]
    if verify:
        found = [(module, _tried(module, entry, backend)) for module, entry in found]
    if fold and any(module.training for module in model.modules()):
        raise ValueError("fold: expected a model in eval mode throughout; call model.eval() first")
    entries = []
    for module, entry in found:
        if entry is None:
            continue
        if entry.fused and entry.reason is None:
            original = _core(type(module))
            module.__class__ = _over(type(module), _fused_class(original))
            vars(module)["_unfused_class"] = original
        if _is_swapped(module):
            vars(module)["backend"] = backend
        if entry.fused:
            notes = folding.fold_attention(module) if fold else []
            reason = "; ".join([*([entry.reason] if entry.reason else []), *notes]) or None
            entry = entry._replace(reason=reason, folded=folding.count_folded(module) > 0)
        entries.append(entry)
    if fold:
        folding.fold_network(model)
    return FuseReport(tuple(entries), folding.count_folded(model))


def _tried(module: nn.Module, entry: FuseEntry | None, backend: str) -> FuseEntry | None:
    """The entry, or that of a module left alone as its results would change."""
    if entry is None or not entry.fused or entry.reason is not None:
        return entry
    problem = proof.difference(module, _fused_class(type(module)), backend)
    return entry._replace(fused=problem is None, reason=problem)


def unfuse(model: nn.Module) -> None:
    """Give every module that :func:`fuse` fused its own class back, in place, and unfold its norms.

    Modules built as ``FusedSplitAttention`` or ``FusedSplitAttentionConv2d`` stay fused. The layers
    that folding had replaced come back as they were, on the model's device and in its dtype.

    Raises:
        TypeError: when ``model`` is not a module.
    """
    for _, module in list(_named_modules(model)):
        if _is_swapped(module):
            module.__class__ = _over(type(module), vars(module).pop("_unfused_class"))
            vars(module).pop("backend", None)
    folding.unfold(model)


class _PeerAttention(FusedModule):
    """What the forwards below use; the peer's class that they are mixed into sets it up."""

    radix: int
    conv: nn.Module
    fc1: nn.Conv2d
    fc2: nn.Conv2d
    rsoftmax: Any


class _OfficialForward(_PeerAttention):
    """The fused forward of the official ``SplAtConv2d``."""

    cardinality: int
    use_bn: bool
    dropblock_prob: float
    relu: nn.Module

    def _fused_forward(self, x: Tensor) -> Tensor:
        return fused_attention(
            self.conv(x),
            bn0=self.bn0 if self.use_bn else None,
            drop=self.dropblock if self.dropblock_prob > 0 else None,
            act0=self.relu,
            fc1=self.fc1,
            bn1=self.bn1 if self.use_bn else None,
            act1=self.relu,
            fc2=self.fc2,
            softmax=self.rsoftmax,
            radix=self.radix,
            cardinality=self.cardinality,
            backend=self.backend,
        )


class _TimmForward(_PeerAttention):
    """The fused forward of timm's ``SplitAttn``."""

    def _fused_forward(self, x: Tensor) -> Tensor:
        return fused_attention(
            self.conv(x),
            bn0=self.bn0,
            drop=self.drop,
            act0=self.act0,
            fc1=self.fc1,
            bn1=self.bn1,
            act1=self.act1,
            fc2=self.fc2,
            softmax=self.rsoftmax,
            radix=self.radix,
            # The module has none of its own, and one in the place of its softmax needs none.
            cardinality=getattr(self.rsoftmax, "cardinality", 1),
            backend=self.backend,
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
    body = {"__module__": __name__, "_unfused_forward": staticmethod(original.forward)}
    return type(name, (peer.forward, original), body)


def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    path = _path(original)
    if path in _OURS:
        return _OURS[path]
    return __getattr__(
        next(name for name, peer in _PEERS.items() if path == f"{peer.source}.{peer.name}")
    )


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_wrapper(cls: type) -> bool:
    """Whether ``cls`` is what ``fully_shard`` or ``replicate`` made of a module's class."""
    first = cls.__bases__[0]
    return first.__module__.startswith("torch.distributed.") and not issubclass(first, nn.Module)


def _core(cls: type) -> type:
    """The class that a module had before ``torch.distributed`` wrapped it."""
    return _core(cls.__bases__[1]) if _is_wrapper(cls) else cls


# What _over made, and what it made it from: fuse and unfuse then give back the very class.
_made: dict[tuple[type, type], type] = {}


def _over(cls: type, core: type) -> type:
    """``cls`` with ``core`` at its core instead."""
    if not _is_wrapper(cls):
        return core
    if (cls, core) not in _made:
        wrapper, inner = cls.__bases__
        prefix = cls.__name__.removesuffix(inner.__name__)
        bases = (wrapper, _over(inner, core))
        body = {name: value for name, value in vars(cls).items() if name != "__weakref__"}
        made = type(prefix + bases[1].__name__, bases, body)
        _made[cls, core], _made[made, _core(cls)] = made, cls
    return _made[cls, core]


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model.named_modules()


def _is_swapped(module: nn.Module) -> bool:
    return "_unfused_class" in vars(module)


def unfused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a fused module stands for; None for a module that is not fused."""
    if _is_swapped(module):
        return vars(module)["_unfused_class"]
    # Their own classes come last, behind what fused modules share.
    return type(module).__bases__[-1] if type(module) in _OURS.values() else None


def _examine(name: str, module: nn.Module) -> FuseEntry | None:
    """The entry for one module, before anything is done to it; None when it is something else."""
    if _is_swapped(module):
        return FuseEntry(name, _path(vars(module)["_unfused_class"]), True, "already fused")
    cls = _core(type(module))
    if cls in _OURS.values():
        return FuseEntry(name, _path(cls), True, "already fused, as built")
    known = next((_path(base) for base in cls.__mro__ if _path(base) in _KNOWN), None)
    if known == _path(cls):
        replaced = "forward" in vars(module) or own_method(cls) is None
        reason = "its forward was replaced" if replaced else None
    elif known is not None:
        reason = f"a subclass of {known}, which may compute something else"
    elif re.search("splat|split_?att", cls.__name__, re.IGNORECASE):
        reason = "unknown class"
    else:
        return None
    return FuseEntry(name, _path(cls), reason is None, reason)
