"""What an adapter says about one kind of peer, and how a peer's fused classes are made."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnest_fused.modules import FusedModule

# From an RGB picture to a part of a network's input, (3, size, size).
Transform = Callable[[Any], Tensor]
# The names of children: each convolution with the norm that follows it.
Pairs = tuple[tuple[str, str], ...]

# In the blocks and in the stem of every ResNeSt.
BLOCK: Pairs = (("conv1", "bn1"), ("conv3", "bn3"))
STEM: Pairs = (("conv1", "bn1"),)


class Networks:
    """The networks of one kind of peer, by names without the word in front of the colon.

    Its constructor raises ValueError where the peer's package cannot be imported.
    """

    def title(self) -> str:
        """What the peer is called in errors."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """The networks that it has."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether it has this network."""
        return name in self.names()

    def build(self, name: str, options: dict[str, Any]) -> nn.Module:
        """One of its networks, its split attention unfused, with random weights."""
        raise NotImplementedError

    def preprocessing(self, name: str, model: nn.Module) -> tuple[int, Transform | None]:
        """The side of a network's input in pixels, and what makes it of a picture.

        None stands for the official transform.
        """
        raise NotImplementedError


class Adapter(NamedTuple):
    """What is known about one kind of peer. Classes are named as ``package.module.Class``.

    Attributes:
        name: the word in front of the colon in the names of its networks.
        attentions: the peer's classes of split attention, by the names of their fused classes.
        fused_class: the fused class of a name.
        folds: the convolutions and norms in other classes of the peer, by class.
        networks: the peer's networks; None where ``models`` has them.
    """

    name: str
    attentions: Mapping[str, str]
    fused_class: Callable[[str], type[FusedModule]]
    folds: Mapping[str, Pairs]
    networks: type[Networks] | None = None


class PeerAttention(FusedModule):
    """A peer's forward by the fused op, to be mixed into the peer's class, which has the children.

    Attributes:
        r_softmaxes: the peer's classes of r-softmax.
    """

    r_softmaxes: tuple[str, ...]
    radix: int
    conv: nn.Module
    fc1: nn.Conv2d
    fc2: nn.Conv2d
    rsoftmax: Any


def fused_classes(
    home: str, attentions: Mapping[str, str], forward: type[PeerAttention]
) -> Callable[[str], type[FusedModule]]:
    """A function from the name of a peer's fused class to that class, made at the first call.

    An adapter's file has it as its ``__getattr__``, since pickles find a class by file and name.

    Args:
        home: the adapter's file, as a module's name.
        attentions: as in :class:`Adapter`.
        forward: is mixed into each of the peer's classes.
    """

    @functools.cache
    def fused_class(name: str) -> type[FusedModule]:
        if name not in attentions:
            raise AttributeError(f"module {home!r} has no attribute {name!r}")
        module, _, kind = attentions[name].rpartition(".")
        original = getattr(importlib.import_module(module), kind)
        body = {"__module__": home, "_unfused_forward": staticmethod(original.forward)}
        return type(name, (forward, original), body)

    return fused_class


def import_peer(module: str, requirement: str) -> Any:
    """A peer's module, or a ValueError that says what to install."""
    try:
        return importlib.import_module(module)
    # RuntimeError is what timm's import gives with a torchvision for another torch.
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"package {package} cannot be imported ({error}); try pip install {requirement}"
        ) from error
