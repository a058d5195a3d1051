"""How fast the parts of a training run are, each alone: loading, the step, the all-reduce."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from resnest_fused.training.config import Config, ConfigError
from resnest_fused.training.datasets import find_data
from resnest_fused.training.distributed import World, join
from resnest_fused.training.loop import Trainer

# What pictures and classes are like in the data sets of these names.
SHAPES: dict[str, dict[str, Any]] = {
    "imagenet": {"crop": 224, "eval_crop": 224, "classes": 1000},
    "cifar": {"crop": 32, "eval_crop": 32, "classes": 10},
}
_WARM, _STEPS, _SECONDS = 2, 10, 30.0


class Throughput(NamedTuple):
    """What was measured, in all processes together.

    Attributes:
        processes, batch: how many, and samples of each in a step.
        gradient_bytes: what a step reduces over the processes.
        loading, stepping, training: images per second of the loader alone, of steps on one batch
            without other processes, and of both with the all-reduce.
        step_seconds: the median of a step without other processes.
        exchange_seconds: by how much the all-reduce makes it longer; 0 for one process.
        reduce_seconds: the median of an all-reduce of those bytes alone.
    """

    processes: int
    batch: int
    gradient_bytes: int
    loading: float
    stepping: float
    training: float
    step_seconds: float
    exchange_seconds: float
    reduce_seconds: float


def measure(config: Config, shape: str) -> Throughput:
    """Time the parts of a run, which writes nothing; each process that torchrun started calls this.

    Args:
        config: the options, but for the data.
        shape: a name in SHAPES.

    Raises:
        ConfigError: an option has a wrong value.
    """
    if config.fsdp:
        raise ConfigError("fsdp: a step cannot be timed apart from what it exchanges; leave it out")
    with join(config.device, config.timeout) as world:
        # Batches that are loaded ahead, by torch's default, and those that are timed.
        ahead, count = 2 * config.workers, _STEPS + 4 * config.workers
        batches = 1 + ahead + count * config.accumulate
        samples = batches * config.batch * world.size
        changes = {"data": "synthetic", "samples": samples, **SHAPES[shape]}
        return _measure(dataclasses.replace(config, **changes), world, ahead, count)


def _measure(config: Config, world: World, ahead: int, count: int) -> Throughput:
    trainer = Trainer(config, find_data(config), world)
    samples = config.batch * config.accumulate
    loaded = trainer.batches.begin(0)
    batch = next(loaded)
    _drain(loaded, ahead)
    loading = _pace(world, lambda: next(loaded), count) / config.batch

    forever = itertools.repeat(batch)
    wrapped, trainer.wrapped = trainer.wrapped, trainer.network
    alone = _median(world, lambda: trainer._take_step(forever))
    trainer.wrapped = wrapped
    together = _median(world, lambda: trainer._take_step(forever)) if world.size > 1 else alone

    gradients = [p for p in trainer.network.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in gradients), device=world.device)
    reduce = _median(world, lambda: dist.all_reduce(flat)) if world.size > 1 else 0.0

    loaded = trainer.batches.begin(1)
    _drain(loaded, ahead)
    whole = _pace(world, lambda: trainer._take_step(loaded), count)
    return Throughput(
        processes=world.size,
        batch=samples,
        gradient_bytes=flat.numel() * flat.element_size(),
        loading=world.size / loading,
        stepping=world.size * samples / alone,
        training=world.size * samples / whole,
        step_seconds=alone,
        exchange_seconds=together - alone,
        reduce_seconds=reduce,
    )


def _drain(loaded: Iterator[Any], ahead: int) -> None:
    """Take what was loaded while nobody waited for it."""
    for _ in range(ahead):
        next(loaded)


def _pace(world: World, call: Callable[[], Any], most: int) -> float:
    """Seconds from call to call, in the mean over many and over the processes.

    Several loading processes deliver in bursts, of which a median would see the inside only.
    """
    began = time.perf_counter()
    count = 0
    while count < most and not world.any(time.perf_counter() - began > _SECONDS):
        call()
        count += 1
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    value = torch.tensor((time.perf_counter() - began) / count, device=world.device)
    return float(world.mean(value))


def _median(world: World, call: Callable[[], Any]) -> float:
    """Seconds of a call, in the mean over the processes, after some calls that do not count."""
    seconds: list[float] = []
    began = time.perf_counter()
    for number in range(_WARM + _STEPS):
        # The slowest process decides whether all go on: they reduce in every step.
        if world.any(number > _WARM and time.perf_counter() - began > _SECONDS):
            break
        start = time.perf_counter()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - start)
    counted = seconds[min(_WARM, len(seconds) - 1) :]
    value: Tensor = torch.tensor(statistics.median(counted), device=world.device)
    return float(world.mean(value))
