"""Builds the extension module resnest_fused._C and the library of CUDA kernels resnest_fused._cuda.

The library needs nvcc and a torch with CUDA. All else about the package is in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.errors import CCompilerError

# No -march: a wheel runs on every machine of its platform, and the kernels choose their
# instructions at run time. -O3 takes a quarter longer to compile and makes nothing faster. Kernels
# write their FMA themselves, so contraction is off. The next two -f flags allow vectorization.
# Unlike -ffast-math they reorder no sum, and keep NaN and infinity.
CXX_FLAGS = [
    "-O2",
    "-g0",
    "-ftree-vectorize",
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

# --fmad=false: kernels write their multiply-adds themselves, so that forward and backward agree on
# each ReLU. --threads=0: nvcc compiles as many architectures at a time as there are processors.
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "--fmad=false",
    "--threads=0",
    "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra",
]

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest torch that the binary runs under

PURE_PYTHON = "RESNEST_FUSED_SKIP_NATIVE=1 installs the pure-Python package instead"
WITHOUT_CUDA = "RESNEST_FUSED_CUDA=0 builds without CUDA kernels"


def error(sentence: str) -> SystemExit:
    """An exception that ends the build with one sentence and no traceback."""
    return SystemExit(f"resnest_fused: {sentence}.")


def read_switch(name: str, environ: Mapping[str, str]) -> bool | None:
    """An environment variable that is 0 or 1, or None if it is unset or empty."""
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise error(f"{name} must be 0 or 1, not {value!r}")
    return value == "1" if value else None


def first_complaint(attempt: subprocess.CompletedProcess[str]) -> str:
    """The first error message of a compiler that failed."""
    lines = [line.strip() for line in attempt.stderr.splitlines() if not line.startswith("#$")]
    complaints = [line for line in lines if "error" in line or "fatal" in line]
    return complaints[0] if complaints else f"exit status {attempt.returncode}"


def find_compiler(environ: Mapping[str, str]) -> str:
    """The C++ compiler's name and version, after a test that it can compile a module."""
    command = environ.get("CXX", "c++")  # as torch's BuildExtension chooses it
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
        reason = first_complaint(attempt)
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


class NoCudaError(Exception):
    """The reason why no CUDA kernels can be built."""


class Nvcc(NamedTuple):
    """A CUDA compiler."""

    version: str  # such as 13.0.88
    capabilities: set[tuple[int, int]]  # that it compiles these kernels for
    library_dirs: list[str]  # of its toolkit


class Arch(NamedTuple):
    """Code for one compute capability: machine code, and maybe PTX for later GPUs."""

    major: int
    minor: int
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + "+PTX" * self.ptx

    def flags(self) -> list[str]:
        number = f"{self.major}{self.minor}"
        codes = [f"sm_{number}"] + [f"compute_{number}"] * self.ptx
        return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


class Cuda(NamedTuple):
    """What is built for CUDA; nothing if there are no architectures."""

    status: str
    archs: Sequence[Arch] = ()
    library_dirs: Sequence[str] = ()


OLDEST_CAPABILITY = (7, 5)
DEFAULT_CAPABILITIES = [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]

NVCC_PROBE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
static_assert(__cplusplus >= 202002L);
__global__ void probe(__nv_bfloat16* to) { *to = __float2bfloat16_rn(0.0f); }
"""


def find_nvcc(cuda_home: str | None, torch_cuda: str, environ: Mapping[str, str]) -> Nvcc:
    """The nvcc of cuda_home, after a test that it can compile the kernels' C++."""
    nvcc = Path(cuda_home or "/nonexistent", "bin", "nvcc")
    if not nvcc.exists():
        raise NoCudaError("nvcc was not found, neither by CUDA_HOME nor on the PATH")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([nvcc, *arguments], capture_output=True, text=True)

    try:
        found = re.search(r"release (\d+)\.\d+, V([\d.]+)", run("--version").stdout)
    except OSError as reason:
        raise NoCudaError(f"{nvcc} cannot be run ({reason.strerror})") from None
    if found is None:
        raise NoCudaError(f"{nvcc} does not tell its version")
    major, version = found.groups()
    if int(major) != int(torch_cuda.partition(".")[0]):
        raise NoCudaError(
            f"nvcc {version} and torch's CUDA {torch_cuda} are of different major versions"
        )
    # torch passes CC on as nvcc's host compiler; nvcc itself heeds NVCC_CCBIN.
    host = ["-ccbin", environ["CC"]] if "CC" in environ else []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text(NVCC_PROBE)
        files = [f"{folder}/probe.cu", "-o", f"{folder}/probe.o"]
        attempt = run("-v", "-std=c++20", *host, "-c", *files)
    if attempt.returncode != 0:
        raise NoCudaError(f"nvcc {version} cannot compile C++20 ({first_complaint(attempt)})")
    # nvcc on the PATH may be a script, whose folder does not tell where the libraries are.
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", attempt.stderr, re.MULTILINE)
    codes = re.findall(r"sm_(\d+)(\d)\b", run("--list-gpu-code").stdout)
    capabilities = {(int(major), int(minor)) for major, minor in codes}
    return Nvcc(
        version,
        {capability for capability in capabilities if capability >= OLDEST_CAPABILITY},
        re.findall(r'"-L(.*?)"', libraries[1]) if libraries else [],
    )


