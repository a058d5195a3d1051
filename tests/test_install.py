"""What is installed.

A wheel holds only what its own build made, whatever lies about in a checkout. The package finds its
compiled module, also when Python is started in the checkout.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from build_files import ROOT, load
from uv import find_uv_bin

from resnest_fused.backends import binary, native

MODULE = "resnest_fused/_C" + importlib.machinery.EXTENSION_SUFFIXES[0]

# A compiled module that takes no time to build.
TINY_MODULE = """
#include <Python.h>
[[gnu::used]] static const char sources[] = RESNEST_FUSED_SOURCES;
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """What a command prints; its error output too when it fails.

    Python writes no bytecode, which root's would leave in a checkout that is read-only.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept["PYTHONDONTWRITEBYTECODE"] = "1"
    result = subprocess.run(
        command, cwd=cwd, env={**kept, **environ}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def python(code: str, cwd: Path) -> str:
    return run(sys.executable, "-c", code, cwd=cwd)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout, in a path with a space."""
    copy = tmp_path / "the checkout"
    copy.mkdir()
    for name in load("csrc/build_backend.py").SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "*cache*"))
        else:
            shutil.copy(source, copy)
    return copy


# What is packed


def plant_leftovers(checkout: Path) -> None:
    """Add files that other builds, editable ones too, and runs may have left in a checkout."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    packed = [f"resnest_fused/{name}{suffix}" for name in ("_C", "_cuda")]
    platform = f"{sys.platform}-{os.uname().machine}-{sys.implementation.cache_tag}"
    for folder in ("lib", f"lib.{platform}", f"bdist.{platform}/wheel"):
        for name in [*packed, "resnest_fused/removed.py"]:
            leftover = checkout / "build" / folder / name
            leftover.parent.mkdir(parents=True, exist_ok=True)
            leftover.write_text("left over")
    for name in [*packed, "csrc/cpu/avx2.o.so", "resnest_fused/__pycache__/removed.pyc"]:
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("left over")
    (checkout / "resnest_fused.egg-info").mkdir()
    (checkout / "resnest_fused.egg-info" / "SOURCES.txt").write_text("\n".join(packed))


def list_tree(folder: Path) -> list[tuple[str | int, ...]]:
    """Every file and folder, with properties that any write to it, even a passing one, changes."""
    paths = sorted([folder, *folder.rglob("*")])
    found = [(path, path.stat()) for path in paths]
    return [(str(path), stat.st_mode, stat.st_size, stat.st_ctime_ns) for path, stat in found]


@pytest.fixture
def soiled(checkout: Path) -> Iterator[Path]:
    """A read-only checkout with a tiny compiled module and with leftovers.

    Root may write all the same, so the end checks that nothing was written.
    """
    for source in (checkout / "csrc").rglob("*.c*"):
        source.unlink()
    (checkout / "csrc" / "ops.cpp").write_text(TINY_MODULE)
    plant_leftovers(checkout)
    paths = [checkout, *checkout.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    before = list_tree(checkout)
    yield checkout
    assert list_tree(checkout) == before
    for path in paths:  # for pytest, which removes it
        path.chmod(path.stat().st_mode | 0o200)


def pip(*arguments: str | Path, cwd: Path, interpreter: str | Path = sys.executable) -> str:
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    command = (interpreter, "-m", "pip", *arguments, *offline)
    return run(*command, cwd=cwd, RESNEST_FUSED_CUDA="0", RESNEST_FUSED_SKIP_NATIVE="0")


def package_files(checkout: Path) -> set[str]:
    """The files of the package that a checkout's wheel must hold."""
    paths = (checkout / "resnest_fused").rglob("*")
    kept = {path for path in paths if path.suffix in (".py", ".pyi", ".typed", ".txt")}
    kept.add(checkout / "resnest_fused" / "py.typed")
    return {path.relative_to(checkout).as_posix() for path in kept}


