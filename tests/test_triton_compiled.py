"""Every Triton kernel compiles for GPUs that are not there, and Triton may be missing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

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


def test_without_triton_the_rest_is_there(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise RuntimeError('it is broken')")
    code = "import resnest_fused as rf; print(*(s for s in rf.backends() if s.name == 'triton'))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "available=False, reason='Triton cannot be imported (it is broken)'" in run.stdout
