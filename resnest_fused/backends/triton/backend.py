"""The Triton backend: its ops, and which calls it can run.

The ops are PyTorch's from the beginning, so that a program that was exported with them can be
loaded. Triton and the kernels are imported when they are first asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnest_fused import ops
from resnest_fused.backends.registration import bind, latest

NAMESPACE = "resnest_fused_triton"
_FOLDER = "resnest_fused.backends.triton"

# The least compute capability of an NVIDIA GPU for which Triton compiles the kernels.
OLDEST_GPU = (7, 5)


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The module ``compat``, and the reason why there are no kernels."""
    try:
        if importlib.util.find_spec("triton") is None:
            return None, "Triton is not installed"
        compat = importlib.import_module(f"{_FOLDER}.compat")
        reason = compat.too_old()
        if reason is None:
            importlib.import_module(f"{_FOLDER}.ops")
    except Exception as error:  # of any kind: the other backends work without Triton
        return None, f"Triton cannot be imported ({error})"
    return compat, reason


def _missing() -> str | None:
    return _load()[1]


def unavailable() -> str | None:
    compat, reason = _load()
    if reason is None:
        reason = compat.wrong_environment()
    if reason is None and not (
        compat.INTERPRETED or torch.cuda.is_available() or torch.xpu.is_available()
    ):
        reason = "its kernels are for GPUs, PyTorch sees none"
    return reason


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    compat, reason = _load()
    return reason is None and compat.INTERPRETED


def can_run(x: Tensor) -> str | None:
    reason = _missing()
    if reason is not None or x.is_meta:  # its ops are the fake kernels, which run anywhere
        return reason
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
    return _load()[0].wrong_environment()


# As in native.py: constants for the compiler.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
interpreted._dynamo_marked_constant = True  # type: ignore[attr-defined]
gpu_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]
_wrong_environment._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _gpu_unavailable(kind: str, index: int | None) -> str | None:
    if interpreted():
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
    compat, _ = _load()
    where = "in Triton's interpreter, on the CPU" if compat.INTERPRETED else "for GPUs"
    tuned = ", tuned at first calls" if compat.autotunes() else ""
    return f"Triton {compat.VERSION} kernels {where}{tuned}"


def _implement(name: str) -> Callable[..., Any]:
    """The op of this name by what is imported when it is called."""

    def run(first: Tensor, *args: Any) -> Any:
        reason = importlib.import_module(__name__).can_run(first)
        if reason is not None:
            raise RuntimeError(f"{NAMESPACE}::{name} cannot run: {reason}")
        function = getattr(importlib.import_module(f"{_FOLDER}.ops"), name)
        replay = importlib.import_module(f"{_FOLDER}.replay")
        # Triton launches on the current device.
        guard = torch.accelerator.device_index(first.device.index)
        with contextlib.nullcontext() if first.is_cpu else guard:
            return replay.call(name, latest(function), (first, *args))

    return run


for _op in ops.TABLE.values():
    # PyTorch keeps an op for the whole process, and allows no second definition.
    if not hasattr(getattr(torch.ops, NAMESPACE), _op.name):
        _name, _, _signature = _op.schema.partition("(")
        torch.library.define(f"{NAMESPACE}::{_name}", f"({_signature}")
        # The CPU is for Triton's interpreter.
        torch.library.impl(f"{NAMESPACE}::{_name}", ("cpu", "cuda", "xpu"), _implement(_op.name))
globals().update(bind(NAMESPACE))  # as in native.py
