"""Reads checkpoints from local files and loads them whole or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

_NAMED = 3  # how many keys an error names
# Where training scripts put the weights, and what wrappers put in front of each name.
_ENTRIES = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """A file is no checkpoint, or not one of this model; says which file and what did not fit."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict in a file that ``torch.save`` wrote.

    The file holds the state_dict itself or a dictionary with one under "state_dict" or "model". The
    prefixes "module." of ``DataParallel`` and "_orig_mod." of ``torch.compile`` are taken off. It
    is read with ``weights_only=True``, so no code in it runs.

    Example::

        state = read_checkpoint("resnest50.pth")

    Raises:
        CheckpointError: not a file, truncated or damaged, or something else than tensors by name.
            The message names a training script's own objects beside the weights, and what to do.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{os.fspath(path)}: not a file that exists")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can make the unpickler raise almost anything.
    except Exception as error:
        raise CheckpointError(f"{os.fspath(path)}: {_why_unreadable(path)}") from error
    state = content
    if isinstance(content, Mapping):
        state = next((content[key] for key in _ENTRIES if key in content), content)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{os.fspath(path)}: expected a state_dict, got {type(state).__name__}"
            + (" without entries" if isinstance(state, Mapping) else "")
        )
    for key, value in state.items():
        if (
            not isinstance(key, str)
            or not isinstance(value, Tensor)
            or value.layout != torch.strided
            or value.is_meta
            or value.is_complex()
            or value.is_quantized
        ):
            raise CheckpointError(
                f"{os.fspath(path)}: expected dense real tensors by name, got "
                f"{_describe(value)} "
                f"under {key!r}"
            )
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _why_unreadable(path: str | os.PathLike[str]) -> str:
    try:
        refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or of a format without a list of what it holds
        refused = []
    if not refused:
        return "truncated, damaged, or not a checkpoint that torch.load(weights_only=True) accepts"
    content = _outline(path)
    entries = content if isinstance(content, Mapping) else {}
    places = [repr(key) for key, value in entries.items() if _has_placeholder(value)]
    weights = next((key for key in _ENTRIES if isinstance(entries.get(key), Mapping)), None)
    loaded = f"torch.load({os.fspath(path)!r}, weights_only=False)"
    advice = (
        f"keep its weights alone with torch.save({loaded}[{weights!r}], NEW_FILE), or "
        if weights is not None
        else ""
    )
    return (
        f"holds {', '.join(refused)}"
        + (f" under {', '.join(places)}" if places else "")
        + ", which torch.load(weights_only=True) refuses, as loading could run code. If you trust "
        f"the file, {advice}load it within torch.serialization.safe_globals([{', '.join(refused)}])"
    )


class _Placeholder:
    """Stands for an object that is not loaded."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _OutlineUnpickler(pickle.Unpickler):
    """Makes tensors and containers, and runs no other code that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        harmless = (
            (module == "torch._utils" and name.startswith("_rebuild_"))
            or (module == "torch" and name.endswith("Storage"))
            or (module == "collections" and name == "OrderedDict")
        )
        return super().find_class(module, name) if harmless else _Placeholder


def _outline(path: str | os.PathLike[str]) -> Any:
    """What a file holds, placeholders in it; None if that cannot be found out."""
    reader = SimpleNamespace(Unpickler=_OutlineUnpickler, __name__="pickle")
    try:
        return torch.load(path, map_location="meta", weights_only=False, pickle_module=reader)
    except Exception:  # of the older format, or with objects that are filled in other ways
        return None


def _has_placeholder(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_placeholder, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_placeholder, value))
    return isinstance(value, _Placeholder)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype}, {value.layout} tensor on {value.device}"
    return type(value).__name__


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into ``model``; every key and shape is compared before the first copy.

    Example::

        load_checkpoint(model, "resnest50.pth")

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or keys or shapes differ from the model's. The
            model is then as it was.
        RuntimeError: the model's norms are folded; see :func:`resnest_fused.fuse`.
    """
    load_state(model, read_checkpoint(path), path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load what :func:`read_checkpoint` read from ``path``, as :func:`load_checkpoint` does.

    Example::

        load_state(model, read_checkpoint("resnest50.pth"), "resnest50.pth")

    Raises:
        CheckpointError: keys or shapes differ from the model's. The model is then as it was.
    """
    expected = model.state_dict()
    absent = tuple(f"{name}." for name in getattr(model, "absent_modules", ()))
    state = {key: value for key, value in state.items() if not key.startswith(absent)}
    complaints = [
        _listing("missing", (key for key in expected if key not in state)),
        _listing("unexpected", (key for key in state if key not in expected)),
        _listing(
            "of another shape",
            (
                f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
                for key, value in expected.items()
                if key in state and state[key].shape != value.shape
            ),
        ),
    ]
    if any(complaints):
        raise CheckpointError(
            f"{os.fspath(path)}: not a checkpoint of this {type(model).__name__}: "
            + "; ".join(filter(None, complaints))
        )
    model.load_state_dict(state)


def _listing(what: str, keys: Iterable[str]) -> str:
    """How many ``keys`` there are, and the first few; empty when there are none."""
    found = list(keys)
    if not found:
        return ""
    named = ", ".join(found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    return f"{len(found)} {what} ({named})"
