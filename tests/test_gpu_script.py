"""``tests/gpu.sh`` without a GPU: programs of the same names stand in for those that need one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from build_files import ROOT

pytestmark = pytest.mark.cpu

# Notes how it was called; Python also writes what the script reads of the timings.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0") $*" in
    "nvidia-smi --query-gpu=compute_cap"*) echo 9.0 ;;
    *"gpu.py --seconds"*) printf '  1.0 s  copies\\n=== A GPU\\nthe table\\n' ;;
    *"ncu "*) echo "==PROF== Report" ;;
    $FAILING*) exit 3 ;;
esac
"""
ALWAYS = ("nvidia-smi", "nvcc", "python3", "ncu", "compute-sanitizer")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The script in a checkout of its own, which has a build."""
    root = tmp_path / "checkout"
    (root / "tests").mkdir(parents=True)
    (root / "build/gpu").mkdir(parents=True)
    shutil.copy(ROOT / "tests/gpu.sh", root / "tests")
    return root


def run(
    checkout: Path, steps: str, *, lacking: str = "", failing: str = "nothing"
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What it prints, and how it called others."""
    programs = checkout.parent / "bin"
    programs.mkdir()
    for name in ALWAYS:
        if name != lacking:
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
    calls = checkout.parent / "calls"
    calls.touch()
    environ = {
        "PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "HOME": str(checkout.parent),
        "OUT": str(checkout.parent / "out"),
        "STEPS": steps,
        "CALLS": str(calls),
        "FAILING": failing,
    }
    command = ["bash", str(checkout / "tests/gpu.sh")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    return done, calls.read_text().splitlines()


def test_measuring_alone(checkout: Path) -> None:
    done, calls = run(checkout, "profile time")
    assert done.returncode == 0, done.stderr
    named = [next((n for n in ("--once", "--seconds") if n in call), None) for call in calls]
    assert [name for name in named if name] == ["--once", "--seconds"]
    (profile,) = (call for call in calls if call.startswith("ncu "))
    assert "--clock-control none" in profile and "dram__bytes_read.sum" in profile
    assert not any("-m pip" in call or "-m pytest" in call for call in calls)
    summary = (checkout.parent / "out/summary.txt").read_text()
    assert "profile     passed" in summary and "time        passed" in summary
    assert summary.endswith("=== A GPU\nthe table\n")


def test_building_and_testing_alone(checkout: Path) -> None:
    done, calls = run(checkout, "build tests sanitize")
    assert done.returncode == 0, done.stderr
    assert any("pip install" in call for call in calls)
    assert any("-m pytest" in call for call in calls)
    # The next call finds what torch.compile needs.
    assert any("--compile-only" in call for call in calls)
    tools = {word for call in calls for word in call.split() if word.endswith("check")}
    assert tools == {"memcheck", "racecheck", "synccheck"}
    assert not any("--seconds" in call for call in calls)


def test_tuning_is_done_only_if_asked_for(checkout: Path) -> None:
    done, calls = run(checkout, "tune")
    assert done.returncode == 0, done.stderr
    (call,) = (call for call in calls if "benchmarks/" in call)
    assert "tune.py --seconds" in call and call.endswith("out/tuning.txt")
    assert "tune        passed" in (checkout.parent / "out/summary.txt").read_text()


def test_a_failure_is_told_and_stops_nothing(checkout: Path) -> None:
    done, calls = run(checkout, "tests time", failing="python3 -m pytest")
    assert done.returncode == 1
    summary = (checkout.parent / "out/summary.txt").read_text()
    assert "tests       FAILED" in summary and "time        passed" in summary
    assert any("--seconds" in call for call in calls)


def test_a_failed_build_ends_it(checkout: Path) -> None:
    done, calls = run(checkout, "build tests", failing="python3 -m pip")
    assert done.returncode == 1 and "Nothing was built" in done.stdout
    assert not any("-m pytest" in call for call in calls)


def test_without_a_profiler(checkout: Path) -> None:
    done, _ = run(checkout, "profile", lacking="ncu")
    assert done.returncode == 0
    assert "profile     NOT RUN       0 s  ncu is not on this machine" in done.stdout


@pytest.mark.parametrize(
    ("steps", "lacking", "built", "code", "message"),
    [
        ("build tset", "", True, 2, "STEPS: expected some of build tests compare"),
        ("time", "", False, 1, "nothing is built in"),
        ("time", "nvidia-smi", True, 1, "no GPU that nvidia-smi can see"),
    ],
)
def test_what_it_cannot_do(
    checkout: Path, steps: str, lacking: str, built: bool, code: int, message: str
) -> None:
    if not built:
        (checkout / "build/gpu").rmdir()
    done, calls = run(checkout, steps, lacking=lacking)
    assert done.returncode == code and message in done.stderr
    assert not any("gpu.py" in call for call in calls)
