"""Finds where a module keeps the parts of a split attention, by their names or as registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from resnest_fused.children import RELU, is_found_at, path_of
from resnest_fused.fusing import registry
from resnest_fused.fusing.wrapping import core
from resnest_fused.layout import Layout, Path, read

# The names that implementations give the parts, the commonest first.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "conv": ("conv",),
    "bn0": ("bn0", "norm0"),
    "drop": ("drop", "dropblock", "drop_block"),
    "act0": ("act0", "relu", "act", "activation"),
    "fc1": ("fc1", "conv1"),
    "bn1": ("bn1", "norm1", "bn"),
    "act1": ("act1", "relu", "activ", "act", "activation"),
    "fc2": ("fc2", "conv2"),
    "softmax": ("rsoftmax", "r_softmax", "radix_softmax"),
    "radix": ("radix",),
    "cardinality": ("cardinality", "groups", "rsoftmax.cardinality", "rsoftmax.groups"),
    "norms_if": ("use_bn",),
    "drop_if": ("dropblock_prob",),
}
# In pytorchcv a block has the convolution and another block the attention.
_NAMES_OF_PAIR: Mapping[str, tuple[str, ...]] = {
    "conv": ("conv.conv",),
    "bn0": ("conv.bn",),
    "act0": ("conv.activ",),
    "fc1": ("att.conv1", "att.fc1"),
    "bn1": ("att.bn",),
    "act1": ("att.activ",),
    "fc2": ("att.conv2", "att.fc2"),
    "radix": ("att.radix",),
    "cardinality": ("att.groups",),
}
_CHILDREN = ("conv", "bn0", "drop", "act0", "fc1", "bn1", "act1", "fc2", "softmax")

_registered: dict[type[nn.Module], Layout] = {}


def register(
    kind: type[nn.Module],
    *,
    fc1: str,
    fc2: str,
    radix: str | int,
    cardinality: str | int = 1,
    conv: str | None = None,
    bn0: str | None = None,
    drop: str | None = None,
    act0: str | Callable[[Tensor], Tensor] | None = None,
    bn1: str | None = None,
    act1: str | Callable[[Tensor], Tensor] | None = F.relu,
    softmax: str | None = None,
) -> None:
    """Tell :func:`resnest_fused.fuse` where modules of a class keep the parts of split attention.

    ::

        rf.register(
            MyBlock,
            conv="body.conv",
            bn0="body.norm",
            act0="body.activation",
            fc1="squeeze",
            bn1="squeeze_norm",
            act1=torch.nn.functional.relu,
            fc2="expand",
            radix="splits",
            cardinality="groups",
        )
        print(rf.fuse(model))

    The module's forward takes one tensor and computes, in the words of
    :func:`resnest_fused.split_attention`::

        z      = act0(drop(bn0(conv(x))))
        logits = fc2(act1(bn1(fc1(gap))))
        out    = sum_r softmax_r(logits) z_r

    ``fuse`` proves that before it changes a module: in float64, with random parameters, eval and
    training, outputs, gradients and buffers. What computes something else is left alone.

    Args:
        kind: the class itself; its subclasses are registered by themselves.
        fc1, fc2: names of children, those of children's children as ``"child.name"``.
        radix, cardinality: numbers, or names of attributes.
        conv, bn0, drop, bn1: as fc1; None where there is none.
        act0, act1: a child's name, a function, or None for no activation.
        softmax: the child that makes attention from logits, whose attributes are ``radix`` and
            ``cardinality`` or ``groups``; None where the forward computes the r-softmax itself.

    Raises:
        TypeError: ``kind`` is no class of modules, or an argument is of another type.
        ValueError: a number is below 1, or a name is empty.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind: expected a subclass of torch.nn.Module, got {kind!r}")
    counts = {"radix": radix, "cardinality": cardinality}
    names = {"fc1": fc1, "fc2": fc2, "conv": conv, "bn0": bn0, "drop": drop, "bn1": bn1}
    names |= {"softmax": softmax}
    parts: dict[str, Any] = {}
    for name, part in {**counts, **names, "act0": act0, "act1": act1}.items():
        if isinstance(part, str):
            if not all(word.isidentifier() for word in part.split(".")):
                raise ValueError(f"{name}: expected an attribute's name, got {part!r}")
            parts[name] = tuple(part.split("."))
            continue
        if name in counts:
            fits, expected = type(part) is int, "an integer or a name"
            if type(part) is int and part < 1:
                raise ValueError(f"{name}: expected at least 1, got {part}")
        elif name in ("fc1", "fc2"):
            fits, expected = False, "a name"
        else:
            fits = part is None or (name.startswith("act") and callable(part))
            expected = "a name, a function or None" if name.startswith("act") else "a name or None"
        if not fits:
            raise TypeError(f"{name}: expected {expected}, got {part!r}")
        parts[name] = part
    _registered[kind] = Layout(**parts)


