"""Every model by its name: this package's own, the official package's and timm's."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from resnest_fused.fusing.adapters.base import Networks, Transform
from resnest_fused.fusing.registry import NETWORKS
from resnest_fused.models import checkpoints
from resnest_fused.models.checkpoints import Checkpoint
from resnest_fused.models.family import BUILDERS
from resnest_fused.models.options import OutIndices
from resnest_fused.models.resnest import ResNeSt
from resnest_fused.models.variants import VARIANTS

Weights = str | os.PathLike[str] | Checkpoint


class Preprocessing(NamedTuple):
    """How a model takes pictures.

    Attributes:
        size: pixels of its input's side.
        transform: turns an RGB picture into a part of its input, ``(3, size, size)``.
    """

    size: int
    transform: Transform


class _Ours(Networks):
    def title(self) -> str:
        return "resnest_fused"

    def names(self) -> list[str]:
        return list(BUILDERS)

    def build(self, name: str, options: dict[str, Any]) -> nn.Module:
        return BUILDERS[name](**options)

    def preprocessing(self, name: str, model: nn.Module) -> tuple[int, Transform | None]:
        return VARIANTS[name].size, None


_NETWORKS: dict[str, type[Networks]] = {"": _Ours, **NETWORKS}


def list_models() -> list[str]:
    """The names of this package's own models, all of which :func:`create` knows.

    Example::

        >>> list_models()[:3]
        ['resnest14', 'resnest26', 'resnest50']
    """
    return list(BUILDERS)


def create(
    name: str,
    weights: Weights | None = None,
    *,
    sha256: str | None = None,
    leave_out: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Build a model by its name, with the weights of a checkpoint if one is given.

    Example::

        model = create("resnest50", num_classes=10)
        model = create("official:resnest101", weights="resnest101.pth")
        model = create("timm:resnest50d")

    Args:
        name: one of :func:`list_models`; or "official:NAME" for a model of the ``resnest`` package,
            or "timm:NAME" for one of timm's. Those two are plain: fuse them with
            :func:`resnest_fused.fuse`.
        weights: a checkpoint file of any layout, a URL, or what :func:`read_checkpoint` returned.
            The model gets as many classes as the checkpoint has, unless ``num_classes`` is given.
            None leaves the random initialisation.
        sha256: the file's hash or its first digits; a URL needs it.
        leave_out: modules that keep their random weights, as of :func:`load_checkpoint`.
        options: the builder's, such as ``num_classes``; of this package's models those of
            :func:`resnest50`. With ``in_chans`` the first convolution of a checkpoint is adapted to
            another number of input channels.

    Raises:
        ValueError: there is no such model, or its package cannot be imported, or an option is
            wrong; the message names it.
        CheckpointError: the file cannot be read or does not fit the model.
    """
    networks, short = _find(name)
    if weights is None:
        if sha256 is not None or leave_out:
            raise ValueError("weights: expected a checkpoint for sha256 and leave_out, got None")
        return networks.build(short, options)
    checkpoint = weights
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = checkpoints.read_checkpoint(checkpoint, sha256=sha256)
    classes = checkpoints.num_classes(checkpoint.state)
    if classes is not None and "fc" not in leave_out:
        options = {"num_classes": classes} | options
    model = networks.build(short, options)
    in_chans = options.get("in_chans")
    checkpoints.load_checkpoint(model, checkpoint, leave_out=leave_out, in_chans=in_chans)
    return model


def backbone(
    name: str,
    weights: Weights | None = None,
    *,
    out_indices: OutIndices = (1, 2, 3, 4),
    **options: Any,
) -> ResNeSt:
    """One of this package's models without its classifier, for a detector or a segmenter.

    Example::

        body = backbone("resnest50", "resnest50.pth", out_indices=(1, 2, 3, 4))
        maps = body(torch.randn(1, 3, 224, 224))  # a list; strides 4, 8, 16, 32
        body = backbone("resnest50", out_indices={4: "out"}, output_stride=8)  # a dictionary

    Args:
        name: one of :func:`list_models`.
        weights: as of :func:`create`; the classifier of the checkpoint, and stages behind the last
            map, are left out.
        out_indices: which maps it returns, as of :class:`ResNeSt`.
        options: as of :func:`create`, such as ``output_stride``, ``frozen_stages`` and ``sha256``.

    Raises:
        ValueError, CheckpointError: as :func:`create`.
    """
    if ":" in name:
        raise ValueError(f"backbone: expected one of {', '.join(list_models())}, got {name!r}")
    model = create(name, weights, out_indices=out_indices, **options)
    assert isinstance(model, ResNeSt)
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
    networks, short = _find(name)
    size, transform = networks.preprocessing(short, model)
    if transform is None:
        # Here, so that who only builds models needs neither Pillow nor NumPy.
        from resnest_fused.models import images

        transform = partial(images.preprocess, size=size)
    return Preprocessing(size, transform)


def _find(name: str) -> tuple[Networks, str]:
    """The networks that the model is among, and its name there.

    Raises:
        ValueError: there is no such source or model, or the package cannot be imported.
    """
    prefix, colon, short = name.partition(":")
    if not colon:
        prefix, short = "", name
    elif prefix not in NETWORKS:
        raise ValueError(
            f"unknown source {prefix!r} in {name!r}; known are {' and '.join(NETWORKS)}"
        )
    networks = _NETWORKS[prefix]()
    if not networks.has(short):
        close = difflib.get_close_matches(short, networks.names(), n=1)
        message = f"{networks.title()} has no model {short}"
        message += f"; did you mean {close[0]}?" if close else "."
        if not prefix:
            peers = " and ".join(f"{peer}:NAME" for peer in NETWORKS)
            message += f" Known are {', '.join(networks.names())}, {peers}"
        raise ValueError(message.removesuffix("."))
    return networks, short
