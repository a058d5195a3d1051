"""What an adapter says about one kind of peer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

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
        attentions: the peer's classes of split attention that are trusted without a proof.
        r_softmaxes: the peer's classes of r-softmax that are.
        folds: the convolutions and norms in other classes of the peer, by class, or a function that
            finds those of a module.
        networks: the peer's networks; None where ``models`` has them, or nothing has.
    """

    name: str
    attentions: tuple[str, ...] = ()
    r_softmaxes: tuple[str, ...] = ()
    folds: Mapping[str, Pairs | Callable[[Any], Pairs]] = MappingProxyType({})
    networks: type[Networks] | None = None


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
