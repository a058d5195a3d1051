"""Finds where a module keeps the parts of a split attention, by their names or as registered."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# From the module that defines them, since toolkits put classes of their own into torch.nn.
from torch.nn.modules.activation import ReLU, Sigmoid, Softmax, Softmax2d

from resnest_fused.children import (
    RELU,
    computes_as,
    has_child,
    is_found_at,
    is_nothing,
    is_relu,
    path_of,
)
from resnest_fused.fusing import registry
from resnest_fused.fusing.wrapping import core
from resnest_fused.layout import Layout, Other, Path, read

# The names that implementations give the parts, the commonest first. The first part of each table
# is what no other kind of module has.
_Names = Mapping[str, tuple[str, ...]]
_NAMES: _Names = {
    "radix": ("radix",),
    "conv": ("conv",),
    "bn0": ("bn0", "norm0"),
    "drop": ("drop", "dropblock", "drop_block"),
    "act0": ("act0", "relu", "act", "activation"),
    "fc1": ("fc1", "conv1"),
    "bn1": ("bn1", "norm1", "bn"),
    "act1": ("act1", "relu", "activ", "act", "activation"),
    "fc2": ("fc2", "conv2"),
    "softmax": ("rsoftmax", "r_softmax", "radix_softmax"),
    "cardinality": ("cardinality", "groups", "rsoftmax.cardinality", "rsoftmax.groups"),
    "norms_if": ("use_bn",),
    "drop_if": ("dropblock_prob",),
}
# In pytorchcv a block has the convolution and another block the attention.
_NAMES_OF_PAIR: _Names = {
    "radix": ("att.radix",),
    "conv": ("conv.conv",),
    "bn0": ("conv.bn",),
    "act0": ("conv.activ",),
    "fc1": ("att.conv1", "att.fc1"),
    "bn1": ("att.bn",),
    "act1": ("att.activ",),
    "fc2": ("att.conv2", "att.fc2"),
    "cardinality": ("att.groups",),
}
# Squeeze-and-excitation (arXiv:1709.01507) is split attention of radix 1.
_NAMES_OF_GATE: _Names = {
    "softmax": ("gate", "scale_activation", "sigmoid", "conv2.activate", "fc.3"),
    "fc1": ("fc1", "conv_reduce", "conv1.conv", "conv1", "fc.0"),
    "bn1": ("bn",),
    "act1": ("act", "act1", "activation", "activ", "relu", "conv1.activate", "fc.1"),
    "fc2": ("fc2", "conv_expand", "conv2.conv", "conv2", "fc.2"),
}
# Selective kernels (arXiv:1903.06586) are split attention whose splits are paths of their own.
_NAMES_OF_PATHS: _Names = {
    "paths": ("paths", "branches"),
    "divided": ("split_input",),
    "fc1": ("attn.fc_reduce", "fc1.conv"),
    "bn1": ("attn.bn", "fc1.bn"),
    "act1": ("attn.act", "fc1.activ"),
    "fc2": ("attn.fc_select", "fc2"),
}
# In a block, what runs in front of its squeeze-and-excitation: a convolution, a norm and a ReLU.
_NAMES_OF_FRONT: _Names = {
    "bn0": ("bn", "1"),
    "conv": ("conv", "0"),
    "drop": ("bn.drop",),
    "act0": ("bn.act", "2"),
}
# The children that each of them has, one of the sets, and then looks for the names.
_FORMS = (
    (({"fc1", "fc2"}, {"conv1", "conv2"}), _NAMES),
    (({"conv", "att"},), _NAMES_OF_PAIR),
    (({"fc1", "fc2"}, {"conv_reduce"}, {"conv1", "conv2"}, {"fc"}), _NAMES_OF_GATE),
    (({"paths", "attn"}, {"branches", "fc1"}), _NAMES_OF_PATHS),
)
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
            # A Sequential's children have numbers for names.
            if not all(word.isidentifier() or word.isdigit() for word in part.split(".")):
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
        children = set(module._modules.keys())  # a scripted module's are a list
        found = (
            _found(module, names)
            for sets, names in _FORMS
            if any(children >= names_of_children for names_of_children in sets)
        )
        layout = next(filter(None, found), None)
        if layout is None and "se" in children:
            layout = _found_within(module)
    return layout and _completed(module, layout, is_known(kind))


def is_known(kind: type[nn.Module]) -> bool:
    """Whether a class of split attention is trusted without a proof."""
    return path_of(kind) in registry.KNOWN and kind not in _registered


def problem_of(module: nn.Module, layout: Layout) -> str | None:
    """Why a module cannot be a split attention, whatever its numbers are, or None."""
    kind: Any = core(type(module))
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return f"its forward takes ({', '.join(map(str, parameters))}), expected one tensor"
    if layout.softmax is not None and layout.r_softmax is None and not is_known(kind):
        gate = type(read(module, layout.softmax)).__name__
        return f"its gate is {gate}, expected a sigmoid or a softmax"
    if layout.radix == 1 and kind not in _registered:
        act1 = read(module, layout.act1)
        if act1 is not RELU and not computes_as(type(act1), ReLU):
            # Measured: eager 92 us, the two halves of the op around such layers 148 (672@14, B=1).
            return (
                f"its activation is {type(act1).__name__}: the op would be slower on small maps; "
                "after resnest_fused.register it is fused all the same"
            )
    return None


_MISSING = object()


def _parts(module: nn.Module, names: _Names) -> dict[str, Any] | None:
    """The path to each part under the first of its names that is there, or None.

    Without the first part of the table there are none.
    """

    def first(part: str) -> Path | None:
        for name in names[part]:
            path = tuple(name.split("."))
            found = read(module, path, _MISSING)
            # In our own modules None stands for a ReLU.
            if found is not _MISSING and not (found is None and part.startswith("act")):
                return path
        return None

    mark, *others = names
    path = first(mark)
    return None if path is None else {mark: path, **{part: first(part) for part in others}}


def _found(module: nn.Module, names: _Names) -> Layout | None:
    parts = _parts(module, names)
    if parts is None:
        return None
    if names is _NAMES_OF_GATE:
        parts["radix"] = parts["cardinality"] = 1
        if not _is_gate(read(module, parts["softmax"])):
            return None
    elif names is _NAMES_OF_PATHS:
        parts["paths"] = tuple(_children_of(module, parts["paths"]))
        parts["radix"], parts["cardinality"] = len(parts["paths"]), 1
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


def _found_within(block: nn.Module) -> Layout | None:
    """The layout of a block whose squeeze-and-excitation follows a norm and a ReLU."""
    excitation = block._modules["se"]
    inner = None if excitation is None else find(excitation)
    if excitation is None or inner is None or problem_of(excitation, inner) is not None:
        return None
    before = itertools.takewhile(lambda item: item[0] != "se", block._modules.items())
    # In some blocks there are places for other modules between the two, with none or an Identity.
    fronts = [
        (name, child) for name, child in before if child is not None and not is_nothing(child)
    ]
    if not fronts:
        return None
    name, front = fronts[-1]
    if has_child(front, getattr(front, "act", None)) and hasattr(front, "drop"):
        parts: dict[str, Any] | None = {"bn0": (), "drop": ("drop",), "act0": ("act",)}
    else:
        parts = _parts(front, _NAMES_OF_FRONT)
    if parts is None or parts["act0"] is None or not is_relu(read(front, parts["act0"])):
        return None
    parts = {part: path if path is None else (name, *path) for part, path in parts.items()}
    for part in ("fc1", "bn1", "act1", "fc2"):
        path = getattr(inner, part)
        parts[part] = ("se", *path) if type(path) is tuple else path
    return Layout(**parts, radix=1, within=(name, "se"))


def _is_gate(module: Any) -> bool:
    """Whether ``module`` may be an activation: it has neither parameters nor children."""
    return not (isinstance(module, nn.Module) and (module._parameters or module._modules))


def _children_of(module: nn.Module, container: Path) -> Iterator[Path]:
    found = read(module, container)
    if isinstance(found, nn.ModuleList | nn.Sequential):
        for name in found._modules:
            yield (*container, name)


def _are_fcs(module: nn.Module, parts: Mapping[str, Any]) -> bool:
    """Whether two modules lead from C features to R*C, or cannot be asked."""
    if parts["fc1"] is None or parts["fc2"] is None:
        return False
    fc1, fc2 = read(module, parts["fc1"]), read(module, parts["fc2"])
    radix = read(module, parts["radix"])
    if not (isinstance(fc1, nn.Module) and isinstance(fc2, nn.Module) and isinstance(radix, int)):
        return False
    # Where no radix says what it is, two convolutions may be anything.
    if type(parts["radix"]) is int and not (_is_narrow(fc1) and _is_narrow(fc2)):
        return False
    channels = getattr(fc1, "in_channels", getattr(fc1, "in_features", None))
    features = features_of(fc2)
    if channels is None or features is None:
        # Something else was put there. Only these names say that it is a split attention.
        return parts["fc1"][-1] == "fc1"
    return features == radix * channels


def _is_narrow(fc: nn.Module) -> bool:
    """Whether no kernel that is larger than a pixel is seen."""
    return getattr(fc, "kernel_size", 1) in (1, (1,), (1, 1), (1, 1, 1))


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
        elif not _is_another_gate(type(softmax)):
            layout = layout._replace(softmax=None)
    return layout if known else layout._replace(others=tuple(_others(module, layout)))


# Those of torch.nn that may do what the op does; the proof says whether they do it along its axis.
_GATES = (Sigmoid, Softmax, Softmax2d)


def _is_another_gate(kind: type) -> bool:
    """Whether a class is one of torch's activations which the op does not compute."""
    return kind.__module__ == Sigmoid.__module__ and kind not in _GATES


def _others(module: nn.Module, layout: Layout) -> Iterator[Other]:
    """The submodules that are no part of the layout."""
    covered: set[nn.Module] = set()
    for part in (*(getattr(layout, name) for name in _CHILDREN), *layout.paths):
        child = read(module, part)
        if isinstance(child, nn.Module):
            covered |= set(child.modules())
    names = [name for name, child in module._modules.items() if child is not None]
    if layout.within is not None:
        yield Other((), type(module), tuple(module._modules))
        # What is between the two does nothing, and may be something else later.
        first, last = map(names.index, layout.within)
        names = names[first : last + 1]
    for name in names:
        for path, child in getattr(module, name).named_modules(prefix=name):
            if child not in covered:
                yield Other(tuple(path.split(".")), type(child), tuple(child._modules))