def packed_files(wheel: Path) -> set[str]:
    """What a wheel would install, beside its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def the_only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_a_wheel_holds_only_what_its_own_build_made(soiled: Path, tmp_path: Path) -> None:
    pip("wheel", "--wheel-dir", tmp_path, ".", cwd=soiled)
    wheel = the_only(tmp_path, "*.whl")
    assert packed_files(wheel) == {*package_files(soiled), MODULE}
    with zipfile.ZipFile(wheel) as archive:
        assert binary.hash_sources(soiled).encode() in archive.read(MODULE)


@pytest.mark.long
def test_a_source_distribution_holds_only_sources_and_builds_the_same_wheel(
    soiled: Path, tmp_path: Path
) -> None:
    code = "import build_backend, sys; build_backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-B", "-c", code, tmp_path, cwd=soiled, PYTHONPATH="csrc")
    sdist = the_only(tmp_path, "*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert not [name for name in names if "left" in name or name.endswith((".so", ".pyc"))]
    assert f"{sdist.name.removesuffix('.tar.gz')}/tests/gpu.sh" in names

    pip("wheel", "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    wheel = the_only(tmp_path, "*.whl")
    assert packed_files(wheel) == {*package_files(soiled), MODULE}


@pytest.mark.long
def test_an_editable_installation_has_a_compiled_module_of_its_own(
    soiled: Path, tmp_path: Path
) -> None:
    """It lies in the environment: environments with different torches may share a checkout."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    site = the_only(environment, "lib/python*/site-packages")
    # pip, torch and setuptools are those of the tests.
    (site / "tests.pth").write_text(str(Path(native.torch.__file__).parents[1]))
    interpreter = environment / "bin" / "python"
    pip("install", "--editable", ".", cwd=soiled, interpreter=interpreter)

    assert packed_record(site) == {"__editable__.resnest_fused.pth", MODULE}
    code = f"""if True:
        import importlib.util, sys
        from pathlib import Path
        package = Path(importlib.util.find_spec("resnest_fused").origin).parent
        sys.path.insert(0, {str(Path(binary.__file__).parent)!r})
        import binary
        print(package, binary.find(package).origin)
    """
    found = run(interpreter, "-B", "-c", code, cwd=tmp_path)
    assert found == f"{soiled / 'resnest_fused'} {site / MODULE}\n"

    pip_uninstall = (interpreter, "-m", "pip", "uninstall", "--yes", "resnest_fused")
    run(*pip_uninstall, cwd=tmp_path)
    assert not (site / MODULE).exists()


def packed_record(site: Path) -> set[str]:
    """What pip has installed, beside metadata and commands."""
    record = the_only(site, "resnest_fused-*.dist-info/RECORD").read_text()
    names = {line.partition(",")[0] for line in record.splitlines()}
    return {name for name in names if ".dist-info/" not in name and "/bin/" not in name}


# Which interpreter uv installs for

PROBE = f"""
import json, runpy, sys, types
sys.modules["setuptools"] = types.SimpleNamespace(build_meta=None)
backend = runpy.run_path({str(ROOT / "csrc" / "build_backend.py")!r})
def get_requires_for_build_wheel(config_settings=None):
    target = backend["find_target_torch"]()
    raise SystemExit("FOUND " + json.dumps(target and target.path))
get_requires_for_build_editable = get_requires_for_build_wheel
def build_wheel(*_): pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose build tells which torch this package's build would find, and ends."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "probe.py").write_text(PROBE)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "probe"\nbackend-path = ["."]\n'
        '[project]\nname = "project"\ndynamic = ["version"]\n'
    )
    return folder


def environment_with(folder: Path, torch_version: str | None) -> Path:
    """A virtual environment with the metadata of a torch, or without one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = the_only(folder, "lib/python*/site-packages")
    if torch_version is not None:
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").touch()
        metadata = site / f"torch-{torch_version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n"
        )
    return folder


