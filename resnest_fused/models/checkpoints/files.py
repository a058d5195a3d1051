"""Reads and writes files of tensors by name: torch.save's and safetensors', here or at a URL."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import sys
import tempfile
import urllib.parse
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# Where training scripts put the weights; the first of these that a file has is taken.
ENTRIES = (
    *("state_dict", "model", "model_state_dict", "net", "network", "weights", "params"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict", "teacher", "module"),
)
Source = str | os.PathLike[str]

_NAMED = 3  # how many of a kind an error names


class CheckpointError(ValueError):
    """A file is no checkpoint, or not one of this model; says which file and what did not fit."""


def read_tensors(source: Source, sha256: str | None = None, entry: str | None = None) -> Any:
    """The dictionary of tensors in a file, still with the names and prefixes that it has there.

    Files of ``torch.save`` are read with ``weights_only=True``, so no code in them runs. Those of
    safetensors are recognised under any name.

    Raises:
        CheckpointError: as :func:`resnest_fused.models.read_checkpoint`.
    """
    path = fetch(source, sha256)
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    return _checked(_find_state(content, entry, source), source, content)


def fetch(source: Source, sha256: str | None = None) -> Path:
    """The file itself; one at a URL is downloaded once, and only with its hash.

    Args:
        source: a path, or a URL (http, https, file).
        sha256: the hash, or its first digits, eight at least, as the official file names have.

    Raises:
        CheckpointError: no file, no hash for a URL, no connection, or another hash.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"expected a file or a URL, got {type(source).__name__}")
    name = os.fspath(source)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{8,64}", sha256):
        raise CheckpointError(f"sha256: expected 8 to 64 hexadecimal digits, got {sha256!r}")
    path = Path(name)
    if re.match(r"(https?|file)://", name, re.IGNORECASE):
        if sha256 is None:
            raise CheckpointError(f"{name}: a URL is downloaded only with its sha256")
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        last = Path(urllib.parse.urlparse(name).path).name
        path = folder / f"{sha256[:8].lower()}-{last}"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _download(name, path)
    elif not os.path.isfile(name):  # Path's own raises OSError for some names
        raise CheckpointError(f"{name}: not a file that exists")
    elif not os.access(name, os.R_OK):
        raise CheckpointError(f"{name}: may not be read")
    if sha256 is not None:
        found = _hash_of(path)
        if not found.startswith(sha256.lower()):
            if path != Path(name):
                path.unlink()
            raise CheckpointError(f"{name}: expected the sha256 {sha256.lower()}, got {found}")
    return path


def _download(url: str, path: Path) -> None:
    try:
        torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    # What goes wrong between here and a server is of many classes, most of them OSErrors.
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{url}: cannot be downloaded ({error})") from error


