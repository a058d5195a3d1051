"""The native backend: the compiled ops of ``csrc/``."""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnest_fused.backends import binary
from resnest_fused.backends.registration import bind


def _load() -> ModuleType | None:
    """Import the compiled module; None if the package was installed without one.

    Raises:
        ImportError: no compiled module fits the package, or it cannot be loaded.
    """
    if binary.NAME not in sys.modules:
        spec = binary.find(Path(__file__).parents[1])
        if spec is None:
            return None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[binary.NAME] = module
        vars(sys.modules["resnest_fused"])["_C"] = module
    return sys.modules[binary.NAME]


_C: Any = None
_missing: str | None = None
try:
    _C = _load()
    if _C is None:
        _missing = "the package was installed without its compiled module"
except ImportError as error:
    _missing = str(error)
    # A warning, because everything is many times slower without the kernels.
    warnings.warn(f"resnest_fused runs without its C++ and CUDA kernels: {error}", stacklevel=2)


def cuda_library() -> str | None:
    """The file with the CUDA kernels, which lies beside the compiled module."""
    library = PathFinder.find_spec("resnest_fused._cuda", [str(Path(_C.__file__).parent)])
    return None if library is None else library.origin


def _load_cuda() -> str | None:
    """Load the CUDA kernels; returns why that is impossible, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    library = cuda_library()
    if library is None:
        return "the library is not there"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return str(error.__cause__ or error)  # torch's own names the file only
    return None


_cuda_missing = _load_cuda() if _missing is None else _missing


def build_info() -> dict[str, str]:
    """Compiler, flags, versions and the instruction set chosen on this machine."""
    return dict(_C.build_info())


def _read_environment() -> str | None:
    """What is wrong with RESNEST_FUSED_CPU_CAPABILITY or _CUDA_TUNING, or None."""
    try:
        build_info()
        _C.tuning()
    except RuntimeError as error:
        return str(error)
    return None


# Read on import and reported when a call needs it, like RESNEST_FUSED_BACKEND.
_wrong_environment = _read_environment() if _missing is None else None


def unavailable() -> str | None:
    return _missing or _wrong_environment


def can_run(x: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if _wrong_environment is not None:
        raise ValueError(_wrong_environment)
    if x.is_cuda:
        reason = gpu_unavailable(x.device.index)
        if reason is not None:
            return reason
    elif not (x.is_cpu or x.is_meta):  # meta: the ops trace through their fake kernels
        return f"its kernels are built for cpu and cuda, x is on {x.device.type}"
    return None


def gpu_unavailable(index: int) -> str | None:
    """Why the CUDA kernels cannot run on this GPU, or None."""
    return _gpu_unavailable(index)


# torch.compile must not trace this function, or it would warn about the cache. This attribute has
# the effect of torch.compiler.assume_constant_result, without importing the compiler now.
gpu_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _gpu_unavailable(index: int) -> str | None:
    status = cuda_status()
    if _cuda_missing is not None:
        return f"its CUDA kernels are {status}"
    if not torch.cuda.is_available():
        return None  # a fake tensor: a graph is traced on a machine without a GPU
    major, minor = torch.cuda.get_device_capability(index)
    if not _covers(build_info()["cuda_archs"], (major, minor)):
        return f"its CUDA kernels are {status}, GPU {index} is {major}.{minor}"
    return None


def _covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``archs``, such as "8.0 9.0+PTX", runs on a GPU of this capability."""
    for arch in archs.split():
        number, _, ptx = arch.partition("+")
        major, minor = map(int, number.split("."))
        # Machine code runs on later GPUs of its major version. PTX runs on any later GPU.
        if (major, minor) <= capability and (ptx or major == capability[0]):
            return True
    return False


def describe() -> str:
    facts = build_info()
    cpu = f"C++ kernels for cpu, {facts['cpu_capability']}, {facts['compiler']}"
    return f"{cpu}; CUDA kernels {cuda_status()}"


def cuda_status() -> str:
    """How the CUDA kernels were built, or why they were not built or not loaded."""
    facts = build_info()
    if facts["cuda_archs"] and _cuda_missing is not None:
        return f"{facts['cuda_status']} but not loaded ({_cuda_missing})"
    return facts["cuda_status"]


if _C is not None:
    # torch.compile can trace a module attribute, so each op becomes one.
    globals().update(bind("resnest_fused"))
