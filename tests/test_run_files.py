"""Files of a run, without what trains: torn and damaged checkpoints, full disks, killed writers."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import WAYS_TO_TEAR, tear

from resnest_fused.models import CheckpointError
from resnest_fused.training import checkpoints
from resnest_fused.training.files import replacing


def state(step: int) -> dict[str, Any]:
    return {"step": step, "config": {}, "model": {"weight": torch.full((50_000,), float(step))}}


def write(folder: Path, *steps: int) -> list[Path]:
    paths = [checkpoints.path_of(folder, step) for step in steps]
    for step, path in zip(steps, paths, strict=True):
        checkpoints.write(state(step), path)
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("how", WAYS_TO_TEAR)
def test_the_newest_whole_checkpoint_is_found(how: str, tmp_path: Path) -> None:
    _, whole, torn = write(tmp_path, 3, 5, 12)
    tear(torn, how)
    warnings: list[str] = []
    assert checkpoints.find_newest(tmp_path, warnings.append) == whole
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{torn}: ") and warnings[0].endswith("the one before")
    assert torn.with_suffix(".damaged").is_file() and not torn.exists()
    assert checkpoints.read(whole)["model"]["weight"][0] == 5


def test_five_torn_ones_are_passed_over_and_six_are_an_error(tmp_path: Path) -> None:
    paths = write(tmp_path, 1, 2, 3, 4, 5, 6)
    for path, how in zip(paths[1:], WAYS_TO_TEAR, strict=False):
        tear(path, how)
    warnings: list[str] = []
    assert checkpoints.find_newest(tmp_path, warnings.append) == paths[0]
    assert len(warnings) == 5
    tear(paths[0], "half")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole"):
        checkpoints.find_newest(tmp_path, warnings.append)


def test_other_files_are_no_checkpoints_of_a_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of a training run"):
        checkpoints.read(tmp_path / "other.pt")
    assert checkpoints.find_newest(tmp_path, pytest.fail) is None


@pytest.mark.parametrize("room", [0, 50, 1000, 100_000])
def test_a_write_that_fails_leaves_the_last_checkpoint(room: int, tmp_path: Path) -> None:
    """A limit of the size of files fails as a full disk does, anywhere in a file."""
    write(tmp_path, 7)
    (tmp_path / "config.yaml").write_bytes(b"known")
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.raises(CheckpointError, match=r"8\.pt: cannot be written \(File too large\)"):
            write(tmp_path, 8)
        with (
            pytest.raises(OSError, match=r"File too large: '.*config\.yaml'"),
            replacing(tmp_path / "config.yaml") as file,
        ):
            file.write(bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("names", ["two", "one"])
def test_the_best_is_kept_beside_the_last(
    names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a second name, or where the file system gives a file but one, as a copy."""

    def link(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if names == "one":
        monkeypatch.setattr(os, "link", link)
    for path in write(tmp_path, 1, 2, 3):
        if "3" not in path.name:
            checkpoints.keep_best(path)
            assert (tmp_path / "best.pt").read_bytes() == path.read_bytes()
    (tmp_path / "step-00000004.pt.tmp").write_bytes(b"of a process that was killed")
    checkpoints.prune(tmp_path, 1)
    assert set(contents(tmp_path)) == {"best.pt", "step-00000003.pt"}
    assert checkpoints.read(tmp_path / "best.pt")["step"] == 2


def test_a_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    """Killed 20 times, at random moments."""
    generator = random.Random(0)
    step = 0
    for _ in range(20):
        child = os.fork()
        if not child:
            try:
                while True:
                    step += 1
                    (path,) = write(tmp_path, step)
                    checkpoints.keep_best(path)
                    checkpoints.prune(tmp_path, 2)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.01, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        newest = checkpoints.find_newest(tmp_path, pytest.fail)
        if newest is not None:
            found = checkpoints.read(newest)
            step = found["step"]
            assert torch.equal(found["model"]["weight"], state(step)["model"]["weight"])
            assert step - 1 <= checkpoints.read(tmp_path / "best.pt")["step"] <= step
    assert step > 1
