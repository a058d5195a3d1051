"""RESNEST_FUSED_CUDA_TUNING: its file is taken whole or not at all, and no value in it makes the
planner of the CUDA kernels wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tune
from build_files import ROOT

from resnest_fused import _C

DEFAULTS: dict[str, tuple[int, int, int]] = _C.tuning()
TUNING = {name: value for name, (value, _, _) in DEFAULTS.items()}

# The file is read when the compiled module is loaded. So a process forks for each file, after it
# has imported torch and before anything of ours.
IN_EACH = """
import json, os, sys, torch

def reading():
    import resnest_fused as rf
    status, _C = rf.backends()[0], sys.modules["resnest_fused._C"]
    if status.available:
        return {name: value for name, (value, _, _) in _C.tuning().items()}
    said = [status.reason]
    x, fc = torch.ones(1, 4, 2, 2), torch.ones(4, 2, 1, 1)
    for call in (lambda: rf.split_attention(x, fc[:2], None, fc, None, radix=2), _C.tuning):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said

def planning():
    import itertools
    import test_plan as t
    shapes = [*t.FAMILY[::9], t.shape(2, 1, 64, 500 * 500), t.Shape(3, 1, 7, 15, 32)]
    shapes += [t.Shape(2, 1, 8, 9001, 32), t.Shape(1, 1, 16, 1, 32)]
    count = 0
    for shape, mode, size, nhwc, batch in itertools.product(
        shapes, t.MODES, (2, 4), (False, True), (1, 37)
    ):
        for name in ("T4", "H100", "tiny"):
            t.check(t.DEVICES[name], t.Call(shape, mode, batch, size, nhwc))
            count += 1
    for nhwc, (channels, pixels) in itertools.product((False, True), [(16, 49), (8, 901)]):
        call = t.Call(t.Shape(2, 1, channels, pixels, 32), t.MODES[-2], 2, 2, nhwc)
        for tiling in ("tiling", "recombine_tiling"):
            cover = t.covered(t.plan(t.H200, call)[tiling], 2, channels, pixels, nhwc)
            assert (cover == 1).all()
    return count

def plans():
    import itertools
    import resnest_fused
    of_sm = {"threads": 2048, "registers": 65536, "shared": 228 * 1024}
    gpu = {f"{name}_per_multiprocessor": value for name, value in of_sm.items()}
    gpu |= {"multiprocessors": 132, "threads_per_block": 1024, "grid_blocks": 2**31 - 1}
    gpu |= {"shared_per_block": 48 * 1024, "shared_per_block_optin": 227 * 1024}
    gpu |= {"architecture": 90, "driver": 13000}
    call = {"radix": 2, "cardinality": 1, "inter": 32, "element_size": 2, "aligned": True}
    call |= {"relu": True, "bn0": True}
    of_pass = {"eval": False, "train": True, "backward": True}
    of_stage = [(64, 3136), (512, 49)]
    kinds = itertools.product(of_pass.items(), of_stage, (1, 64, 256), (False, True), (1, 8))
    return [
        sys.modules["resnest_fused._C"].plan(
            {**gpu, "cluster_blocks": cluster},
            {**call, "pass": name, "batch_stats": coupled, "bn1_batch_stats": coupled,
             "channels": channels, "pixels": pixels, "batch": batch, "channels_last": nhwc},
        )
        for (name, coupled), (channels, pixels), batch, nhwc, cluster in kinds
    ]

