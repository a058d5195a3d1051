"""Checkpoints of a run as files: written whole or not at all, and verified when read."""

from __future__ import annotations

import errno
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from resnest_fused.models import CheckpointError
from resnest_fused.training.files import replacing, sync_folder

BEST = "best.pt"


def path_of(folder: Path, step: int) -> Path:
    """The file of the checkpoint that was written after so many steps."""
    return folder / f"step-{step:08d}.pt"


def list_files(folder: Path) -> list[Path]:
    """All checkpoints but the best, newest first; damaged ones too."""
    found = [path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)


def write(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint.

    The process may be killed at any moment: a file with the final name is always whole.

    Raises:
        CheckpointError: the file cannot be written, as on a full disk. What was there still is.
    """
    try:
        with replacing(path) as file:
            torch.save(state, file)
    # torch.save reports a write that failed as one or the other.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """What the system said, if that is behind an error; else the error's first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).splitlines()[0]


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, after the checksums of all its parts were verified.

    Raises:
        CheckpointError: the file is truncated, damaged, or no checkpoint of a run.
    """
    verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # almost anything
        raise CheckpointError(f"{path}: not a checkpoint of a training run ({error})") from error
    if not isinstance(state, dict) or not {"model", "config", "step"} <= set(state):
        raise CheckpointError(f"{path}: not a checkpoint of a training run")
    return state


def verify(path: Path) -> None:
    """Compare the checksums of all parts of a file with those that torch.save noted in it.

    Raises:
        CheckpointError: the file is truncated or damaged, or not of torch.save.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            damaged = parts.testzip()
    # Damage can make zipfile raise almost anything.
    except Exception as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged ({damaged} has another checksum)")


def find_newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; None if there are none at all.

    Newer ones that are damaged get another name, so that they are not counted among those to keep.

    Args:
        folder: where they are.
        warn: is called with a message for each damaged one that is passed over.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    files = list_files(folder)
    for number, path in enumerate(files):
        try:
            read(path)
        except CheckpointError as error:
            warn(f"{error}; going back to the one before")
        else:
            for damaged in files[:number]:
                damaged.rename(damaged.with_suffix(".damaged"))
            return path
    if files:
        raise CheckpointError(f"{folder}: none of {len(files)} checkpoints is whole")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what a killed process left."""
    for path in [*list_files(folder)[keep:], *folder.glob("*.tmp")]:
        path.unlink(missing_ok=True)


def keep_best(path: Path) -> None:
    """Keep a checkpoint as the best one: by a second name, or as a copy where a file has but one.

    Raises:
        CheckpointError: the file cannot be written.
    """
    best, second = path.with_name(BEST), path.with_name("second_name.tmp")
    try:
        second.unlink(missing_ok=True)
        try:
            os.link(path, second)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            with open(path, "rb") as source, replacing(best) as file:
                shutil.copyfileobj(source, file)
        else:
            os.replace(second, best)
            sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{best}: cannot be written ({error})") from error
