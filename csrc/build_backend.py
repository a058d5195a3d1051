"""PEP 517 backend: setuptools, in a copy of the sources, with the torch of the target environment.

A frontend builds in isolation, where the torch of the target environment is hidden. It would
download a second torch of several gigabytes, maybe of another release. So this backend asks the
target's interpreter for its torch and lends it to the build. If there is none, or it is too old,
the build requires its own.

The build runs in a temporary copy of the sources. So nothing from an earlier build in the checkout
gets in, and nothing is written there but this file's bytecode, by Python.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import build_meta

OLDEST_TORCH = (2, 10)  # the same as in pyproject.toml's dependencies

# All that a source distribution holds.
SOURCES = (
    ".clang-format",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "benchmarks",
    "csrc",
    "pyproject.toml",
    "resnest_fused",
    "setup.py",
    "tests",
)
# What tools leave among them, as in .gitignore.
LEFTOVERS = shutil.ignore_patterns("*.so", "*.py[cod]", "__pycache__", ".*_cache", ".hypothesis")

ASK_FOR_TORCH = """
import importlib.metadata, importlib.util, json, sys, sysconfig
found = importlib.util.find_spec("torch") is not None
version = importlib.metadata.version("torch") if found else None
path = [entry for entry in sys.path if entry]
print(json.dumps({"abi": sysconfig.get_config_var("SOABI"), "version": version, "path": path}))
"""

HIDDEN_TARGET = (
    "resnest_fused: uv builds in an environment of its own, from which the target environment and "
    "its torch cannot be found; run `uv pip install torch setuptools ninja && "
    "uv pip install --no-build-isolation .` instead."
)


class TargetTorch(NamedTuple):
    """The torch of the target interpreter, and the sys.path on which it is found."""

    version: str
    path: list[str]


def needs_torch() -> bool:
    """Whether anything is compiled."""
    return os.environ.get("RESNEST_FUSED_SKIP_NATIVE") != "1"


def is_recent_enough(version: str) -> bool:
    """Whether a torch of this version, such as "2.13.0+cpu", has the ABI that we compile for."""
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and tuple(map(int, release.groups())) >= OLDEST_TORCH


def ask_uv(process: Path) -> str | None:
    """The interpreter that uv installs for; ``process`` is uv's folder in /proc."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-p", "--python")
    parser.add_argument("--system", action="store_true")
    arguments, _ = parser.parse_known_args((process / "cmdline").read_text().split("\0")[1:-1])
    # uv's own variables, because here VIRTUAL_ENV is the environment of the build.
    entries = (process / "environ").read_text().split("\0")
    environ = {
        name: value for name, _, value in (entry.partition("=") for entry in entries if entry)
    }
    python = arguments.python or environ.get("UV_PYTHON")
    answer = subprocess.run(
        [
            os.readlink(process / "exe"),
            *("python", "find"),
            *["--system"] * arguments.system,
            *([python] if python else []),
        ],
        env=environ,
        cwd=os.readlink(process / "cwd"),
        stdout=subprocess.PIPE,
        text=True,
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def find_interpreter() -> str | None:
    """The interpreter of the target environment, or None if it cannot be found."""
    parent = Path("/proc", str(os.getppid()))
    try:
        frontend = Path(os.readlink(parent / "exe")).name
    except OSError:  # the process of another user
        frontend = ""
    # pip builds with the target's own interpreter and hides its packages only.
    return ask_uv(parent) if frontend == "uv" else sys.executable


def find_target_torch() -> TargetTorch | None:
    """The target interpreter's torch if the package can be built against it, else None."""
    interpreter = find_interpreter()
    if interpreter is None:
        raise SystemExit(HIDDEN_TARGET)
    # With these two pip puts the build environment in the place of the interpreter's own.
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [interpreter, "-c", ASK_FOR_TORCH]
    answer = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True)
    facts = json.loads(answer.stdout)
    if facts.pop("abi") != sysconfig.get_config_var("SOABI"):
        raise SystemExit(HIDDEN_TARGET)  # uv builds with the target's Python, so this is not it
    target = TargetTorch(**facts)
    return target if target.version is not None and is_recent_enough(target.version) else None


def lend_target_torch() -> None:
    """Make the target's torch importable here, behind all that the build environment has."""
    if not needs_torch() or importlib.util.find_spec("torch") is not None:
        return
    if (target := find_target_torch()) is not None:
        sys.path.extend(entry for entry in target.path if entry not in sys.path)


def compile_nothing() -> None:
    """Metadata and sources must need neither torch nor a compiler."""
    os.environ["RESNEST_FUSED_SKIP_NATIVE"] = "1"


@contextlib.contextmanager
def copy_of_sources() -> Iterator[None]:
    """Work in a temporary folder that has the checkout's sources and nothing else."""
    checkout = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="resnest_fused-") as folder:
        for source in map(checkout.joinpath, SOURCES):
            copy = Path(folder, source.name)
            if source.is_dir():
                shutil.copytree(source, copy, ignore=LEFTOVERS)
            else:
                shutil.copy(source, copy)
        for copy in Path(folder).rglob("*"):  # the checkout may be read-only
            copy.chmod(copy.stat().st_mode | stat.S_IWUSR)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(checkout)


def leave_python_files(wheel: Path, checkout: Path) -> None:
    """Make a wheel editable: a .pth file leads Python to the Python files in the checkout.

    The compiled modules stay in the wheel, so that every environment has its own. The package in
    the checkout finds them (``resnest_fused/backends/binary.py``).
    """
    with zipfile.ZipFile(wheel) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    kept = {
        name: content
        for name, content in files.items()
        if (".dist-info/" in name and name != record) or name.endswith(".so")
    }
    kept["__editable__.resnest_fused.pth"] = f"{checkout}\n".encode()
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    for name, content in kept.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        writer.writerow((name, f"sha256={digest}", len(content)))
    writer.writerow((record, "", ""))
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in {**kept, record: rows.getvalue().encode()}.items():
            packed.writestr(name, content)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    if not needs_torch() or find_target_torch() is not None:
        return []
    return ["torch>={}.{}".format(*OLDEST_TORCH)]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    compile_nothing()
    with copy_of_sources():
        return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Any = None
) -> str:
    return prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    lend_target_torch()
    with copy_of_sources():
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    name = build_wheel(wheel_directory, config_settings, metadata_directory)
    leave_python_files(Path(wheel_directory, name), Path.cwd())
    return name


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    compile_nothing()
    with copy_of_sources():
        return build_meta.build_sdist(sdist_directory, config_settings)
