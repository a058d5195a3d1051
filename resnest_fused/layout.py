"""Where a split-attention module keeps its parts, and how they are read at each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

# The names from a module to a part of it: ("att", "conv1") is ``module.att.conv1``.
Path = tuple[str, ...]


class Other(NamedTuple):
    """A submodule that the op replaces though it is no part of a split attention.

    Attributes:
        path: where it is; () for the module itself, of which only the children count.
        kind: its class.
        children: their names.
    """

    path: Path
    kind: type
    children: tuple[str, ...]


class Layout(NamedTuple):
    """Where the parts of one split attention are, each given by its path; None for no such part.

    Modules are read at each call, so that one may take another's place at any time.

    Attributes:
        conv: what runs on the input first.
        paths: instead of conv, modules whose results are the splits, one after the other.
        divided: the path to what is true if each of ``paths`` gets its share of the input's
            channels; None if each gets them all.
        bn0, drop, act0: what follows. An activation may be a function instead of a path.
        fc1, bn1, act1, fc2: the map from gap to logits.
        softmax: the module of the r-softmax or of the gate; None where the op computes it.
        radix, cardinality: a number, or the path to one.
        norms_if, drop_if: paths to what must be true for the norms, and for ``drop``, to be used.
        r_softmax: the class of the r-softmax that the op may replace, or None.
        groups_name: what the instances of that class call their cardinality.
        within: two children of a block that has more than this attention, which its own forward
            calls one after the other. The op is all of the first but ``conv``, and the second.
        others: the other submodules, whose work the op does too. If one of them is hooked, replaced
            or has got other children, the unfused forward runs.
    """

    fc1: Path
    fc2: Path
    radix: Path | int
    cardinality: Path | int = 1
    conv: Path | None = None
    paths: tuple[Path, ...] = ()
    divided: Path | None = None
    bn0: Path | None = None
    drop: Path | None = None
    act0: Path | Callable[[Tensor], Tensor] | None = None
    bn1: Path | None = None
    act1: Path | Callable[[Tensor], Tensor] | None = None
    softmax: Path | None = None
    norms_if: Path | None = None
    drop_if: Path | None = None
    r_softmax: type[nn.Module] | None = None
    groups_name: str = "cardinality"
    within: tuple[str, str] | None = None
    others: tuple[Other, ...] = ()


def read(module: Any, part: Any, *default: Any) -> Any:
    """The part of ``module`` at a path; a number, a function or None stands for itself."""
    if type(part) is not tuple:
        return part
    if len(part) == 1 and part[0] in module._modules:  # the common case, at half the time
        return module._modules[part[0]]
    for name in part:
        module = getattr(module, name, *default)
    return module