def find(module: nn.Module) -> Layout | None:
    """Where ``module`` keeps the parts of a split attention; None if it does not look like one.

    Raises:
        AttributeError: a part that was registered is not there.
    """
    kind = core(type(module))
    layout = _registered.get(kind)
    if layout is None:
        children = module._modules
        if not (
            ("fc1" in children and "fc2" in children)
            or ("conv1" in children and "conv2" in children)
            or ("conv" in children and "att" in children)
        ):
            return None
        layout = _found(module, _NAMES) or _found(module, _NAMES_OF_PAIR)
    return layout and _completed(module, layout, is_known(kind))


def is_known(kind: type[nn.Module]) -> bool:
    """Whether a class of split attention is trusted without a proof."""
    return path_of(kind) in registry.KNOWN and kind not in _registered


def problem_of_forward(kind: type[nn.Module]) -> str | None:
    """Why the forward of a class is none of one tensor to one, or None."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        return None
    return f"its forward takes ({', '.join(map(str, parameters))}), expected one tensor"


def _found(module: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Layout | None:
    def first(part: str) -> Path | None:
        for name in names.get(part, ()):
            path = tuple(name.split("."))
            found = read(module, path, _MISSING)
            # In our own modules None stands for a ReLU.
            if found is not _MISSING and not (found is None and part.startswith("act")):
                return path
        return None

    if first("radix") is None:
        return None
    parts: dict[str, Any] = {part: first(part) for part in names}
    if not _are_fcs(module, parts):
        return None
    if parts["cardinality"] is None:
        parts["cardinality"] = (*parts["fc1"], "groups")
    if names is _NAMES:
        prologue = parts["conv"] is not None or parts["bn0"] is not None
        if not prologue:
            parts["act0"] = None
        elif parts["act0"] is None:
            parts["act0"] = RELU
    if parts["act1"] is None:
        parts["act1"] = RELU
    if parts.get("drop") is None:
        parts["drop_if"] = None
    return Layout(**parts)


_MISSING = object()


def _are_fcs(module: nn.Module, parts: Mapping[str, Any]) -> bool:
    """Whether two modules lead from C features to R*C, or cannot be asked."""
    if parts["fc1"] is None or parts["fc2"] is None:
        return False
    fc1, fc2 = read(module, parts["fc1"]), read(module, parts["fc2"])
    radix = read(module, parts["radix"])
    if not (isinstance(fc1, nn.Module) and isinstance(fc2, nn.Module) and isinstance(radix, int)):
        return False
    channels = getattr(fc1, "in_channels", getattr(fc1, "in_features", None))
    features = features_of(fc2)
    if channels is None or features is None:
        # Something else was put there. Only these names say that it is a split attention.
        return parts["fc1"][-1] == "fc1"
    return features == radix * channels


def features_of(layer: Any) -> int | None:
    """The number of features that a convolution or linear layer makes; None if unknown."""
    found = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    return found if isinstance(found, int) else None


def _completed(module: nn.Module, layout: Layout, known: bool) -> Layout:
    """The layout with what depends on this module: the r-softmax, and the other submodules."""
    if layout.softmax is not None:
        softmax = read(module, layout.softmax)
        name = next((n for n in ("cardinality", "groups") if hasattr(softmax, n)), "")
        counted = name and hasattr(softmax, "radix")
        if known:
            if counted and is_found_at(type(softmax), registry.R_SOFTMAXES):
                layout = layout._replace(r_softmax=type(softmax))
        elif counted:
            layout = layout._replace(r_softmax=type(softmax), groups_name=name)
        else:
            layout = layout._replace(softmax=None)
    return layout if known else layout._replace(others=tuple(_others(module, layout)))


def _others(module: nn.Module, layout: Layout) -> Iterator[tuple[Path, type[nn.Module]]]:
    """The submodules that are no part of the layout, with their classes."""
    covered: set[nn.Module] = set()
    for part in _CHILDREN:
        child = read(module, getattr(layout, part))
        if isinstance(child, nn.Module):
            covered |= set(child.modules())
    for name, child in module.named_modules():
        if name and child not in covered:
            yield tuple(name.split(".")), type(child)
