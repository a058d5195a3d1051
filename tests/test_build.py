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
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ptxas_report
import pytest
import torch
from build_files import ROOT, load

import resnest_fused
from resnest_fused.backends import native


@pytest.fixture
def backend() -> ModuleType:
    return load("csrc/build_backend.py")


@pytest.fixture
def setup_py() -> ModuleType:
    return load("setup.py")


def write_script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def answering_interpreter(path: Path, version: str | None) -> str:
    """A stand-in for a Python that has this torch, or none, on its path."""
    abi = sysconfig.get_config_var("SOABI")
    answer = json.dumps({"abi": abi, "version": version, "path": ["/target/site-packages"]})
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
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # the build has none
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


# What the build decides and says


def test_version_is_the_same_everywhere() -> None:
    from resnest_fused import _C

    assert importlib.metadata.version("resnest_fused") == resnest_fused.__version__
    assert _C.build_info()["version"] == resnest_fused.__version__
    assert run_setup(RESNEST_FUSED_SKIP_NATIVE="1").stdout.endswith(
        f"\n{resnest_fused.__version__}\n"
    )


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"RESNEST_FUSED_CUDA": "on"}, "RESNEST_FUSED_CUDA must be 0 or 1, not 'on'"),
        ({"RESNEST_FUSED_SKIP_NATIVE": " "}, "RESNEST_FUSED_SKIP_NATIVE must be 0 or 1, not ' '"),
    ],
)
def test_impossible_switch_ends_the_build_with_one_sentence(
    environ: dict[str, str], sentence: str
) -> None:
    result = run_setup(**environ)
    assert result.returncode != 0
    assert result.stderr == f"resnest_fused: {sentence}.\n"


def test_an_empty_switch_is_unset(setup_py: ModuleType) -> None:
    """Compose files set a variable that is not given to an empty string."""
    for environ, expected in (
        ({}, None),
        ({"N": ""}, None),
        ({"N": "0"}, False),
        ({"N": "1"}, True),
    ):
        assert setup_py.read_switch("N", environ) is expected


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


# Whether CUDA kernels are built, and for what


def fake_torch(cuda: str | None, *gpus: tuple[int, int]) -> Any:
    """A stand-in for a torch of this CUDA version on a machine with GPUs of these capabilities."""
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus),
            get_device_capability=lambda index: gpus[index],
        ),
    )


def fake_toolkit(path: Path, version: str, *, complaint: str = "") -> str:
    """A stand-in for a CUDA toolkit, whose nvcc compiles, or fails with a complaint."""
    (path / "bin").mkdir()
    release = ".".join(version.split(".")[:2])
    write_script(
        path / "bin" / "nvcc",
        'case "$1" in',
        f"--version) echo 'Cuda compilation tools, release {release}, V{version}' ;;",
        "--list-gpu-code) printf 'sm_70\\nsm_75\\nsm_80\\nsm_90\\nsm_90a\\nsm_100\\nsm_120\\n' ;;",
        """*) echo '#$ LIBRARIES=  "-L/toolkit/lib/stubs" "-L/toolkit/lib"' >&2""",
        f"""   test -z '{complaint}' || {{ echo '{complaint}' >&2; exit 1; }} ;;""",
        "esac",
    )
    return str(path)


NO_TORCH_CUDA = "torch 2.13.0 has no CUDA"
NO_NVCC = "nvcc was not found, neither by CUDA_HOME nor on the PATH"
OTHER_MAJOR = "nvcc {} and torch's CUDA {} are of different major versions"


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "obstacle"),
    [
        (None, None, NO_TORCH_CUDA),
        (None, "13.0.88", NO_TORCH_CUDA),
        ("13.0", None, NO_NVCC),
        ("13.0", "12.9.86", OTHER_MAJOR.format("12.9.86", "13.0")),
        ("12.8", "13.0.88", OTHER_MAJOR.format("13.0.88", "12.8")),
        ("12.8", "120.1.5", OTHER_MAJOR.format("120.1.5", "12.8")),
        ("13.0", "13.0.88", None),
        ("13.0", "13.2.4", None),
        ("13.2", "13.0.88", None),
        ("12.8", "12.10.7", None),
    ],
)
def test_cuda_is_built_where_torch_and_nvcc_allow_it(
    setup_py: ModuleType,
    tmp_path: Path,
    torch_cuda: str | None,
    nvcc: str | None,
    obstacle: str | None,
) -> None:
    home = nvcc and fake_toolkit(tmp_path, nvcc)

    def find(wanted: bool | None) -> Any:
        return setup_py.find_cuda(wanted, fake_torch(torch_cuda), home, {})

    assert find(False) == ("not built, as RESNEST_FUSED_CUDA=0 asks", (), ())
    if obstacle is None:
        assert find(None) == find(True)
        assert find(None).status == f"built by nvcc {nvcc} for 8.0 9.0 10.0 12.0+PTX"
        assert list(map(str, find(None).archs)) == ["8.0", "9.0", "10.0", "12.0+PTX"]
        assert find(None).library_dirs == ["/toolkit/lib/stubs", "/toolkit/lib"]
    else:
        assert find(None) == (f"not built, {obstacle}", (), ())
        with pytest.raises(SystemExit) as error:
            find(True)
        assert str(error.value) == (
            f"resnest_fused: RESNEST_FUSED_CUDA=1 is impossible, {obstacle}."
        )


