"""What the adapters know, found by a class or by a network's name."""

from __future__ import annotations

from torch import nn

from resnest_fused.children import path_of
from resnest_fused.fusing.adapters import ADAPTERS
from resnest_fused.fusing.adapters.base import Pairs

_FOLDS = {path: pairs for adapter in ADAPTERS for path, pairs in adapter.folds.items()}

# The classes of split attention, and of r-softmax, that are trusted without a proof.
KNOWN = tuple(path for adapter in ADAPTERS for path in adapter.attentions)
R_SOFTMAXES = tuple(path for adapter in ADAPTERS for path in adapter.r_softmaxes)
# The peers' networks, by the word in front of the colon in a name such as "timm:resnest50d".
NETWORKS = {adapter.name: adapter.networks for adapter in ADAPTERS if adapter.networks is not None}


def fold_pairs(module: nn.Module, kind: type[nn.Module]) -> Pairs:
    """The convolutions and norms that can be folded in a module, by its unfused class."""
    pairs = _FOLDS.get(path_of(kind), ())
    return pairs(module) if callable(pairs) else pairs