def read_archs(text: str, nvcc: Nvcc) -> list[Arch]:
    """The architectures that TORCH_CUDA_ARCH_LIST names."""
    ptx: dict[tuple[int, int], bool] = {}
    for word in re.split(r"[;,\s]+", text.strip("; ")):
        # The suffix, as in 9.0a, is dropped: the kernels have nothing that needs it.
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if found is None:
            raise error(f"TORCH_CUDA_ARCH_LIST must be like 8.0;9.0+PTX, {word!r} is not")
        capability = int(found[1]), int(found[2])
        if capability not in nvcc.capabilities:
            known = " ".join(str(Arch(*known)) for known in sorted(nvcc.capabilities))
            raise error(
                f"TORCH_CUDA_ARCH_LIST names {found[1]}.{found[2]}, nvcc {nvcc.version} compiles "
                f"these kernels for {known}; {WITHOUT_CUDA}"
            )
        ptx[capability] = found[3] is not None or ptx.get(capability, False)
    return [Arch(*capability, ptx[capability]) for capability in sorted(ptx)]


def choose_archs(
    environ: Mapping[str, str], gpus: Collection[tuple[int, int]], nvcc: Nvcc
) -> list[Arch]:
    """The architectures: those that the user names, or those of these GPUs, or the usual ones."""
    named = environ.get("TORCH_CUDA_ARCH_LIST", "")
    if named not in ("", "native"):
        return read_archs(named, nvcc)
    # A GPU that nvcc does not know runs the code for the newest one before it.
    runnable = [[known for known in nvcc.capabilities if known <= gpu] for gpu in gpus]
    chosen = {max(capabilities) for capabilities in runnable if capabilities}
    if gpus and not chosen:
        raise NoCudaError(f"nvcc {nvcc.version} cannot compile these kernels for so old a GPU")
    chosen = chosen or nvcc.capabilities.intersection(DEFAULT_CAPABILITIES)
    return [Arch(*capability, ptx=capability == max(chosen)) for capability in sorted(chosen)]


def find_cuda(
    wanted: bool | None, torch: Any, cuda_home: str | None, environ: Mapping[str, str]
) -> Cuda:
    """Decide what is built for CUDA: what is possible, unless ``wanted`` demands or forbids it."""
    if wanted is False:
        return Cuda("not built, as RESNEST_FUSED_CUDA=0 asks")
    try:
        if torch.version.cuda is None:
            raise NoCudaError(f"torch {torch.__version__} has no CUDA")
        nvcc = find_nvcc(cuda_home, torch.version.cuda, environ)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        gpus = {torch.cuda.get_device_capability(index) for index in range(count)}
        archs = choose_archs(environ, gpus, nvcc)
    except NoCudaError as reason:
        if wanted:
            raise error(f"RESNEST_FUSED_CUDA=1 is impossible, {reason}") from None
        return Cuda(f"not built, {reason}")
    status = f"built by nvcc {nvcc.version} for {' '.join(map(str, archs))}"
    return Cuda(status, archs, nvcc.library_dirs)


