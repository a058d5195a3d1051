"""A training run from its options to its exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from resnest_fused.models import CheckpointError
from resnest_fused.training import checkpoints
from resnest_fused.training.config import (
    Config,
    ConfigError,
    as_yaml,
    may_change,
    read_config,
)
from resnest_fused.training.datasets import Data, find_data
from resnest_fused.training.distributed import World, join, tell
from resnest_fused.training.errors import BadPicture, NotFinite
from resnest_fused.training.files import replacing
from resnest_fused.training.loop import Trainer
from resnest_fused.training.plots import draw_curves
from resnest_fused.training.reporting import METRICS, Reporter, read_metrics
from resnest_fused.training.stopping import StopRequest

# Exit codes. The last is EX_TEMPFAIL of sysexits.h, "try again later".
DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 75
CONFIG = "config.yaml"


def train(config: Config, beside: tuple[Path, ...] = (), stop: StopRequest | None = None) -> int:
    """Train a network, or go on with a run whose folder is there; tell of errors on stderr.

    Started by torchrun, each of its processes calls this.

    Example::

        code = train(make_config("digits", options={"out": "runs/digits"}))

    Args:
        config: the options.
        beside: other runs' folders, whose curves are drawn into the same plot.
        stop: one whose block runs already, by default one of its own.

    Returns:
        0 the end was reached; 75 a signal asked to stop, a checkpoint has all steps that were done,
        and the same call goes on from there; 1 the run failed, and the last good checkpoint is
        there; 2 wrong options, nothing was done.
    """
    try:
        with contextlib.nullcontext(stop) if stop else StopRequest() as stop:
            with join(config.device, config.timeout) as world:
                finished = _train(config, beside, world, stop)
            if finished and world.first:
                _draw(Path(config.out), beside)
    except ConfigError as error:
        return _end(WRONG, str(error))
    except BadPicture as error:
        # Of a process that loads data it comes with that one's traceback in front.
        return _end(
            FAILED, _with_last(str(error).splitlines()[-1].rpartition("BadPicture: ")[2], config)
        )
    except (CheckpointError, NotFinite, OSError) as error:
        return _end(FAILED, _with_last(str(error), config))
    except torch.OutOfMemoryError as error:
        return _end(FAILED, str(error).splitlines()[0])
    except Exception as error:
        if not dist.is_initialized():
            raise
        if _of_others(error):
            return _end(FAILED, _with_last("another process ended, or hangs", config))
        return _end(FAILED, traceback.format_exc())
    if not finished:
        if world.first:
            _warn("stopped; the same command goes on")
        return STOPPED
    return DONE


def _train(config: Config, beside: tuple[Path, ...], world: World, stop: StopRequest) -> bool:
    _agree(world, _no_run(beside) or _conflict(config) if world.first else "")
    trainer = Trainer(config, _find_data(config, world), world)
    if world.any(stop.made):
        return False
    # Nothing is written until all options are known to fit.
    with contextlib.ExitStack() as stack:
        _agree(world, _take_folder(Path(config.out), stack) if world.first else "")
        return _go_on(config, trainer, world, stop)


def _go_on(config: Config, trainer: Trainer, world: World, stop: StopRequest) -> bool:
    newest = None
    if world.first:
        newest = checkpoints.find_newest(trainer.folder, _warn)
    newest = world.of_first(newest)
    if newest is not None:
        trainer.load(checkpoints.read(newest))
    if world.first:
        with replacing(Path(config.out) / CONFIG) as file:
            file.write(as_yaml(config).encode())
    reporter = Reporter(Path(config.out), trainer.step, trainer.total, not world.first)
    if newest is not None:
        reporter.say(f"going on after step {trainer.step} of {trainer.total}, from {newest}")
    with reporter.running():
        return trainer.run(reporter, stop)


def _agree(world: World, problem: str) -> None:
    """Raise the first process's problem in all."""
    problem = world.of_first(problem)
    if problem:
        raise ConfigError(problem)


def _take_folder(folder: Path, stack: contextlib.ExitStack) -> str:
    """Make the run's folder, and keep it locked; what hinders that, if anything does.

    The system gives the lock back when the process ends, however that comes.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((folder / ".lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"out: another process is training in {folder}; end it first"
    except OSError as error:
        return f"out: {folder}: {error}"
    return ""


def _warn(message: str) -> None:
    print(f"resnest-fused: {message}", file=sys.stderr, flush=True)


def _no_run(beside: tuple[Path, ...]) -> str:
    """Which of the folders to draw has no run, if one has none."""
    for folder in beside:
        if not (folder / METRICS).is_file():
            return f"plot_with: {folder}: expected a run's folder, with {METRICS} in it"
    return ""


def _conflict(config: Config) -> str:
    """Why the run in the folder is another one, if it is and has checkpoints."""
    folder = Path(config.out)
    if not checkpoints.list_files(folder / "checkpoints"):
        return ""
    try:
        known = read_config(folder / CONFIG)
    except ConfigError as error:
        return f"out: {folder} has a run whose options are lost ({error})"
    for field in dataclasses.fields(Config):
        before, now = (getattr(each, field.name) for each in (known, config))
        if before != now and not may_change(field.name, config):
            return (
                f"out: {folder} has a run with {field.name} {before!r}, not {now!r}; name another "
                "folder, or remove it"
            )
    return ""


def _find_data(config: Config, world: World) -> Data:
    """The data; the first process fetches what is to be downloaded while the others wait."""
    if config.download and world.size > 1:
        if world.first:
            find_data(config)
        world.wait_for_first()
    return find_data(config)


def _of_others(error: Exception) -> bool:
    """Whether an error of torch's is about the other processes, which has no class of its own."""
    known = (
        "gloo",
        "nccl",
        "closed by peer",
        "timed out",
        "timeout",
        "pair closure",
        "broken pipe",
    )
    words = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(each in words for each in known)
    )


def _with_last(message: str, config: Config) -> str:
    files = checkpoints.list_files(Path(config.out) / "checkpoints")
    return f"{message}; " + (
        f"the last checkpoint is {files[0]}" if files else "no checkpoint was written"
    )


def _end(code: int, message: str) -> int:
    """Tell of an error, and leave a group of processes without waiting for any of them."""
    tell(message)
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _draw(folder: Path, beside: tuple[Path, ...]) -> None:
    folders = (folder, *beside)
    names = [each.name for each in folders]
    if len(set(names)) < len(names):
        names = ["/".join(each.parts[-2:]) for each in folders]
    draw_curves(dict(zip(names, map(read_metrics, folders), strict=True)), folder / "curves")
