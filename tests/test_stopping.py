"""Signals that ask a run to stop, from its first moment on, and what they must not end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same, command, result, start

from resnest_fused.training import stopping


def signals(pid: int, which: str) -> set[int]:
    """The signals that a process catches (SigCgt), blocks (SigBlk) or ignores (SigIgn)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    mask = next((line.split()[1] for line in lines if line.startswith(which)), "0")
    return {number for number in range(1, 65) if int(mask, 16) >> (number - 1) & 1}


def children(pid: int) -> list[int]:
    """Those of multiprocessing: libraries ask other programs for a moment, too."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if is_of_multiprocessing(int(child))]


def is_of_multiprocessing(pid: int) -> bool:
    try:
        return b"multiprocessing" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def below(pid: int) -> list[int]:
    """The children of a process's children."""
    return [grandchild for child in children(pid) for grandchild in children(child)]


def test_a_request_is_noted_and_handlers_come_back() -> None:
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with stopping.StopRequest() as stop:
            assert not stop.made
            signal.raise_signal(number)
            assert stop.made
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before


def test_a_second_interrupt_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), stopping.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.made
        signal.raise_signal(signal.SIGINT)


def test_signals_wait_until_processes_are_started_which_never_get_them() -> None:
    with stopping.StopRequest() as stop:
        with stopping.held_back():
            child = subprocess.Popen(["sleep", "60"])
            signal.raise_signal(signal.SIGTERM)  # to this thread: another one would take it
            assert not stop.made
        assert stop.made
    assert set(stopping.SIGNALS) <= signals(child.pid, "SigBlk")
    child.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    child.kill()
    child.wait()


# --- whole runs

RUN: dict[str, Any] = {"epochs": 2, "batch": 200, "save_every": 1, "workers": 2}


def wait_for(process: subprocess.Popen[bytes], log: Path, there: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 100
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    log = out.with_suffix(".log")
    assert start(command(out, 1, **RUN), log).wait(timeout=120) == 0, log.read_text()
    return result(out)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_torch_is_imported_stops_a_run(number: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(command(tmp_path / "run", 1, **RUN), log)
    wait_for(process, log, lambda: number in signals(process.pid, "SigCgt"))
    assert "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(number)
    assert process.wait(timeout=60) == 75, log.read_text()
    assert log.read_text() == "resnest-fused: stopped; the same command goes on\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("the server of loading processes starts", signal.SIGTERM),
        ("it has begun", signal.SIGUSR1),
        ("the loading processes start", signal.SIGTERM),
        ("a checkpoint is there", signal.SIGINT),
    ],
)
def test_a_signal_to_the_whole_group_ends_no_loading_process(
    moment: str, number: int, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = command(out, 1, **RUN)
    process = start(arguments, log)
    moments: dict[str, Callable[[], Any]] = {
        "the server of loading processes starts": lambda: children(process.pid),
        "it has begun": lambda: len(children(process.pid)) == 2,  # the tracker of resources, too
        "the loading processes start": lambda: below(process.pid),
        "a checkpoint is there": lambda: list((out / "checkpoints").glob("step-*")),
    }
    wait_for(process, log, moments[moment])
    for pid in [*children(process.pid), *below(process.pid)]:
        assert {signal.SIGTERM, signal.SIGUSR1} <= signals(pid, "SigBlk") | signals(pid, "SigIgn")
    os.killpg(process.pid, number)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75, log.read_text()
    assert log.read_text().splitlines()[-1] == "resnest-fused: stopped; the same command goes on"
    assert "Traceback" not in log.read_text()
    if moment == "a checkpoint is there":
        assert start(arguments, log).wait(timeout=120) == 0, log.read_text()
        assert_same(result(out), unbroken)


@pytest.mark.long
def test_no_process_that_loads_outlives_the_one_that_trains(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(command(out, 1, **RUN), log)
    wait_for(process, log, lambda: list((out / "checkpoints").glob("step-*")))
    loading = [*children(process.pid), *below(process.pid)]
    assert len(loading) >= 4  # the server, the tracker, and those that load
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(is_of_multiprocessing(pid) for pid in loading):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.long
def test_a_run_that_fails_ends_with_its_loading_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(command(tmp_path / "run", 1, **{**RUN, "lr": 1e30, "warmup": 0}), log)
    assert process.wait(timeout=100) == 1, log.read_text()
    assert "the loss is nan" in log.read_text()
