"""Batches from a source: which process gets what, when, and with which random numbers."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from resnest_fused.training.augmentation import Transform
from resnest_fused.training.datasets import Source
from resnest_fused.training.distributed import ignore_stopping

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
                    raise
                complaint = complaint or str(error)
                continue
            before = torch.get_rng_state()
            # Not torch.manual_seed, which also seeds GPUs.
            torch.default_generator.manual_seed(mix_seeds(self.seed, epoch, index))
            try:
                return self.transform(image), label, complaint
            finally:
                torch.set_rng_state(before)
        raise ValueError(f"no picture can be decoded; the first: {complaint}")


def mix_seeds(*numbers: int) -> int:
    """A seed from several, such that neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


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


def make_loader(
    pictures: Pictures, sampler: Any, batch: int, workers: int, *, whole: bool, pin: bool
) -> DataLoader[Any]:
    """Batches of tensors, labels and complaints.

    Args:
        pictures, sampler: what, and in which order.
        batch: samples in a batch.
        workers: processes that load, 0 for this one.
        whole: leave out the last batch if it is smaller.
        pin: put batches where a GPU copies them fast from.
    """
    context = None
    if workers:
        # A fork of a process with torch's threads may hang; this one forks before it has any.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    return DataLoader(
        pictures,
        batch_size=batch,
        sampler=sampler,
        num_workers=workers,
        drop_last=whole,
        pin_memory=pin,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
        worker_init_fn=_begin_worker,
        # Of its own, as a loader draws a seed for its workers when it begins.
        generator=torch.Generator().manual_seed(0),
    )


def _begin_worker(number: int) -> None:
    ignore_stopping()
