"""Batches from a source: which process gets what, when, and with which random numbers."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from resnest_fused.training.augmentation import Transform, apply_seeded
from resnest_fused.training.config import Config, ConfigError
from resnest_fused.training.datasets import Source
from resnest_fused.training.distributed import World
from resnest_fused.training.errors import BadPicture
from resnest_fused.training.shards import ShardPictures, Shards
from resnest_fused.training.stopping import held_back

Key = tuple[int, int]


class Pictures(Dataset[tuple[Tensor, int, str]]):
    """Transformed pictures, labels and complaints, by epoch and number.

    Random numbers depend on the seed, the epoch and the picture alone: neither on the process that
    loads it nor on what was loaded before. In the place of a picture that cannot be decoded comes
    the next one that can, and the complaint names the bad one.

    Args:
        source: pictures and labels.
        transform: of a picture.
        seed: of all random numbers.
        strict: raise at a picture that cannot be decoded.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, strict: bool) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.strict = strict

    def __getitem__(self, key: Key) -> tuple[Tensor, int, str]:
        epoch, index = key
        complaint = ""
        for tried in range(len(self.source)):
            number = (index + tried) % len(self.source)
            try:
                image, label = self.source[number]
            except ValueError as error:
                if self.strict:
                    raise BadPicture(str(error)) from error
                complaint = complaint or str(error)
                continue
            return apply_seeded(self.transform, image, self.seed, epoch, index), label, complaint
        raise BadPicture(f"no picture can be decoded; the first: {complaint}")


class EpochSampler(StatefulDistributedSampler):
    """A process's share of a random order that is new in each epoch, as keys of Pictures.

    Its state, how many samples it gave, is set from what the training took, since processes that
    load take some ahead.
    """

    def __iter__(self) -> Iterator[Key]:
        return ((self.epoch, index) for index in super().__iter__())


class ShareSampler(Sampler[Key]):
    """A process's share of all, in order; no picture comes twice, so shares may differ by one."""

    def __init__(self, count: int, rank: int, size: int) -> None:
        self.numbers = range(rank, count, size)

    def __iter__(self) -> Iterator[Key]:
        return ((0, index) for index in self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class Batches(Protocol):
    """One process's batches of pictures, labels and complaints, epoch by epoch."""

    def __len__(self) -> int:
        """How many an epoch has."""

    def begin(self, epoch: int, taken: int = 0) -> Iterator[Any]:
        """The batches of an epoch, without the first ``taken`` ones."""


def training_batches(
    source: Source | Shards, transform: Transform, config: Config, world: World
) -> Batches:
    """Whole batches in random order; every process has as many.

    Raises:
        ConfigError: there are fewer shards than processes that load them.
    """
    if isinstance(source, Shards):
        return _ShardBatches(source, transform, config, world)
    return _PictureBatches(source, transform, config, world)


class _PictureBatches:
    def __init__(self, source: Source, transform: Transform, config: Config, world: World) -> None:
        self.batch = config.batch
        self.sampler = EpochSampler(
            source, world.size, world.rank, seed=config.seed, drop_last=True
        )
        pictures = Pictures(source, transform, config.seed, config.strict_data)
        self.loader = _loader(
            pictures, config, world, sampler=self.sampler, drop_last=True,
            persistent_workers=config.workers > 0,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.loader)

    def begin(self, epoch: int, taken: int = 0) -> Iterator[Any]:
        self.sampler.set_epoch(epoch)
        self.sampler.load_state_dict({"yielded": taken * self.batch})
        return iter(self.loader)


class _ShardBatches:
    def __init__(self, shards: Shards, transform: Transform, config: Config, world: World) -> None:
        needed = world.size * max(config.workers, 1)
        if len(shards.urls) < needed:
            raise ConfigError(
                f"data: expected a shard for each of {needed} processes that load, got "
                f"{len(shards.urls)}"
            )
        self.count = shards.samples // (world.size * config.batch)
        self.pictures = ShardPictures(
            shards, transform, config.seed, config.strict_data, world.rank, world.size
        )
        self.loader = _loader(self.pictures, config, world)

    def __len__(self) -> int:
        return self.count

    def begin(self, epoch: int, taken: int = 0) -> Iterator[Any]:
        self.pictures.epoch = epoch
        batches = itertools.islice(self.loader, self.count)
        for _ in range(taken):  # shards have no other way to a place than through what is before it
            next(batches)
        return batches


def evaluation_batches(
    source: Source | Shards, transform: Transform, config: Config, world: World
) -> Iterable[Any]:
    """All pictures, each once in one of the processes, in order."""
    options = transform, config.seed, config.strict_data
    if isinstance(source, Shards):
        return _loader(ShardPictures(source, *options, world.rank, world.size), config, world)
    share = ShareSampler(len(source), world.rank, world.size)
    return _loader(Pictures(source, *options), config, world, sampler=share)


def _loader(
    pictures: Dataset[Any], config: Config, world: World, **options: Any
) -> DataLoader[Any]:
    context = None
    if config.workers:
        # A fork of a process with torch's threads may hang; this one forks before it has any.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        _start_server()
        options["worker_init_fn"] = functools.partial(_end_with, _lifeline()[0])
    return DataLoader(
        pictures,
        batch_size=config.batch,
        num_workers=config.workers,
        pin_memory=world.device.type == "cuda",
        multiprocessing_context=context,
        # Of its own, as a loader draws a seed for its workers when it begins.
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def _start_server() -> None:
    """Start what forks loading processes, so that a signal to the whole group ends none of them."""
    # One by one: at the end the tracker's start lets SIGTERM and SIGINT through again.
    for each in (resource_tracker, forkserver):
        with held_back():
            each.ensure_running()


@functools.cache
def _lifeline() -> tuple[Connection, Connection]:
    """A pipe whose writing end is this process's alone: the other one tells when it has ended."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    # Before multiprocessing waits for processes that do not hear its SIGTERM.
    atexit.register(writer.close)
    return reader, writer


def _end_with(reader: Connection, worker: int) -> None:
    """In a loading process: end when the one that trains does, however that comes.

    torch's loading processes watch their parent, which here is the server that forks them. It stays
    as long as they do.
    """

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            reader.recv()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
