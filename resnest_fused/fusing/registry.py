"""What the adapters know, found by a class or by a network's name."""

from __future__ import annotations

from functools import partial

from resnest_fused.children import path_of
from resnest_fused.fusing.adapters import ADAPTERS
from resnest_fused.fusing.adapters.base import Pairs
from resnest_fused.modules import FusedModule

_FUSED = {
    path: partial(adapter.fused_class, name)
    for adapter in ADAPTERS
    for name, path in adapter.attentions.items()
}
_FOLDS = {path: pairs for adapter in ADAPTERS for path, pairs in adapter.folds.items()}

# The classes of split attention that can be fused.
KNOWN = tuple(_FUSED)
# The peers' networks, by the word in front of the colon in a name such as "timm:resnest50d".
NETWORKS = {adapter.name: adapter.networks for adapter in ADAPTERS if adapter.networks is not None}


def fused_class(original: type) -> type[FusedModule]:
    """The class that a split attention of a known class gets when it is fused."""
    return _FUSED[path_of(original)]()


def fold_pairs(kind: type) -> Pairs:
    """The convolutions and norms that can be folded in modules of this class."""
    return _FOLDS.get(path_of(kind), ())