def uv_install(
    project: Path, *arguments: str | Path, cwd: Path | None = None, **environ: str | Path
) -> str:
    """What the build of a project says when uv installs it."""
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.startswith("UV_")
    }
    command = [find_uv_bin(), "pip", "install", "--offline", "--no-cache", "--no-config"]
    result = subprocess.run(
        [*command, *arguments, project],
        cwd=cwd or project,
        env={**kept, **{name: str(value) for name, value in environ.items()}},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    return " ".join(result.stderr.split())  # uv wraps lines to the width of the terminal


@pytest.mark.parametrize(
    "how", ["VIRTUAL_ENV", "CONDA_PREFIX", "UV_PYTHON", "--python", "-p", "--editable", ".venv"]
)
def test_uv_lends_the_torch_of_the_environment_that_it_installs_into(
    project: Path, tmp_path: Path, how: str
) -> None:
    other = environment_with(tmp_path / "other", "2.12.0")
    target = environment_with(tmp_path / (".venv" if how == ".venv" else "target"), "2.13.0")
    if how in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        output = uv_install(project, **{how: target})
    elif how == "UV_PYTHON":
        output = uv_install(project, UV_PYTHON=target, VIRTUAL_ENV=other)
    elif how == "--editable":
        output = uv_install(project, "--python", target, "--editable", VIRTUAL_ENV=other)
    elif how == ".venv":
        (tmp_path / "below").mkdir()
        output = uv_install(project, cwd=tmp_path / "below")
    else:
        output = uv_install(project, how, target, VIRTUAL_ENV=other)
    (found,) = re.findall(r"FOUND (\[.*?\])", output)
    assert str(the_only(target, "lib/python*/site-packages")) in found
    assert str(other) not in found


@pytest.mark.parametrize("version", [None, "2.9.1"])
def test_uv_needs_a_torch_for_the_build_where_the_environment_has_none_to_lend(
    project: Path, tmp_path: Path, version: str | None
) -> None:
    assert "FOUND null" in uv_install(
        project, VIRTUAL_ENV=environment_with(tmp_path / "target", version)
    )


@pytest.mark.parametrize("hidden", ["not found", "another ABI"])
def test_an_environment_that_cannot_be_found_ends_the_build_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    answer = '{"abi": "cpython-38", "version": "2.13.0", "path": []}'
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\necho '{answer}'\n")
    interpreter.chmod(0o755)
    backend = load("csrc/build_backend.py")
    found = None if hidden == "not found" else str(interpreter)
    monkeypatch.setattr(backend, "find_interpreter", lambda: found)
    monkeypatch.setenv("RESNEST_FUSED_SKIP_NATIVE", "0")
    with pytest.raises(SystemExit) as error:
        backend.get_requires_for_build_wheel()
    assert str(error.value) == (
        "resnest_fused: uv builds in an environment of its own, from which the target environment "
        "and its torch cannot be found; run `uv pip install torch setuptools ninja && "
        "uv pip install --no-build-isolation .` instead."
    )


# Imported from a checkout

REPORT = "import resnest_fused as rf; print(rf.__file__); print(*rf.backends(), sep='\\n')"


def test_python_in_a_checkout_says_what_the_command_line_says(checkout: Path) -> None:
    """The installed kernels run, although Python imports the package in the checkout."""
    command = Path(sys.executable).with_name("resnest-fused")
    code = "import sys; sys.argv = ['', 'info']; from resnest_fused.cli import main; main()"
    installed = run(command, "info", cwd=checkout, COLUMNS="500")
    imported = run(sys.executable, "-B", "-c", code, cwd=checkout, COLUMNS="500")
    package, *said = installed.splitlines()
    assert str(checkout) not in package
    package, *the_same = imported.splitlines()
    assert str(checkout) in package
    assert said == the_same
    (native_backend,) = (line for line in said if line.startswith("native  "))
    assert native_backend.split()[1] == "yes"


def test_python_m_pytest_in_a_checkout_passes(checkout: Path) -> None:
    """It passes, although Python looks in the checkout before the installed packages."""
    arguments = ("-q", "-p", "no:cacheprovider", "tests/test_plan.py", "-k", "refused")
    outcome = run(sys.executable, "-m", "pytest", *arguments, cwd=checkout).splitlines()[-1]
    assert re.fullmatch(r"\d+ passed, \d+ deselected in .*", outcome)


@pytest.mark.parametrize("change", ["edited", "added", "removed", "renamed"])
def test_a_module_that_was_built_from_other_sources_is_not_taken(
    checkout: Path, change: str
) -> None:
    source = checkout / "csrc" / "cpu" / "kernels" / "pool.h"
    if change == "edited":
        source.write_text(source.read_text().replace("0", "1", 1))
    elif change == "added":
        source.with_name("new.cuh").touch()
    elif change == "removed":
        source.unlink()
    else:
        source.rename(source.with_name("pools.cpp"))
    with pytest.raises(ImportError, match=re.escape(f"{native._C.__file__} was built from others")):
        binary.find(checkout / "resnest_fused")


def test_without_a_module_that_fits_it_is_said_once_and_what_to_do(checkout: Path) -> None:
    (checkout / "csrc" / "cpu" / "kernels" / "pool.h").write_text("// edited")
    output = python(f"{REPORT}; import resnest_fused.backends.native", checkout)
    reason = (
        f"Python imported the folder {checkout / 'resnest_fused'}, and no compiled module fits its "
        f"sources in {checkout / 'csrc'} ({native._C.__file__} was built from others); run `pip "
        f"install '{checkout}'`, or take the package as it is installed: start Python in another "
        "folder, or as `python -P`"
    )
    warning = f"UserWarning: resnest_fused runs without its C++ and CUDA kernels: {reason}\n"
    assert output.count(warning) == 1
    assert f"BackendStatus(name='native', available=False, reason={reason!r})" in output


def test_without_any_module_it_is_said(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/nonexistent"])
    monkeypatch.chdir(checkout)
    with pytest.raises(ImportError, match=r"fits its sources in .* \(none is installed\); run"):
        binary.find(checkout / "resnest_fused")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package as it is installed without its compiled module, in a folder of its own."""
    package = tmp_path / "site-packages" / "resnest_fused"
    shutil.copytree(ROOT / "resnest_fused", package, ignore=shutil.ignore_patterns("*.so"))
    return package


def test_an_installed_package_takes_its_own_module_only(
    installed: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(checkout)])
    assert binary.find(installed) is None
    output = python(f"import sys; sys.path.insert(0, {str(installed.parent)!r}); {REPORT}", ROOT)
    assert "was installed without its compiled module" in output
    assert "Warning" not in output

    shutil.copy(native._C.__file__, installed)
    found = binary.find(installed)
    assert found is not None and found.origin == str(installed / Path(native._C.__file__).name)


def test_a_module_that_cannot_be_loaded_is_reported(installed: Path) -> None:
    (installed / Path(MODULE).name).write_bytes(b"\x7fELF")
    output = python(f"import sys; sys.path.insert(0, {str(installed.parent)!r}); {REPORT}", ROOT)
    assert output.count("UserWarning: resnest_fused runs without its C++ and CUDA kernels: ") == 1
    assert "BackendStatus(name='native', available=False, reason='" in output
    assert "file too short" in output
