"""The Triton backend: its ops, and which calls it can run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

# The least compute capability of an NVIDIA GPU for which Triton compiles the kernels.
OLDEST_GPU = (7, 5)


def _load() -> tuple[Any, dict[str, Any], str | None]:
    """The module ``compat``, the ops by name, and the reason if there are none."""
    try:
        if importlib.util.find_spec("triton") is None:
            return None, {}, "Triton is not installed"
        compat = importlib.import_module("resnest_fused.backends.triton.compat")
        reason = compat.too_old()
        if reason is not None:
            return compat, {}, reason
        ops = importlib.import_module("resnest_fused.backends.triton.ops")
    except Exception as error:  # of any kind: the other backends work without Triton
        return None, {}, f"Triton cannot be imported ({error})"
    return compat, ops.BOUND, None


_compat, _ops, _missing = _load()
globals().update(_ops)  # as in native.py


def unavailable() -> str | None:
    if _missing is not None:
        return _missing
    reason = _compat.wrong_environment()
    if reason is None and not (
        _compat.INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available()
    ):
        reason = "its kernels are for GPUs, PyTorch sees none"
    return reason


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return _missing is None and _compat.INTERPRETED


def can_run(x: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if x.is_meta:  # its ops are the fake kernels, which run anywhere
        return None
    reason = gpu_unavailable(x.device.type, x.device.index)
    if reason is None:
        wrong = _wrong_environment()
        if wrong is not None:
            raise ValueError(wrong)
    return reason


def gpu_unavailable(kind: str, index: int | None) -> str | None:
    """Why the kernels cannot run on this device, or None."""
    return _gpu_unavailable(kind, index)


def _wrong_environment() -> str | None:
    return _compat.wrong_environment()


# As in native.py: constants for the compiler.
gpu_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
_wrong_environment._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _gpu_unavailable(kind: str, index: int | None) -> str | None:
    if _compat.INTERPRETED:
        return None if kind == "cpu" else f"its interpreter runs on cpu, x is on {kind}"
    if kind not in ("cuda", "xpu"):
        return f"its kernels are for GPUs, x is on {kind}"
    if kind == "cuda" and torch.version.cuda is not None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_GPU:
            oldest, found = (".".join(map(str, c)) for c in (OLDEST_GPU, capability))
            return f"its kernels are for GPUs from {oldest} on, GPU {index} is {found}"
    return None


def describe() -> str:
    where = "in Triton's interpreter, on the CPU" if _compat.INTERPRETED else "for GPUs"
    tuned = ", tuned at first calls" if _compat.autotunes() else ""
    return f"Triton {_compat.VERSION} kernels {where}{tuned}"
