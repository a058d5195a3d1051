"""The native backend: the compiled ops of ``csrc/`` and their fake kernels."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_C: Any = None
_missing: str | None = None
try:
    _C = importlib.import_module("resnest_fused._C")
except ImportError as error:
    _missing = f"the compiled extension is not there ({error})"


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
    if not (x.is_cpu or x.is_meta):  # meta: the ops trace through their fake kernels
        return f"its kernels are built for cpu, x is on {x.device.type}"
    return None


def describe() -> str:
    facts = build_info()
    return f"C++ kernels for cpu, {facts['cpu_capability']}, {facts['compiler']}"


def build_info() -> dict[str, str]:
    """Compiler, flags, versions and the instruction set chosen on this machine."""
    return dict(_C.build_info())


if _C is not None:
    forward = torch.ops.resnest_fused.split_attention.default
    forward_train = torch.ops.resnest_fused.split_attention_train.default
    backward = torch.ops.resnest_fused.split_attention_backward.default

    def _check_devices(x: Tensor, args: tuple[Any, ...]) -> None:
        # Beside a meta tensor PyTorch calls the fake kernel, whatever the device of the others.
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.device != x.device:
                raise RuntimeError(f"expected all tensors on {x.device}, got {tensor.device}")

    def _empty_out(x: Tensor, channels: int) -> Tensor:
        # channels_last only where it is not also plainly contiguous: as the kernels choose.
        nhwc = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if nhwc else torch.contiguous_format
        batch, _, height, width = x.shape
        return torch.empty(
            (batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout
        )

    @torch.library.register_fake("resnest_fused::split_attention")
    def _(x: Tensor, *args: Any) -> Tensor:
        _check_devices(x, args)
        radix = args[-2]
        return _empty_out(x, x.shape[1] // radix)

    @torch.library.register_fake("resnest_fused::split_attention_train")
    def _(x: Tensor, fc1_weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
        _check_devices(x, (fc1_weight, *args))
        batch_stats, radix = args[-3], args[-2]
        batch, features = x.shape[:2]
        channels, inter = features // radix, fc1_weight.shape[0]
        crumbs = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        stats = inter if batch_stats else 0
        return (
            _empty_out(x, channels),
            crumbs.new_empty(batch, channels),
            crumbs.new_empty(batch, inter),
            crumbs.new_empty(batch, radix, channels),
            crumbs.new_empty(stats),
            crumbs.new_empty(stats),
        )

    @torch.library.register_fake("resnest_fused::split_attention_backward")
    def _(
        dout: Tensor,
        x: Tensor,
        fc1_weight: Tensor,
        fc2_weight: Tensor,
        bn1_weight: Tensor | None,
        bn1_bias: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, ...]:
        needed = args[-1]
        inter, features = fc1_weight.shape[0], x.shape[1]

        def gradient(i: int, like: Tensor | None, *shape: int) -> Tensor:
            like = x if like is None else like
            return like.new_empty(shape if needed[i] else (0,))

        return (
            _empty_out(x, features) if needed[0] else x.new_empty(0),
            gradient(1, fc1_weight, *fc1_weight.shape),
            gradient(2, fc1_weight, inter),
            gradient(3, fc2_weight, *fc2_weight.shape),
            gradient(4, fc2_weight, features),
            gradient(5, bn1_weight, inter),
            gradient(6, bn1_bias, inter),
        )
