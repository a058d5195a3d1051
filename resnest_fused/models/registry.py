"""Every model by its name: this package's own, the official package's and timm's."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from resnest_fused.models import checkpoints
from resnest_fused.models.resnest import ResNeSt, resnest50

if TYPE_CHECKING:
    from PIL.Image import Image

_BUILDERS: dict[str, Callable[..., ResNeSt]] = {
    builder.__name__: builder for builder in (resnest50,)
}

# Evaluation crops of the official models; all others use 224 pixels.
_OFFICIAL_SIZES = {"resnest101": 256, "resnest200": 320, "resnest269": 416}


class Preprocessing(NamedTuple):
    """How a model takes pictures.

    Attributes:
        size: pixels of its input's side.
        transform: turns an RGB picture into a part of its input, ``(3, size, size)``.
    """

    size: int
    transform: Callable[[Image], Tensor]


class _Origin:
    """Where models come from; its methods take names without the origin's prefix."""

    def title(self) -> str:
        """What it is called in errors."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """The models that it has."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether it has this model."""
        return name in self.names()

    def build(self, name: str, options: dict[str, Any]) -> nn.Module:
        """One of its models."""
        raise NotImplementedError

    def preprocessing(self, name: str, model: nn.Module) -> Preprocessing:
        """How one of its models takes pictures."""
        raise NotImplementedError


class _Ours(_Origin):
    def title(self) -> str:
        return "resnest_fused"

    def names(self) -> list[str]:
        return list(_BUILDERS)

    def build(self, name: str, options: dict[str, Any]) -> nn.Module:
        return _BUILDERS[name](**options)

    def preprocessing(self, name: str, model: nn.Module) -> Preprocessing:
        return _official_preprocessing(224)


class _Official(_Origin):
    def __init__(self) -> None:
        # Both the PyPI release and the repository's later layout export the builders here.
        self._package = _import("resnest.torch", "--no-deps resnest==0.0.5")

    def title(self) -> str:
        return "the official package"

    def names(self) -> list[str]:
        functions = inspect.getmembers(self._package, inspect.isfunction)
        return [name for name, _ in functions if name.startswith("resnest")]

    def build(self, name: str, options: dict[str, Any]) -> nn.Module:
        return getattr(self._package, name)(**options)

    def preprocessing(self, name: str, model: nn.Module) -> Preprocessing:
        return _official_preprocessing(_OFFICIAL_SIZES.get(name, 224))


class _Timm(_Origin):
    def __init__(self) -> None:
        self._package = _import("timm", "timm")

    def title(self) -> str:
        return f"timm {self._package.__version__}"

    def names(self) -> list[str]:
        return self._package.list_models()

    def has(self, name: str) -> bool:
        # Names may have a tag for pretrained weights, which the list leaves out.
        return self._package.is_model(name)

    def build(self, name: str, options: dict[str, Any]) -> nn.Module:
        return self._package.create_model(name, **options)

    def preprocessing(self, name: str, model: nn.Module) -> Preprocessing:
        data = self._package.data
        config = data.resolve_model_data_config(model)
        return Preprocessing(config["input_size"][-1], data.create_transform(**config))


_ORIGINS: dict[str, Callable[[], _Origin]] = {"": _Ours, "official": _Official, "timm": _Timm}


def list_models() -> list[str]:
    """The names of this package's own models, all of which :func:`create` knows.

    Example::

        >>> list_models()
        ['resnest50']
    """
    return list(_BUILDERS)


def create(name: str, weights: str | os.PathLike[str] | None = None, **options: Any) -> nn.Module:
    """Build a model by its name, with the weights of a local checkpoint if one is given.

    Example::

        model = create("resnest50", num_classes=10)
        model = create("official:resnest101", weights="resnest101.pth")
        model = create("timm:resnest50d")

    Args:
        name: one of :func:`list_models`; or "official:NAME" for a model of the ``resnest`` package,
            or "timm:NAME" for one of timm's. Those two are plain: fuse them with
            :func:`resnest_fused.fuse`.
        weights: a checkpoint file of the official package, of timm or of this one: a state_dict,
            or a dictionary with one under "state_dict"; see :func:`load_checkpoint`. The model gets
            as many classes as the checkpoint has, unless ``num_classes`` is given. None leaves the
            random initialisation.
        options: the builder's, such as ``num_classes``, and ``fused`` of :func:`resnest50`.

    Raises:
        ValueError: there is no such model, or its package cannot be imported.
        CheckpointError: the file cannot be read or does not fit the model.
    """
    origin, short = _find(name)
    if weights is None:
        return origin.build(short, options)
    state = checkpoints.read_checkpoint(weights)
    classes = checkpoints.num_classes(state)
    if classes is not None:
        options = {"num_classes": classes} | options
    model = origin.build(short, options)
    checkpoints.load_state(model, state, weights)
    return model


def preprocessing(name: str, model: nn.Module) -> Preprocessing:
    """How a model takes pictures.

    Example::

        size, transform = preprocessing("resnest50", model)
        logits = model.eval()(transform(PIL.Image.open("photo.jpg").convert("RGB"))[None])

    Args:
        name: the one by which :func:`create` made the model.
        model: what it made.
    """
    origin, short = _find(name)
    return origin.preprocessing(short, model)


def _find(name: str) -> tuple[_Origin, str]:
    """The origin that has the model, and the model's name there.

    Raises:
        ValueError: there is no such origin or model, or the package cannot be imported.
    """
    prefix, colon, short = name.partition(":")
    if not colon:
        prefix, short = "", name
    elif prefix not in ("official", "timm"):
        raise ValueError(f"unknown source {prefix!r} in {name!r}; known are official and timm")
    origin = _ORIGINS[prefix]()
    if not origin.has(short):
        close = difflib.get_close_matches(short, origin.names(), n=1)
        message = f"{origin.title()} has no model {short}"
        message += f"; did you mean {close[0]}?" if close else "."
        if not prefix:
            message += f" Known are {', '.join(origin.names())}, official:NAME and timm:NAME"
        raise ValueError(message.removesuffix("."))
    return origin, short


def _official_preprocessing(size: int) -> Preprocessing:
    # Here, so that who only builds models needs neither Pillow nor NumPy.
    from resnest_fused.models import images

    return Preprocessing(size, partial(images.preprocess, size=size))


def _import(module: str, requirement: str) -> Any:
    try:
        return importlib.import_module(module)
    # RuntimeError is what timm's import gives with a torchvision for another torch.
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"package {package} cannot be imported ({error}); try pip install {requirement}"
        ) from error