for path in sys.argv[2:]:
    sys.stdout.flush()
    if os.fork() == 0:
        os.environ["RESNEST_FUSED_CUDA_TUNING"] = path
        print(json.dumps(globals()[sys.argv[1]]()), flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        sys.exit(f"with {path}")
"""


def in_each(what: str, *files: Path) -> list[Any]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", IN_EACH, what, *map(str, files)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def written(folder: Path, number: int, text: str) -> Path:
    path = folder / f"{number}.txt"
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


def as_text(tuning: Mapping[str, int]) -> str:
    return "".join(f"{name} = {value}\n" for name, value in tuning.items())


def test_the_default_is_in_its_range() -> None:
    for value, least, most in DEFAULTS.values():
        assert least <= value <= most


# --- the search

TUNABLES = {"a": (4, 1, 8), "b": (16, 1, 1024), "c": (2, 0, 2), "d": (1, 1, 1)}


def forget(changes: Mapping[str, int], part: float) -> None:
    """What is kept so far."""


def test_the_fastest_values_stay(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def cost_of(changes: Mapping[str, int]) -> float:
        seen.append(dict(changes))
        cost = 100.0
        cost -= {2: 10, 8: 30}.get(changes.get("a", 4), 0)
        cost -= 1.0 * (changes.get("b", 16) == 8)  # too little to tell
        return cost - 10 * (changes.get("c", 2) == 0)

    written = []
    found = tune.search(cost_of, TUNABLES, math.inf, lambda *kept: written.append(kept))
    assert found == ({"a": 8, "c": 0}, 100.0, 60.0)
    assert written == [({}, 1.0), ({"a": 2}, 0.9), ({"a": 8}, 0.7), ({"a": 8, "c": 0}, 0.6)]
    # Each beside what was kept of those before it, never beside its own other value. The start and
    # what seems faster are timed twice.
    kept = {"a": 8}
    expected = 2 * [{}] + 2 * [{"a": 2}] + 2 * [kept] + [{**kept, "b": 8}, {**kept, "b": 32}]
    assert seen == expected + [{**kept, "c": value} for value in (0, 0, 1)]
    assert capsys.readouterr().out.count("kept") == 3


def test_what_is_faster_once_does_not_stay() -> None:
    costs = iter([100.0, 90.0, 80.0, 95.0, 89.0])
    assert tune.search(lambda changes: next(costs), {"a": (2, 1, 4)}, math.inf, forget)[0] == {}


def test_the_search_ends_in_time() -> None:
    assert tune.search(lambda changes: 1.0, TUNABLES, -math.inf, forget) == ({}, 1.0, 1.0)


def test_what_cannot_be_timed_does_not_stay(capsys: pytest.CaptureFixture[str]) -> None:
    def cost_of(changes: Mapping[str, int]) -> float:
        if changes.get("a") == 2:
            raise RuntimeError("no room")
        return 50.0 if changes.get("a") == 8 else 100.0

    assert tune.search(cost_of, TUNABLES, math.inf, forget)[0] == {"a": 8}
    assert "failed     a = 2: no room" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seconds", "nan"], "--seconds nan: expected more than 0"),
        (["--out", "nowhere/tuning.txt"], "expected a file in a folder that is there"),
    ],
)
def test_wrong_options_of_the_search(
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune.py", "--device=cpu", *options])
    with pytest.raises(SystemExit) as error:
        tune.main()
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_what_is_tried_is_in_range() -> None:
    for limits in DEFAULTS.values():
        values = [*tune.tried(*limits)]
        assert values and all(limits[1] <= value <= limits[2] for value in values)
        assert limits[0] not in values


def test_a_try_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    assert 0 < tune.cost_in_a_process({"chunks": 16}, "cpu", quick=True) < 1e5
    with pytest.raises(RuntimeError, match=r"cannot be timed: \{'chunks': 0\}"):
        tune.cost_in_a_process({"chunks": 0}, "cpu", quick=True)


# --- the file

RIGHT = {
    "": {},
    "# all as it was\n\n  \n": {},
    "line_blocks = 8": {"line_blocks": 8},
    "\ufeffline_blocks = 8": {"line_blocks": 8},
    "  chunks=16  # more\r\n\tsample_lanes\t=\t32\r\n": {"chunks": 16, "sample_lanes": 32},
    as_text(TUNING): {},
}
INTEGER = "expected an integer from"
WRONG = {
    "chunk = 8": "line 1: nothing is named 'chunk'",
    "= 8": "line 1: nothing is named ''",
    "chunks = 16\nchunks 8": "line 2: expected name = value, got 'chunks 8'",
    "chunks = 16\n\nchunks = 16": "line 3: chunks is there twice",
    "chunks = 0": f"line 1: chunks: {INTEGER} 1 to 1024, got '0'",
    "chunks = 1025": f"line 1: chunks: {INTEGER} 1 to 1024, got '1025'",
    "chunks = -1": f"line 1: chunks: {INTEGER} 1 to 1024, got '-1'",
    "chunks = 8.0": f"line 1: chunks: {INTEGER} 1 to 1024, got '8.0'",
    "chunks = eight": f"line 1: chunks: {INTEGER} 1 to 1024, got 'eight'",
    "chunks =": f"line 1: chunks: {INTEGER} 1 to 1024, got ''",
    "chunks = 99999999999999999999": f"line 1: chunks: {INTEGER} 1 to 1024, got "
    "'99999999999999999999'",
    "sample_lanes = 12": "line 1: sample_lanes: expected a power of two from 2 to 32, got '12'",
    "on_chip_samples = 5": f"line 1: on_chip_samples: {INTEGER} 0 to 4, got '5'",
    "\N{BLACK HEART SUIT}": r"line 1: expected name = value, got '\xe2\x99\xa5'",
    "chunks = \udce9": rf"line 1: chunks: {INTEGER} 1 to 1024, got '\xe9'",  # no UTF-8
    "chunks = 8\0": rf"line 1: chunks: {INTEGER} 1 to 1024, got '8\x00'",
    "x" * 1000: f"line 1: expected name = value, got '{'x' * 60}...'",
}


def test_a_file_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    right = [written(tmp_path, number, text) for number, text in enumerate(RIGHT)]
    wrong = [written(tmp_path, 100 + number, text) for number, text in enumerate(WRONG)]
    unreadable = [tmp_path, tmp_path / "missing"]
    found = in_each("reading", *right, *wrong, *unreadable)
    assert found[: len(RIGHT)] == [{**TUNING, **changes} for changes in RIGHT.values()]
    expected = [f"{path}, {said}" for path, said in zip(wrong, WRONG.values(), strict=True)]
    expected += [f"cannot read {path}" for path in unreadable]
    # By the backend's status, by a call on the CPU too, and by the planner: always the same one.
    assert found[len(RIGHT) :] == [3 * [f"RESNEST_FUSED_CUDA_TUNING: {said}"] for said in expected]


def ends(which: Callable[[int], int]) -> dict[str, int]:
    """Each value at the least (0) or at the most (1) that it may be, by its place in the list."""
    return {name: DEFAULTS[name][1 + which(place)] for place, name in enumerate(DEFAULTS)}


# All at one end, and every other one.
ENDS = {
    "least": ends(lambda place: 0),
    "most": ends(lambda place: 1),
    "least and most": ends(lambda place: place % 2),
    "most and least": ends(lambda place: 1 - place % 2),
}


def test_no_value_makes_a_plan_wrong(tmp_path: Path) -> None:
    files = [written(tmp_path, number, as_text(end)) for number, end in enumerate(ENDS.values())]
    counts = in_each("planning", *files)
    assert len(counts) == len(ENDS) and min(counts) > 1000


@pytest.mark.long
@pytest.mark.timeout(1200)  # it may have to build the kernels
@pytest.mark.parametrize("name", ["least and most", "most and least"])
def test_no_value_makes_a_result_wrong(name: str, tmp_path: Path) -> None:
    """Of the CUDA kernels on the CPU, by their own tests."""
    path = written(tmp_path, 0, as_text(ENDS[name]))
    tests = "test_odd_sizes or test_schedules_make_no_difference or test_any_call"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_cuda_kernels.py", "-k", tests],
        cwd=ROOT,
        env={**os.environ, "RESNEST_FUSED_CUDA_TUNING": str(path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout


def test_every_value_is_used(tmp_path: Path) -> None:
    """With the least one some plan is another one."""
    lines = [f"{name} = {least}" for name, (_, least, _) in DEFAULTS.items()]
    files = [written(tmp_path, number, line) for number, line in enumerate(["", *lines])]
    default, *changed = in_each("plans", *files)
    same = [line for line, plans in zip(lines, changed, strict=True) if plans == default]
    assert same == []
