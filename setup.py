"""Builds the extension module resnest_fused._C; all else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.errors import CCompilerError

# No -march: a wheel runs on every machine of its platform, the kernels choose their instructions at
# run time. The three -f flags on arithmetic allow FMA and vectorization; unlike -ffast-math they
# reorder no sum and keep NaN and infinity.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
]

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the binary runs under

PURE_PYTHON = "RESNEST_FUSED_SKIP_NATIVE=1 installs the pure-Python package instead"


def error(sentence: str) -> SystemExit:
    """What ends the build with one sentence and no traceback."""
    return SystemExit(f"resnest_fused: {sentence}.")


def read_switch(name: str, environ: Mapping[str, str]) -> bool:
    """An environment variable that is 0 (or unset) or 1."""
    value = environ.get(name, "0")
    if value not in ("0", "1"):
        raise error(f"{name} must be 0 or 1, not {value!r}")
    return value == "1"


def cuda_status(environ: Mapping[str, str]) -> str:
    """Whether CUDA kernels are built and why, in words."""
    if read_switch("RESNEST_FUSED_CUDA", environ):
        raise error("RESNEST_FUSED_CUDA=1 is impossible, this version contains no CUDA kernels")
    return "not included, this version has CPU kernels only"


def find_compiler(environ: Mapping[str, str]) -> str:
    """The C++ compiler's name and version, after it has shown that it can do what is needed."""
    command = environ.get("CXX", "c++")  # as torch's BuildExtension has it
    remedy = f"name g++ 11 or newer, or clang, in CXX, or do without ({PURE_PYTHON})"
    probe = "#include <Python.h>\nstatic_assert(__cplusplus >= 202002L);\n"
    flags = ["-std=c++20", "-fsyntax-only", "-I", sysconfig.get_path("include"), "-x", "c++", "-"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [*shlex.split(command), *arguments]
        return subprocess.run(words, input=probe, capture_output=True, text=True)

    try:
        attempt, version = run(*flags), run("--version")
    except OSError:
        raise error(f"the C++ compiler `{command}` cannot be run; {remedy}") from None
    if attempt.returncode != 0:
        complaints = [line.strip() for line in attempt.stderr.splitlines() if "error" in line]
        reason = complaints[0] if complaints else f"exit status {attempt.returncode}"
        raise error(f"`{command}` cannot compile a Python module in C++20 ({reason}); {remedy}")
    return version.stdout.partition("\n")[0]


def import_torch() -> Any:
    """The torch to build against."""
    remedy = f"install it first, or do without ({PURE_PYTHON})"
    try:
        import torch
    except ImportError as reason:
        raise error(f"the build needs torch 2.10 or newer ({reason}); {remedy}") from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise error(f"the build needs torch 2.10 or newer, not {torch.__version__}; {remedy}")
    return torch


def native_build(cuda: str) -> dict[str, Any]:
    """The arguments of setup() that build the extension module."""
    compiler = find_compiler(os.environ)
    torch = import_torch()
    from torch.utils import cpp_extension

    csrc = Path("csrc")
    torch_includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    extension = Extension(
        "resnest_fused._C",
        sources=sorted(map(str, [*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")])),
        language="c++",
        include_dirs=[str(csrc.resolve())],  # absolute: ninja runs elsewhere
        # torch's headers, pybind11 among them, as system ones: warnings are for our code.
        extra_compile_args=CXX_FLAGS + torch_includes,
        # The stable ABI is in libtorch_cpu; a link to libtorch_python or libc10 would tie the
        # binary to one torch release.
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
    )

    class BuildNative(cpp_extension.BuildExtension):
        """Says what is built and against what, tells the binary too, and sums a failure up."""

        def build_extensions(self) -> None:
            facts = {
                "VERSION": self.distribution.get_version(),
                "TORCH_VERSION": str(torch.__version__),
                "CXX_FLAGS": " ".join(CXX_FLAGS),
                "CUDA_STATUS": cuda,
                "CUDA_ARCHS": "",
            }
            extension.define_macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
            extension.define_macros += [(f"RESNEST_FUSED_{k}", f'"{v}"') for k, v in facts.items()]
            print(f"resnest_fused {facts['VERSION']}: building {extension.name}")
            print(f"  sources: {' '.join(extension.sources)}")
            print(f"  torch: {torch.__version__} in {Path(torch.__file__).parent}")
            print(f"  compiler: {compiler}")
            print(f"  flags: {facts['CXX_FLAGS']}")
            print(f"  CUDA: {cuda}", flush=True)
            try:
                super().build_extensions()
            except (RuntimeError, CCompilerError) as reason:
                raise error(
                    f"{extension.name} could not be built ({reason}; what the compiler said is "
                    f"above); {PURE_PYTHON}"
                ) from None

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildNative}}


def main() -> None:
    cuda = cuda_status(os.environ)
    if read_switch("RESNEST_FUSED_SKIP_NATIVE", os.environ):
        print("resnest_fused: pure Python, as RESNEST_FUSED_SKIP_NATIVE=1 asks", flush=True)
        setup()
    else:
        setup(**native_build(cuda))


if __name__ == "__main__":
    main()
