"""The native backend: the compiled ops of ``csrc/``, their fake kernels, and whether they are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from resnest_fused import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = f"the compiled extension is not installed ({error})"


def unavailable() -> str | None:
    return _missing if _C is None else None


def can_run(x: Tensor) -> str | None:
    if _C is None:
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
        radix = args[-2]
        return _empty_out(x, x.shape[1] // radix)

    @torch.library.register_fake("resnest_fused::split_attention_train")
    def _(x: Tensor, fc1_weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
        batch_stats, radix = args[-3], args[-2]
        batch, features = x.shape[:2]
        channels, inter = features // radix, fc1_weight.shape[0]
        crumbs = x.new_empty(
            0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
        )
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
        empty = x.new_empty(0)
        return (
            _empty_out(x, features) if needed[0] else empty,
            torch.empty_like(fc1_weight, memory_format=torch.contiguous_format)
            if needed[1]
            else fc1_weight.new_empty(0),
            fc1_weight.new_empty(inter if needed[2] else 0),
            torch.empty_like(fc2_weight, memory_format=torch.contiguous_format)
            if needed[3]
            else fc2_weight.new_empty(0),
            fc2_weight.new_empty(features if needed[4] else 0),
            empty.new_empty(0) if bn1_weight is None else bn1_weight.new_empty(inter if needed[5] else 0),
            empty.new_empty(0) if bn1_bias is None else bn1_bias.new_empty(inter if needed[6] else 0),
        )