def native_build(wants_cuda: bool | None) -> dict[str, Any]:
    """The arguments of setup() that build the extension module and the CUDA library."""
    compiler = find_compiler(os.environ)
    torch = import_torch()
    from torch.utils import cpp_extension

    cuda = find_cuda(wants_cuda, torch, cpp_extension.CUDA_HOME, os.environ)
    csrc = Path("csrc")
    hash_sources = runpy.run_path("resnest_fused/backends/binary.py")["hash_sources"]
    write_ops = runpy.run_path("csrc/generate_ops.py")["write"]
    module_only = csrc / "ops.cpp"
    # The module gets these too: Python can run the planner of CUDA launches without a GPU.
    shared = {*csrc.glob("*.cpp"), *csrc.glob("cuda/*.cpp")} - {module_only}
    # torch's headers, pybind11's too, are system headers: warnings are for our code only.
    torch_includes = cpp_extension.include_paths()
    cxx_flags = CXX_FLAGS + [f"-isystem{path}" for path in torch_includes]
    # torch adds no architectures of its own, because our flags name some.
    arch_flags = [flag for arch in cuda.archs for flag in arch.flags()]
    nvcc_flags = NVCC_FLAGS + arch_flags + [f"-isystem={path}" for path in torch_includes]
    common: dict[str, Any] = {
        "language": "c++",
        "include_dirs": [str(csrc.resolve())],  # absolute: ninja runs in another folder
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
    }
    extensions = [
        Extension(
            "resnest_fused._C",
            sources=sorted(map(str, {module_only, *shared, *csrc.glob("cpu/*.cpp")})),
            extra_compile_args=cxx_flags,
            # The stable ABI is in libtorch_cpu; a link to libtorch_python or libc10 would tie the
            # binary to one torch release.
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu"],
            **common,
        )
    ]
    if cuda.archs:
        extensions += [
            # Not a Python module, in spite of its suffix: torch.ops.load_library loads it.
            Extension(
                "resnest_fused._cuda",
                sources=sorted(map(str, {*shared, *csrc.glob("cuda/*.cu")})),
                extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
                library_dirs=[*cpp_extension.library_paths(), *cuda.library_dirs],
                # The CUDA runtime is linked statically, with the three libraries that it needs. An
                # older libcudart.so, which torch may bring, can lack functions that nvcc's code
                # calls. Both runtimes use the device's one primary context.
                libraries=["torch_cuda", "torch_cpu", "cudart_static", "rt", "pthread", "dl"],
                **common,
            )
        ]

    class BuildNative(cpp_extension.BuildExtension):
        """Prints what is built and against what, stores it in the binary, and sums a failure up."""

        def build_extensions(self) -> None:
            facts = {
                "VERSION": self.distribution.get_version(),
                "SOURCES": hash_sources(Path.cwd()),
                "TORCH_VERSION": str(torch.__version__),
                "CXX_FLAGS": " ".join(CXX_FLAGS),
                "CUDA_STATUS": cuda.status,
                "CUDA_ARCHS": " ".join(map(str, cuda.archs)),
            }
            literals = {f"RESNEST_FUSED_{name}": json.dumps(fact) for name, fact in facts.items()}
            extensions[0].define_macros = [*extensions[0].define_macros, *literals.items()]
            generated = Path(self.build_temp, "generated").resolve()
            generated.mkdir(parents=True, exist_ok=True)
            write_ops(generated / "ops_generated.h")
            for extension in extensions:
                extension.include_dirs = [*extension.include_dirs, str(generated)]
            print(f"resnest_fused {facts['VERSION']}: building")
            for extension in extensions:
                print(f"  {extension.name}: {' '.join(extension.sources)}")
            print(f"  torch: {torch.__version__} in {Path(torch.__file__).parent}")
            print(f"  compiler: {compiler}")
            print(f"  flags: {facts['CXX_FLAGS']}")
            if cuda.archs:
                print(f"  nvcc flags: {' '.join(NVCC_FLAGS)}")
            print(f"  CUDA: {cuda.status}", flush=True)
            # Before the first one only torch's check of nvcc and its host compiler can fail.
            self.building = extensions[-1]
            try:
                super().build_extensions()
            except (RuntimeError, CCompilerError) as reason:
                raise error(
                    f"{self.building.name} could not be built ({reason}; what the compiler said "
                    f"is above); {PURE_PYTHON if self.building is extensions[0] else WITHOUT_CUDA}"
                ) from None

        def build_extension(self, extension: Extension) -> None:
            self.building = extension
            super().build_extension(extension)

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildNative}}


def main() -> None:
    wants_cuda = read_switch("RESNEST_FUSED_CUDA", os.environ)
    if read_switch("RESNEST_FUSED_SKIP_NATIVE", os.environ):
        print("resnest_fused: pure Python, as RESNEST_FUSED_SKIP_NATIVE=1 asks", flush=True)
        setup()
    else:
        setup(**native_build(wants_cuda))


if __name__ == "__main__":
    main()