def test_an_nvcc_that_cannot_be_used_is_an_obstacle_in_its_own_words(
    setup_py: ModuleType, tmp_path: Path
) -> None:
    complaint = "#error -- unsupported GNU version!"
    home = fake_toolkit(tmp_path, "13.0.88", complaint=complaint)
    found = setup_py.find_cuda(None, fake_torch("13.0"), home, {})
    assert found.status == f"not built, nvcc 13.0.88 cannot compile C++20 ({complaint})"

    nvcc = write_script(tmp_path / "bin" / "nvcc")
    found = setup_py.find_cuda(None, fake_torch("13.0"), home, {})
    assert found.status == f"not built, {nvcc} does not tell its version"

    nvcc.chmod(0o644)
    found = setup_py.find_cuda(None, fake_torch("13.0"), home, {})
    assert found.status == f"not built, {nvcc} cannot be run (Permission denied)"


def test_host_compiler_that_torch_passes_to_nvcc_is_tried(
    setup_py: ModuleType, tmp_path: Path
) -> None:
    home = fake_toolkit(tmp_path, "13.0.88")
    script = Path(home, "bin", "nvcc")
    script.write_text(script.read_text().replace("*)", f"*) echo $* > {tmp_path}/arguments;"))
    setup_py.find_cuda(None, fake_torch("13.0"), home, {"CC": "gcc-13"})
    assert "-ccbin gcc-13" in (tmp_path / "arguments").read_text()


@pytest.fixture
def nvcc(setup_py: ModuleType) -> Any:
    capabilities = {(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (12, 1)}
    return setup_py.Nvcc("13.0.88", capabilities, [])


@pytest.mark.parametrize(
    ("named", "gpus", "expected"),
    [
        ("7.5", [], "7.5"),
        ("8.0;9.0+PTX", [(7, 5)], "8.0 9.0+PTX"),
        ("10.0 9.0 7.5", [], "7.5 9.0 10.0"),
        ("9.0a, 10.0f;", [], "9.0 10.0"),
        ("9.0;9.0+PTX;9.0", [], "9.0+PTX"),
        (None, [], "8.0 8.6 9.0 10.0 12.0+PTX"),
        ("", [(7, 5)], "7.5+PTX"),
        ("native", [(9, 0), (7, 5), (9, 0)], "7.5 9.0+PTX"),
        (None, [(8, 9)], "8.6+PTX"),
        (None, [(7, 0), (8, 0)], "8.0+PTX"),
        (None, [(13, 0), (9, 0)], "9.0 12.1+PTX"),
    ],
)
def test_architectures(
    setup_py: ModuleType, nvcc: Any, named: str | None, gpus: list[tuple[int, int]], expected: str
) -> None:
    environ = {} if named is None else {"TORCH_CUDA_ARCH_LIST": named}
    archs = setup_py.choose_archs(environ, gpus, nvcc)
    assert " ".join(map(str, archs)) == expected


def test_architectures_before_the_oldest_are_not_offered(
    setup_py: ModuleType, tmp_path: Path
) -> None:
    found = setup_py.find_nvcc(fake_toolkit(tmp_path, "12.8.93"), "12.8", {})
    assert found.capabilities == {(7, 5), (8, 0), (9, 0), (10, 0), (12, 0)}


def test_default_architectures_are_those_that_nvcc_knows(setup_py: ModuleType, nvcc: Any) -> None:
    old = nvcc._replace(capabilities={(7, 0), (8, 0), (8, 6), (8, 9), (9, 0)})
    assert list(map(str, setup_py.choose_archs({}, [], old))) == ["8.0", "8.6", "9.0+PTX"]


def test_gpus_that_nvcc_has_left_behind_are_an_obstacle(setup_py: ModuleType, nvcc: Any) -> None:
    with pytest.raises(setup_py.NoCudaError, match="cannot compile these kernels for so old a GPU"):
        setup_py.choose_archs({}, [(7, 0)], nvcc)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("Hopper", "must be like 8.0;9.0+PTX, 'Hopper' is not"),
        ("sm_90", "must be like 8.0;9.0+PTX, 'sm_90' is not"),
        ("90", "must be like 8.0;9.0+PTX, '90' is not"),
        (
            "7.0;8.0",
            "names 7.0, nvcc 13.0.88 compiles these kernels for 7.5 8.0 8.6 9.0 10.0 12.0 12.1; "
            "RESNEST_FUSED_CUDA=0 builds without CUDA kernels",
        ),
    ],
)
def test_wrong_architectures_end_the_build_with_one_sentence(
    setup_py: ModuleType, nvcc: Any, named: str, sentence: str
) -> None:
    with pytest.raises(SystemExit) as error:
        setup_py.choose_archs({"TORCH_CUDA_ARCH_LIST": named}, [], nvcc)
    assert str(error.value) == f"resnest_fused: TORCH_CUDA_ARCH_LIST {sentence}."