def _hash_of(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def write_tensors(state: Mapping[str, Tensor], path: Source) -> None:
    """Write tensors by name, as safetensors if the file's name ends so, else by ``torch.save``.

    Behind a symbolic link the file that it names is replaced.

    Raises:
        CheckpointError: the file cannot be written, or the path is that of a folder, a device or a
            pipe. What was there before is then still there.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):  # as in reading
        raise CheckpointError(f"{path}: not a file, but a folder, a device or a pipe")
    # Copies: of a view all of its storage would be written, and safetensors takes no shared one.
    own: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    tensors = {key: value.detach().to("cpu", **own) for key, value in state.items()}
    save: Callable[[Any, str], None] = _save_torch
    if target.suffix == ".safetensors":
        save = _safetensors(target).save_file
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            temporary = file.name
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        save(tensors, temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # a temporary file is its owner's alone
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{target}: cannot be written ({error})") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _save_torch(tensors: Any, path: str) -> None:
    # To an open file: a path's name would be in it, so that the same weights had other bytes.
    with open(path, "wb") as file:
        torch.save(tensors, file)


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(f"{path}: needs a package; try pip install safetensors") from error
    return safetensors.torch


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its content: the size of a header in JSON, and the header."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> Any:
    package = _safetensors(path)
    try:
        return package.load_file(path)
    except Exception as error:  # its own class, and what a damaged header leads to
        raise CheckpointError(
            f"{path}: truncated, damaged, or not safetensors ({error})"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    # A damaged file can make the unpickler raise almost anything.
    except Exception as error:
        raise CheckpointError(f"{path}: {_why_unreadable(path)}") from error


def _check_sums(path: Path) -> None:
    """Read a file of ``torch.save`` for the checksums in it, which ``torch.load`` ignores.

    A sum of 0 is none: torch writes that if it is told to save the time.

    Raises:
        zipfile.BadZipFile: a record has another sum than it was written with.
    """
    if not zipfile.is_zipfile(path):  # of the older format, or no checkpoint at all
        return
    with zipfile.ZipFile(path) as archive:
        for record in filter(lambda record: record.CRC, archive.infolist()):
            with archive.open(record) as file:
                while file.read(1 << 20):
                    pass


def _find_state(content: Any, entry: str | None, source: Source) -> Any:
    """The state_dict in what a file holds: in the entry that is asked for, or in a usual one."""
    if entry is not None:
        held = content if isinstance(content, Mapping) else {}
        if not isinstance(held.get(entry), Mapping):
            entries = ", ".join(repr(k) for k, v in held.items() if isinstance(v, Mapping))
            raise CheckpointError(
                f"{os.fspath(source)}: no state_dict under {entry!r}; it has {entries or 'none'}"
            )
        content = held[entry]
    while isinstance(content, Mapping):
        inner = next((k for k in ENTRIES if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    return content


def _checked(state: Any, source: Source, content: Any) -> dict[str, Tensor]:
    name = os.fspath(source)
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{name}: expected a state_dict, got {type(state).__name__}"
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
                f"{name}: expected dense real tensors by name, got {_describe(value)} under {key!r}"
                + _other_entries(content, state)
            )
    return dict(state)


def _other_entries(content: Any, state: Any) -> str:
    """What to do where a file has its weights in another entry than the one that was taken."""
    held = content.items() if isinstance(content, Mapping) else ()
    others = [repr(k) for k, v in held if v is not state and _holds_tensors(v)]
    return f"; entry= takes one of {', '.join(others)}" if others else ""


def _holds_tensors(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else ()
    return any(isinstance(each, Tensor) for each in inner)


def _why_unreadable(path: Path) -> str:
    try:
        refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or of a format without a list of what it holds
        refused = []
    if not refused:
        return "truncated, damaged, or not a checkpoint that torch.load(weights_only=True) accepts"
    content = _outline(path)
    entries = content if isinstance(content, Mapping) else {}
    places = [repr(key) for key, value in entries.items() if _has_placeholder(value)]
    loaded = f"torch.load({os.fspath(path)!r}, weights_only=False)"
    kept = _weights_of(content, loaded, refused)
    ways = []
    if kept is not None:
        ways.append(f"keep its weights alone with torch.save({kept}, NEW_FILE)")
    if len(refused) <= _NAMED and not (_has_arrays(refused) or _has_modules(refused)):
        names = ", ".join(refused)
        ways.append(f"load it within torch.serialization.safe_globals([{names}])")
    return (
        f"holds {_few(refused)}"
        + (f" under {_few(places)}" if places else "")
        + ", which torch.load(weights_only=True) refuses, as loading could run code. If you trust "
        + f"the file, {', or '.join(ways) or f'save the weights in {loaded} alone'}"
    )


def _few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _weights_of(content: Any, loaded: str, refused: Sequence[str]) -> str | None:
    """The expression that gives the weights in what ``loaded`` gives; None if it is not known."""
    if isinstance(content, _Placeholder):
        return f"{loaded}.state_dict()" if _has_modules(refused) else None
    if not isinstance(content, Mapping) or not content:
        return None
    for key in ENTRIES:
        if isinstance(content.get(key), (Mapping, _Placeholder)):
            return _weights_of(content[key], f"{loaded}[{key!r}]", refused)
    if _has_arrays(refused) and all(isinstance(v, _Placeholder) for v in content.values()):
        return f"{{k: torch.as_tensor(v) for k, v in {loaded}.items()}}"
    return None if _has_placeholder(content) else loaded


def _has_arrays(refused: Sequence[str]) -> bool:
    return "numpy.ndarray" in refused


def _has_modules(refused: Sequence[str]) -> bool:
    return any(name.startswith("torch.nn.") for name in refused)


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


def _outline(path: Path) -> Any:
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
