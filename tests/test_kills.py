"""Runs that are killed, starved of disk space or abandoned: what is left, and what comes of it.

They need the extra ``train``. ``-m long`` makes some short ones, ``-m kills`` the rest, for a
quarter of an hour.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same, command, result, start

pytestmark = pytest.mark.timeout(900)

# 267 steps of one process or 132 of two, each with a checkpoint.
OPTIONS: dict[str, Any] = {"epochs": 3, "batch": 16, "save_every": 1, "timeout": 20}
# 22 steps or 11.
SHORT: dict[str, Any] = {**OPTIONS, "epochs": 1, "batch": 64}


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and its processes at once; torchrun's have sessions of their own."""
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def steps_of(out: Path) -> int:
    """Steps that the newest checkpoint has; it may be removed while this looks."""
    names = [path.stem for path in (out / "checkpoints").glob("step-*.pt")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def wait_for_step(process: subprocess.Popen[bytes], out: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while steps_of(out) < step:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def finish(arguments: list[str], log: Path) -> None:
    process = start(arguments, log)
    assert process.wait(timeout=240) == 0, log.read_text()


def end_of(processes: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a run ends with that nothing breaks."""
    finish(command(folder / "run", processes, **options), folder / "log")
    return result(folder / "run")


@pytest.fixture(scope="module", params=[1, 2])
def unbroken(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any]]:
    """A number of processes, and what they end with."""
    return request.param, end_of(request.param, tmp_path_factory.mktemp("unbroken"), OPTIONS)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What a short run of so many processes ends with."""

    @functools.cache
    def find(processes: int) -> dict[str, Any]:
        return end_of(processes, tmp_path_factory.mktemp("short"), SHORT)

    return find


def kill_often(
    seed: int, kills: int, processes: int, options: dict[str, Any], expected: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Kill a run at random moments all over it, with SIGKILL and all at once."""
    generator = random.Random(f"{seed} {processes}")
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = command(out, processes, **options)
    killed = []
    for number in range(kills):
        process = start(arguments, log)
        # At least a step further than the last time, and somewhere in this part of the run.
        upper = expected["state"]["step"] * (number + 1) // (kills + 1)
        known = steps_of(out) + 1
        wait_for_step(process, out, generator.randint(known, max(known, upper)), log)
        time.sleep(generator.uniform(0, 0.2))
        assert process.poll() is None, log.read_text()
        kill(process)
        killed.append(steps_of(out))
    print(f"{processes} processes, killed after steps {killed}", file=sys.stderr)
    finish(arguments, log)
    assert_same(result(out), expected)


@pytest.mark.kills
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_goes_on_to_the_same_bits(
    seed: int, unbroken: tuple[int, dict[str, Any]], tmp_path: Path
) -> None:
    processes, expected = unbroken
    kill_often(seed, 5, processes, OPTIONS, expected, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "kills"), [(1, 3), (2, 2)])
def test_a_short_run_goes_on_to_the_same_bits(
    processes: int, kills: int, short: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    kill_often(0, kills, processes, SHORT, short(processes), tmp_path)


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.kills),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.kills),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.kills),
    ],
)
def test_a_dead_process_ends_the_others(number: int, rank: int, tmp_path: Path) -> None:
    """Or one that hangs for longer than the timeout: with one message.

    torchrun waits 30 seconds until it kills what does not obey.
    """
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = command(out, 2, **{**OPTIONS, "timeout": 10})
    process = start(arguments, log)
    wait_for_step(process, out, 3, log)
    ranks = sorted(children(process.pid))
    assert len(ranks) == 2
    os.kill(ranks[rank], number)
    began = time.monotonic()
    code = process.wait(timeout=60)
    print(f"ended after {time.monotonic() - began:.1f} s with {code}", file=sys.stderr)
    assert code
    told = log.read_text()
    message = "resnest-fused: another process ended, or hangs; the last checkpoint is "
    assert told.count("resnest-fused: ") == told.count(message) == 1, told
    assert f"{out}/checkpoints/step-" in told
    for pid in ranks:
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.kills
@pytest.mark.parametrize(
    ("number", "to_first"),
    [(signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGUSR1, False)],
)
def test_a_signal_stops_all(
    number: int, to_first: bool, unbroken: tuple[int, dict[str, Any]], tmp_path: Path
) -> None:
    """To what was started, which may be torchrun, or to one of its processes.

    It comes after a checkpoint. One process exits with 75; torchrun names its processes' code.
    """
    processes, expected = unbroken
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = command(out, processes, **OPTIONS)
    process = start(arguments, log)
    wait_for_step(process, out, 3, log)
    to_first = to_first or processes == 1
    os.kill(process.pid if to_first else max(children(process.pid)), number)
    code = process.wait(timeout=60)
    told = log.read_text()
    assert told.count("resnest-fused: stopped; the same command goes on") == 1, told
    if processes == 1:
        assert code == 75
    else:
        assert code == 1
        assert to_first or re.search(r"exitcode +: 75", told), told
    finish(arguments, log)
    assert_same(result(out), expected)


@pytest.mark.parametrize(
    "processes",
    [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.kills)],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    processes: int, short: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    """On a small file system of its own, in a namespace that needs no rights."""
    disk, log, kept = tmp_path / "disk", tmp_path / "log", tmp_path / "kept"
    disk.mkdir()
    arguments = command(tmp_path / "run", processes, **SHORT, keep=1000)
    arguments += ["--out", str(disk / "run")]
    # A checkpoint has 0.4 MB.
    shell = (
        f"mount -t tmpfs -o size=3m tmpfs {disk} && {{ {' '.join(arguments)}; "
        f"echo code $?; cp -r {disk}/run {kept}; }}"
    )
    unshared = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell]
    assert start(unshared, log).wait(timeout=240) == 0, log.read_text()
    told = log.read_text()
    assert "code 1" in told and "No space left on device" in told, told
    assert told.count("resnest-fused: ") == 1, told
    assert not list(kept.rglob("*.tmp"))
    # What was on it is whole: moved to a larger disk, the run goes on to the same end.
    shutil.copytree(kept, tmp_path / "run")
    assert steps_of(kept) > 3
    finish(command(tmp_path / "run", processes, **SHORT), log)
    assert_same(result(tmp_path / "run"), short(processes))
