"""Pictures from WebDataset's shards: tar files that each process reads some of, in order."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import webdataset
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from resnest_fused.training.augmentation import Transform, apply_seeded, mix_seeds
from resnest_fused.training.errors import BadPicture

_BUFFER = 1000  # encoded pictures among which the next one is drawn
_SUFFIXES = ("jpg", "jpeg", "png", "webp", "ppm")


class Shards(NamedTuple):
    """Tar files of pictures (jpg, png and others) and labels (cls), as WebDataset writes them.

    Attributes:
        urls: files, or what else WebDataset opens.
        samples: how many an epoch has; 0 for all, once.
    """

    urls: list[str]
    samples: int


def find_shards(urls: str, samples: int = 0) -> Shards:
    """The shards of a pattern like ``train-{000..146}.tar``."""
    return Shards(list(webdataset.shardlists.expand_urls(urls)), samples)


class ShardPictures(IterableDataset[tuple[Tensor, int, str]]):
    """Transformed pictures, labels and complaints of one process among many.

    Training goes over the shards in an order that is new each time, endlessly, and draws each
    picture from a buffer of 1000; evaluation takes all once. A picture that cannot be decoded is
    left out, and the one before or after it brings the complaint, one in a line; so does one of a
    shard that cannot be read to its end. All depends on the seed, the epoch, and the numbers of
    processes that train and load.

    Args:
        shards: which files.
        transform: of a picture.
        seed: of all random numbers.
        strict: raise at a picture that cannot be decoded.
        rank, size: the process among those that train.

    Attributes:
        epoch: is set before an iteration begins.
    """

    def __init__(
        self, shards: Shards, transform: Transform, seed: int, strict: bool, rank: int, size: int
    ) -> None:
        self.shards = shards
        self.transform = transform
        self.seed = seed
        self.strict = strict
        self.rank = rank
        self.size = size
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, int, str]]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        share = self.rank * count + number
        held: tuple[Tensor, int] | None = None  # until it is known what follows
        complaints: list[str] = []

        def complain(error: ValueError) -> None:
            if self.strict:
                raise BadPicture(str(error)) from error
            complaints.append(str(error))

        place = 0
        for turn in itertools.count() if self.shards.samples else (0,):
            before = place
            for sample in self._samples(turn, share, self.size * count, complain):
                try:
                    image, label = _decode(sample)
                except ValueError as error:
                    complain(error)
                    continue
                if held is not None:
                    yield *held, "\n".join(complaints)
                    complaints.clear()
                numbers = (self.seed, self.epoch, share, place)
                held = apply_seeded(self.transform, image, *numbers), label
                place += 1
            if self.shards.samples and place == before:  # as in every other turn
                first = complaints[0] if complaints else "the shards are empty"
                raise BadPicture(f"no picture can be decoded; the first: {first}")
        if held is not None:
            yield *held, "\n".join(complaints)

    def _samples(
        self, turn: int, share: int, shares: int, complain: Callable[[ValueError], None]
    ) -> Iterator[dict[str, Any]]:
        """A share's samples in a turn over all shards, not decoded."""
        urls, endless = self.shards
        seed = mix_seeds(self.seed, self.epoch, turn)
        order = np.random.default_rng(seed).permutation(len(urls)) if endless else range(len(urls))
        samples = _read((urls[index] for index in order[share::shares]), complain)
        if endless:
            samples = webdataset.shuffle(_BUFFER, seed=mix_seeds(seed, share))(samples)
        return samples


def _read(urls: Iterable[str], complain: Callable[[ValueError], None]) -> Iterator[dict[str, Any]]:
    """The samples of shards; of one that is truncated or damaged those in front."""
    for url in urls:
        stages = webdataset.SimpleShardList([url]), webdataset.tarfile_to_samples()
        try:
            yield from webdataset.DataPipeline(*stages)
        except (OSError, tarfile.TarError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error.args[0]
            complain(ValueError(f"{_name(url)}: cannot be read ({reason})"))


def _name(url: str) -> str:
    """A shard's name without its folder, which may be moved."""
    return url.rpartition("/")[2]


def _decode(sample: dict[str, Any]) -> tuple[Image.Image, int]:
    """The picture in RGB and the label of a sample.

    Raises:
        ValueError: one is not there, or cannot be decoded; the message names shard and sample.
    """
    name = f"{_name(sample['__url__'])}: {sample['__key__']}"
    picture = next((sample[suffix] for suffix in _SUFFIXES if suffix in sample), None)
    if picture is None or "cls" not in sample:
        raise ValueError(f"{name}: expected a picture (.jpg, .png, ...) and a label (.cls)")
    try:
        with Image.open(io.BytesIO(picture)) as image:
            return image.convert("RGB"), int(sample["cls"])
    except UnidentifiedImageError as error:  # whose own message has an address in memory
        raise ValueError(f"{name}: not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be decoded ({error})") from error
