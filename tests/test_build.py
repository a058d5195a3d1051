"""The build: which torch it takes, what it decides and says, and what the binary links to."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import resnest_fused

ROOT = Path(__file__).parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend() -> ModuleType:
    return load(ROOT / "csrc" / "build_backend.py")


@pytest.fixture
def setup_py() -> ModuleType:
    return load(ROOT / "setup.py")


def write_script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def answering_interpreter(path: Path, version: str | None) -> str:
    """A stand-in for a Python that has this torch, or none, on its path."""
    answer = json.dumps({"version": version, "path": ["/target/site-packages"]})
    return str(write_script(path / "python", f"echo '{answer}'"))


def run_setup(**environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--version"]
    environ = {**os.environ, **environ}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


# Which torch


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.13.1", False),
        ("2.9.1", False),
        ("2.9.1+cu128", False),
        ("2.10.0", True),
        ("2.10.0a0+git1a2b3c4", True),
        ("2.13.0+cpu", True),
        ("3.0", True),
        ("10.0.0", True),
        ("unknown", False),
    ],
)
def test_versions_are_compared_as_numbers(
    backend: ModuleType, version: str, expected: bool
) -> None:
    assert backend.is_recent_enough(version) is expected


def test_target_torch_is_the_one_of_the_interpreter_not_of_pythonpath(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    metadata = tmp_path / "torch-99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 99.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    target = backend.find_target_torch()

    assert target.version == importlib.metadata.version("torch")
    assert str(Path(torch.__file__).parents[1]) in target.path
    assert str(tmp_path) not in target.path


@pytest.mark.parametrize(
    ("version", "requirements"),
    [("2.13.0+cpu", []), ("2.10.0", []), ("2.9.1", ["torch>=2.10"]), (None, ["torch>=2.10"])],
)
def test_torch_is_required_only_where_the_target_has_none_to_lend(
    backend: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    requirements: list[str],
) -> None:
    monkeypatch.setattr(sys, "executable", answering_interpreter(tmp_path, version))
    monkeypatch.delenv("RESNEST_FUSED_SKIP_NATIVE", raising=False)
    assert backend.get_requires_for_build_wheel() == requirements
    assert backend.get_requires_for_build_editable() == requirements
    assert backend.get_requires_for_build_sdist() == []

    monkeypatch.setenv("RESNEST_FUSED_SKIP_NATIVE", "1")
    assert backend.get_requires_for_build_wheel() == []


def test_target_torch_is_lent_behind_the_build_environment(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", answering_interpreter(tmp_path, "2.13.0"))
    monkeypatch.setattr(sys, "path", ["/build/site-packages"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # none in the build's own
    backend.lend_target_torch()
    assert sys.path == ["/build/site-packages", "/target/site-packages"]


def test_torch_of_the_build_environment_comes_first(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", answering_interpreter(tmp_path, "2.13.0"))
    path = list(sys.path)
    backend.lend_target_torch()
    assert sys.path == path


def test_oldest_torch_is_the_same_everywhere(backend: ModuleType, setup_py: ModuleType) -> None:
    major, minor = backend.OLDEST_TORCH
    assert int(setup_py.TORCH_TARGET_VERSION, 16) == major << 56 | minor << 48
    requirements = importlib.metadata.requires("resnest_fused") or []
    assert f"torch>={major}.{minor}" in requirements


# What is decided and said


def test_version_is_the_same_everywhere() -> None:
    from resnest_fused import _C

    assert importlib.metadata.version("resnest_fused") == resnest_fused.__version__
    assert _C.build_info()["version"] == resnest_fused.__version__
    assert run_setup(RESNEST_FUSED_SKIP_NATIVE="1").stdout.endswith(
        f"\n{resnest_fused.__version__}\n"
    )


@pytest.mark.parametrize("environ", [{}, {"RESNEST_FUSED_CUDA": "0"}])
def test_cuda_is_not_included(setup_py: ModuleType, environ: dict[str, str]) -> None:
    assert setup_py.cuda_status(environ) == "not included, this version has CPU kernels only"


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"RESNEST_FUSED_CUDA": "1"},
            "RESNEST_FUSED_CUDA=1 is impossible, this version contains no CUDA kernels",
        ),
        ({"RESNEST_FUSED_CUDA": "on"}, "RESNEST_FUSED_CUDA must be 0 or 1, not 'on'"),
        ({"RESNEST_FUSED_SKIP_NATIVE": ""}, "RESNEST_FUSED_SKIP_NATIVE must be 0 or 1, not ''"),
    ],
)
def test_impossible_switch_ends_the_build_with_one_sentence(
    environ: dict[str, str], sentence: str
) -> None:
    result = run_setup(**environ)
    assert result.returncode != 0
    assert result.stderr == f"resnest_fused: {sentence}.\n"


def test_skip_native_needs_no_compiler() -> None:
    result = run_setup(RESNEST_FUSED_SKIP_NATIVE="1", CXX="/nonexistent/c++")
    assert result.returncode == 0
    assert "resnest_fused: pure Python, as RESNEST_FUSED_SKIP_NATIVE=1 asks" in result.stdout


def test_missing_compiler_ends_the_build_with_one_sentence() -> None:
    result = run_setup(RESNEST_FUSED_SKIP_NATIVE="0", CXX="/nonexistent/c++")
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1
    assert "the C++ compiler `/nonexistent/c++` cannot be run" in result.stderr
    assert "RESNEST_FUSED_SKIP_NATIVE=1" in result.stderr


def test_old_compiler_is_refused_in_its_own_words(setup_py: ModuleType, tmp_path: Path) -> None:
    complaint = "g++: error: unrecognized command line option '-std=c++20'"
    compiler = write_script(tmp_path / "g++", f'echo "{complaint}" >&2', "exit 1")
    with pytest.raises(SystemExit) as error:
        setup_py.find_compiler({"CXX": str(compiler)})
    message = str(error.value)
    assert complaint in message
    assert "RESNEST_FUSED_SKIP_NATIVE=1" in message
    assert "\n" not in message


def test_compiler_may_be_a_command_of_several_words(setup_py: ModuleType, tmp_path: Path) -> None:
    compiler = write_script(tmp_path / "c++", 'test "$1" = -pipe && echo "c++ 99.1"')
    assert setup_py.find_compiler({"CXX": f"{compiler} -pipe"}) == "c++ 99.1"


# What the binary links to


def inspect_binary(*command: str) -> str:
    """What a binutils program says about the installed extension module."""
    from resnest_fused import _C

    assert shutil.which(command[0]), f"this test needs {command[0]}, of binutils"
    command = (*command, _C.__file__)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_binary_needs_only_the_stable_abi() -> None:
    symbols = inspect_binary("nm", "-DC", "--undefined-only").splitlines()
    assert any("torch_call_dispatcher" in symbol or "aoti_torch_" in symbol for symbol in symbols)
    unstable = [symbol for symbol in symbols if re.search(r"\b(at|c10|torch|caffe2)::", symbol)]
    assert unstable == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_binary_is_tied_to_no_unstable_library_and_no_folder() -> None:
    dynamic = inspect_binary("readelf", "-d")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert [name for name in needed if "torch" in name or "c10" in name] == ["libtorch_cpu.so"]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
