"""The ResNeSt models, by function or by name, and checkpoints from local files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from resnest_fused.models.checkpoint import CheckpointError, load_checkpoint
from resnest_fused.models.resnest import ResNeSt, resnest50

__all__ = [
    "CheckpointError",
    "ResNeSt",
    "create",
    "list_models",
    "load_checkpoint",
    "resnest50",
]

_BUILDERS: dict[str, Callable[..., ResNeSt]] = {
    builder.__name__: builder for builder in (resnest50,)
}


def list_models() -> list[str]:
    """The names that :func:`create` knows."""
    return list(_BUILDERS)


def create(name: str, weights: str | os.PathLike[str] | None = None, **options: Any) -> ResNeSt:
    """Build a model by its name, with the weights of a local checkpoint if one is given.

    Args:
        name: one of :func:`list_models`.
        weights: a checkpoint file of the official package, of timm or of this one: a state_dict,
            or a dictionary with one under "state_dict"; see :func:`load_checkpoint`. None leaves
            the random initialisation.
        options: the builder's, such as ``num_classes`` and ``fused`` of :func:`resnest50`.

    Raises:
        ValueError: there is no such model.
        CheckpointError: the file cannot be read or does not fit the model.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name: expected one of {', '.join(_BUILDERS)}, got {name!r}")
    model = _BUILDERS[name](**options)
    if weights is not None:
        load_checkpoint(model, weights)
    return model