def test_flags_of_an_architecture(setup_py: ModuleType) -> None:
    assert setup_py.Arch(8, 0).flags() == ["-gencode=arch=compute_80,code=sm_80"]
    assert setup_py.Arch(12, 0, ptx=True).flags() == [
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


# What ptxas says of the kernels

PTXAS_LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN13resnest_fused4cuda4poolIfLi4EEEvPKT_' for 'sm_75'
ptxas info    : Function properties for _ZN13resnest_fused4cuda4poolIfLi4EEEvPKT_
    {frame} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used {registers} registers, used 0 barriers, 128 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 25.472 ms
ptxas info    : Compiling entry function '_ZN13resnest_fused4cuda4poolIfLi4EEEvPKT_' for 'sm_120'
ptxas info    : Function properties for _ZN13resnest_fused4cuda4poolIfLi4EEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 128 bytes smem, 372 bytes cmem[0]
"""


@pytest.mark.parametrize(
    ("frame", "spilled", "registers", "archs", "verdict"),
    [
        (0, 0, 99, "7.5;12.0+PTX", "pool                                 1    99    64"),
        (0, 0, 99, "7.5 12.0", "except float64's, none spills or takes more than 128 registers"),
        (16, 0, 99, "7.5;12.0", "pool<float, 4> for 7.5: 16 bytes of stack, 0 bytes spilled"),
        (8, 4, 99, "7.5;12.0", "pool<float, 4> for 7.5: 8 bytes of stack, 8 bytes spilled"),
        (0, 0, 130, "7.5;12.0", "pool<float, 4> for 7.5: 130 registers, 128 are planned for"),
        (0, 0, 99, "7.5;8.0;12.0", "same kernels for every architecture, found 1 for 7.5, 0 for"),
    ],
)
def test_ptxas_report(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    frame: int,
    spilled: int,
    registers: int,
    archs: str,
    verdict: str,
) -> None:
    monkeypatch.setattr(ptxas_report._C, "plan_limits", lambda: {"registers": 128})
    log = tmp_path / "log"
    log.write_text(PTXAS_LOG.format(frame=frame, spilled=spilled, registers=registers))
    code = ptxas_report.main(str(log), archs)
    assert verdict in capsys.readouterr().out
    assert code == (" for 7.5" in verdict)


def test_ptxas_report_spares_float64() -> None:
    kernel = ptxas_report.Kernel("pool<float, 4>", "9.0", registers=200, stack=8, spilled=8)
    assert kernel.fault(128) is not None
    assert kernel._replace(name="pool<double, 4>").fault(128) is None


# What the binaries link to


def binaries() -> list[str]:
    """The extension module and, where it is installed, the library of CUDA kernels."""
    cuda = native.cuda_library()
    assert (cuda is not None) == bool(native.build_info()["cuda_archs"])
    return [native._C.__file__, *([] if cuda is None else [cuda])]


def inspect_binary(*command: str) -> str:
    """What a binutils program says about a binary."""
    assert shutil.which(command[0]), f"this test needs {command[0]}, of binutils"
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_binaries_need_only_the_stable_abi() -> None:
    for binary in binaries():
        symbols = inspect_binary("nm", "-DC", "--undefined-only", binary).splitlines()
        assert any("torch_call_dispatcher" in name or "aoti_torch_" in name for name in symbols)
        unstable = [name for name in symbols if re.search(r"\b(at|c10|torch|caffe2)::", name)]
        assert unstable == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_binaries_are_tied_to_no_unstable_library_and_no_folder() -> None:
    libraries = (["libtorch_cpu.so"], ["libtorch_cuda.so", "libtorch_cpu.so"])
    for binary, expected in zip(binaries(), libraries, strict=False):
        dynamic = inspect_binary("readelf", "-d", binary)
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
        assert [name for name in needed if re.search("torch|c10|cuda", name)] == expected
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
