"""The native backend: the compiled ops of ``csrc/`` and their fake kernels."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_C: Any = None
_missing: str | None = None
try:
    _C = importlib.import_module("resnest_fused._C")
except ImportError as error:
    _missing = f"the compiled extension is not there ({error})"


def _load_cuda() -> str | None:
    """Load the CUDA kernels; why that is impossible, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    library = importlib.util.find_spec("resnest_fused._cuda")
    if library is None or library.origin is None:
        return "the library is not there"
    try:
        torch.ops.load_library(library.origin)
    except OSError as error:
        return str(error.__cause__ or error)  # torch's own names the file only
    return None


_cuda_missing = _load_cuda() if _missing is None else _missing


def unavailable() -> str | None:
    if _missing is None:
        try:
            build_info()
        except RuntimeError as error:  # a wrong RESNEST_FUSED_CPU_CAPABILITY
            return str(error)
    return _missing


def can_run(x: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if x.is_cuda:
        reason = gpu_unavailable(x.device.index)
        if reason is not None:
            return reason
    elif not (x.is_cpu or x.is_meta):  # meta: the ops trace through their fake kernels
        return f"its kernels are built for cpu and cuda, x is on {x.device.type}"
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "an ONNX graph has standard ops only"
    return None


def gpu_unavailable(index: int) -> str | None:
    """Why the CUDA kernels cannot run on this GPU, or None."""
    return _gpu_unavailable(index)


# The compiler shall not trace it: it would warn of the cache and look into what fills it. This is
# what torch.compiler.assume_constant_result does, which would import the compiler here and now.
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
        # Machine code runs on later GPUs of its major version, PTX becomes code for any later GPU.
        if (major, minor) <= capability and (ptx or major == capability[0]):
            return True
    return False


def describe() -> str:
    facts = build_info()
    cpu = f"C++ kernels for cpu, {facts['cpu_capability']}, {facts['compiler']}"
    return f"{cpu}; CUDA kernels {cuda_status()}"


def build_info() -> dict[str, str]:
    """Compiler, flags, versions and the instruction set chosen on this machine."""
    return dict(_C.build_info())


def cuda_status() -> str:
    """How the CUDA kernels were built or why not, and why they are not loaded."""
    facts = build_info()
    if facts["cuda_archs"] and _cuda_missing is not None:
        return f"{facts['cuda_status']} but not loaded ({_cuda_missing})"
    return facts["cuda_status"]


if _C is not None:
    _ops = torch.ops.resnest_fused
    forward = _ops.split_attention.default
    forward_train = _ops.split_attention_train.default
    backward = _ops.split_attention_backward.default
    batch_statistics = _ops.batch_statistics.default
    pool = _ops.pool.default
    recombine = _ops.recombine.default
    pool_backward = _ops.pool_backward.default
    prologue_backward = _ops.prologue_backward.default
    recombine_backward = _ops.recombine_backward.default

    def _register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the fake kernel of an op, behind the check that all fake kernels need."""

        def register(fake: Callable[..., Any]) -> Callable[..., Any]:
            @torch.library.register_fake(f"resnest_fused::{name}")
            def checked(first: Tensor, *args: Any) -> Any:
                # Beside a meta tensor PyTorch calls this, whatever the device of the others.
                for tensor in args:
                    if isinstance(tensor, Tensor) and tensor.device != first.device:
                        raise RuntimeError(
                            f"expected all tensors on {first.device}, got {tensor.device}"
                        )
                return fake(first, *args)

            return fake

        return register

    def _empty_map(x: Tensor, channels: int) -> Tensor:
        # channels_last only where it is not also plainly contiguous: as the kernels choose.
        nhwc = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if nhwc else torch.contiguous_format
        batch, _, height, width = x.shape
        return torch.empty(
            (batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout
        )

    def _crumb(x: Tensor, *shape: int) -> Tensor:
        return x.new_empty(
            shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
        )

    @_register("split_attention")
    def _(x: Tensor, *args: Any) -> Tensor:
        radix = args[-2]
        return _empty_map(x, x.shape[1] // radix)

    @_register("split_attention_train")
    def _(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        bn0_batch_stats, fc1_weight = args[6:8]
        bn1_batch_stats, radix, _ = args[-3:]
        batch, features = x.shape[:2]
        channels, inter = features // radix, fc1_weight.shape[0]
        of_bn0, of_bn1 = features if bn0_batch_stats else 0, inter if bn1_batch_stats else 0
        return (
            _empty_map(x, channels),
            _crumb(x, batch, channels),
            _crumb(x, batch, inter),
            _crumb(x, batch, radix, channels),
            *(_crumb(x, size) for size in (of_bn0, of_bn0, of_bn1, of_bn1)),
        )

    @_register("split_attention_backward")
    def _(dout: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        bn0_weight, bn0_bias = args[1:3]
        fc1_weight, fc2_weight, bn1_weight, bn1_bias = args[7:11]
        needed = args[-1]
        inter, features = fc1_weight.shape[0], x.shape[1]

        def gradient(i: int, like: Tensor | None, *shape: int) -> Tensor:
            like = x if like is None else like
            return like.new_empty(shape if needed[i] else (0,))

        return (
            _empty_map(x, features) if needed[0] else x.new_empty(0),
            gradient(1, bn0_weight, features),
            gradient(2, bn0_bias, features),
            gradient(3, fc1_weight, *fc1_weight.shape),
            gradient(4, fc1_weight, inter),
            gradient(5, fc2_weight, *fc2_weight.shape),
            gradient(6, fc2_weight, features),
            gradient(7, bn1_weight, inter),
            gradient(8, bn1_bias, inter),
        )

    @_register("batch_statistics")
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        return _crumb(x, x.shape[1]), _crumb(x, x.shape[1])

    @_register("pool")
    def _(x: Tensor, *args: Any) -> Tensor:
        radix = args[-1]
        return _crumb(x, x.shape[0], x.shape[1] // radix)

    @_register("recombine")
    def _(x: Tensor, *args: Any) -> Tensor:
        attention = args[-1]
        return _empty_map(x, attention.shape[2])

    @_register("pool_backward")
    def _(dout: Tensor, x: Tensor, relu: bool, *args: Any) -> tuple[Tensor, Tensor]:
        radix = args[-1]
        splits = (radix, x.shape[1] // radix)
        sums = _crumb(x, x.shape[0], 4, *splits) if relu else _crumb(x, 0)
        return _crumb(x, x.shape[0], *splits), sums

    @_register("prologue_backward")
    def _(sums: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        features = sums.shape[2] * sums.shape[3]
        return sums.new_empty(features), sums.new_empty(features)

    @_register("recombine_backward")
    def _(dout: Tensor, x: Tensor, *_: Any) -> Tensor:
        return _empty_map(x, x.shape[1])
