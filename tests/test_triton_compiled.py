"""Every Triton kernel compiles for GPUs that are not there, and Triton may be missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu
HERE = Path(__file__).parent
MODULES = ("prologue", "pool", "attention", "attention_backward", "recombine", "running")


def _kernels() -> set[str]:
    modules = (importlib.import_module(f"resnest_fused.backends.triton.{name}") for name in MODULES)
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("target", "one_in"), [("cuda:90", 3), ("cuda:80", 5), ("hip:gfx942", 5)])
def test_every_kernel_compiles(target: str, one_in: int, tmp_path: Path) -> None:
    """In a part of all forms, and with every kernel."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "compile_triton.py", target, "--one-in", str(one_in)],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert {name for name in _kernels() if f" {name} " in run.stdout} == _kernels() != set()


def _stand_in(what: str, folder: Path) -> Any:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    run = subprocess.run(
        [sys.executable, "triton_stand_in.py", what],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_small_maps_of_nchw_are_read_and_written_in_16_bytes(tmp_path: Path) -> None:
    """What else the kernels load is in float32: coefficients, and sums."""
    shapes = _stand_in("loads", tmp_path)
    maps = {"recombine_kernel": 1, "recombine_backward_kernel": 2}  # stores of out, or of dx
    kernels = ("statistics_kernel", "pool_kernel", "pool_backward_kernel", *maps)
    for shape in ("14x14", "7x7"):
        for name in kernels:
            accesses = shapes[shape][name]
            # The first element of each channel is where the sums of statistics start from.
            narrow = 1 if name == "statistics_kernel" else 0
            assert accesses["ld"].count(2) == narrow, (shape, name)
            assert accesses["st"].count(2) == 0, (shape, name)
            assert 16 in accesses["ld"], (shape, name)
            assert accesses["st"].count(16) == maps.get(name, 0), (shape, name)


@pytest.mark.parametrize("mode", ["eval", pytest.param("step", marks=pytest.mark.long)])
def test_calls_like_an_earlier_one_do_not_pass_through_triton_again(
    mode: str, tmp_path: Path
) -> None:
    """They launch the same kernels over the same programs, with arguments of the same shapes."""
    calls = _stand_in(mode, tmp_path)
    assert {call["form"] for call in calls} >= {"contiguous"}
    for call in calls:
        first, *others = call["own"]
        assert others == ([first] * 2 if call["form"] == "strided" else [0, 0]), call["op"]
        assert first == len(call["launches"][0]) > 0
        assert call["launches"][1:] == call["launches"][:1] * 2, call["op"]


def test_without_triton_the_rest_is_there(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise RuntimeError('it is broken')")
    code = "import resnest_fused as rf; print(*(s for s in rf.backends() if s.name == 'triton'))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "available=False, reason='Triton cannot be imported (it is broken)'" in run.stdout
