"""Where pictures and labels come from: folders, torchvision's datasets, digits, random numbers."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision import datasets

from resnest_fused.models import images
from resnest_fused.training.config import Config, ConfigError
from resnest_fused.training.shards import Shards, find_shards


class Source(Protocol):
    """Pictures in RGB with their labels, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The picture and its label.

        Raises:
            ValueError: the picture cannot be decoded; the message names it.
        """


class Data(NamedTuple):
    """What a network learns from, and what it is evaluated on.

    Attributes:
        train, val: pictures with labels.
        classes: their names.
    """

    train: Source | Shards
    val: Source | Shards
    classes: list[str]


def find_data(config: Config) -> Data:
    """The data that ``config.data`` names.

    Raises:
        ConfigError: there are none such, or they are not complete.
    """
    kind, _, name = config.data.partition(":")
    if kind == "torchvision" and name:
        return _torchvision(name, config)
    if kind == "webdataset" and name:
        return _shards(name, config)
    if config.data == "digits":
        return _digits()
    if config.data == "synthetic":
        return _synthetic(config)
    if not config.data:
        raise ConfigError(
            "data: expected a folder, torchvision:NAME, webdataset:URLS, digits or synthetic"
        )
    return _folders(Path(config.data))


def find_evaluation_data(config: Config) -> tuple[Source | Shards, list[str]]:
    """Pictures to evaluate on, and the names of their classes; a folder may have these alone.

    Raises:
        ConfigError: there are none such.
    """
    root = Path(config.data)
    if config.data and root.is_dir() and not (root / "val").is_dir():
        found = _folder(root, root)
        return found, found.classes
    data = find_data(config)
    return data.val, data.classes


def _folder(folder: Path, root: Path) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(str(folder), loader=partial(_read_below, root))
    except FileNotFoundError as error:
        raise ConfigError(f"data: {error}".splitlines()[0]) from error


def _read_below(root: Path, path: str) -> Image.Image:
    """The picture in a file; an error names it as below a folder, which may be moved."""
    try:
        return images.read_image(path)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{root}{os.sep}")) from error


def _folders(root: Path) -> Data:
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise ConfigError(f"data: {root}: expected the folders train and val in it")
    train, val = _folder(root / "train", root), _folder(root / "val", root)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ConfigError(f"data: {root}: train and val have other classes, such as {odd[0]!r}")
    return Data(train, val, train.classes)


def describe(data: Data) -> dict[str, Any]:
    """What a run that goes on must find again: classes, numbers of pictures, names of files."""
    return {
        "classes": list(data.classes),
        "train": _describe_side(data.train),
        "val": _describe_side(data.val),
    }


def _describe_side(source: Source | Shards) -> dict[str, Any]:
    names: list[str] = []  # below the folder, which may be moved
    if isinstance(source, Shards):
        names = [url.rpartition("/")[2] for url in source.urls]
        return {"shards": len(names), "names": _hash(names)}
    if isinstance(source, datasets.ImageFolder):
        names = [path.removeprefix(str(source.root)) for path, _ in source.samples]
    return {"pictures": len(source), "names": _hash(names)}


def _hash(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def find_difference(known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what the data of :func:`describe` are not those of a run; empty if they are the same."""
    if known["classes"] != now["classes"]:
        odd = sorted(set(known["classes"]) ^ set(now["classes"]))
        which = f", such as {odd[0]!r}" if odd else " in this order"
        return f"the run has other classes than these data{which}"
    for side in ("train", "val"):
        for name, value in now[side].items():
            before = known[side].get(name)
            if before != value:
                if name == "names":
                    return f"in {side} the files have other names than those of the run"
                return f"the run has {before} {name} in {side}, these data {value}"
    return ""


class _Converted:
    """Another dataset's pictures in RGB."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
            return image.convert("RGB"), int(label)
        except UnidentifiedImageError as error:  # whose own message has a path or an address
            raise ValueError(f"{self.name}[{index}]: not an image that Pillow can read") from error
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{self.name}[{index}]: cannot be decoded ({error})") from error


def _torchvision(name: str, config: Config) -> Data:
    kind = getattr(datasets, name, None)
    if not inspect.isclass(kind):
        raise ConfigError(f"data: torchvision has no dataset {name!r}")
    taken = inspect.signature(kind).parameters
    options: dict[str, Any] = {"download": config.download} if "download" in taken else {}
    sides: list[list[dict[str, Any]]]
    if "train" in taken:
        sides = [[{"train": True}], [{"train": False}]]
    elif "split" in taken:
        sides = [[{"split": "train"}], [{"split": "test"}, {"split": "val"}]]
    else:
        raise ConfigError(f"data: torchvision's {name} has no split for evaluation")
    found = [_first(kind, config.root, each, options) for each in sides]
    classes = getattr(found[0], "classes", None)
    if classes is None:
        labels = {int(found[0][index][1]) for index in range(len(found[0]))}
        classes = [str(label) for label in range(max(labels) + 1)]
    names = [c if isinstance(c, str) else ", ".join(map(str, c)) for c in classes]
    train, val = (_Converted(each, name) for each in found)
    return Data(train, val, names)


def _first(kind: Any, root: str, choices: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    """The dataset with the first of several choices that it knows."""
    for choice in choices:
        try:
            return kind(root, **choice, **options)
        except ValueError as error:
            problem: Exception = error
        except RuntimeError as error:  # its files are not there
            raise ConfigError(
                f"data: {str(error).splitlines()[0]}; --download fetches it"
            ) from error
        except TypeError as error:  # it needs more than the options that the others have
            raise ConfigError(f"data: {error}") from error
    raise ConfigError(f"data: {problem}")


def _shards(urls: str, config: Config) -> Data:
    for name in ("val", "classes", "samples"):
        if not getattr(config, name):
            raise ConfigError(f"{name}: shards do not tell it, and it was not given")
    classes = [str(label) for label in range(config.classes)]
    train, val = find_shards(urls, config.samples), find_shards(config.val)
    for option, shards in (("data", train), ("val", val)):
        for url in shards.urls:
            if not urlsplit(url).scheme and not os.path.isfile(url):
                raise ConfigError(f"{option}: {url}: not a file that exists")
    return Data(train, val, classes)


class _Arrays:
    """Pictures in memory: ``(N, H, W, 3)`` of bytes."""

    def __init__(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        self.pictures = pictures
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pictures[index % len(self.pictures)]), int(self.labels[index])


def _digits() -> Data:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8; every fifth is for evaluation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = (found.images * (255 / 16)).round().astype(np.uint8)
    pictures = np.repeat(grey[..., None], 3, axis=3)
    held_out = np.arange(len(pictures)) % 5 == 4
    train, val = (_Arrays(pictures[side], found.target[side]) for side in (~held_out, held_out))
    return Data(train, val, [str(digit) for digit in range(10)])


def _synthetic(config: Config) -> Data:
    """Noise of the crop's size, of which an epoch takes some pictures often."""
    generator = np.random.default_rng(config.seed)
    samples = config.samples or 1280
    shape = (min(samples, 64), config.crop, config.crop, 3)
    pictures = generator.integers(0, 256, shape, dtype=np.uint8)
    count = config.classes or 1000
    labels = generator.integers(0, count, samples)
    data = _Arrays(pictures, labels)
    return Data(data, data, [str(label) for label in range(count)])
