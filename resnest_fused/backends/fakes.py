"""What the ops give without data: their fake kernels, and empty tensors for their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnest_fused.backends.registration import latest


def empty_map(x: Tensor, channels: int) -> Tensor:
    """An uninitialised map of so many channels, otherwise as x."""
    # channels_last only where it is not also plainly contiguous: as the kernels choose.
    nhwc = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    batch, _, height, width = x.shape
    return torch.empty(
        (batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout
    )


def crumb_dtype(x: Tensor) -> torch.dtype:
    """In which sums are taken and kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_crumb(x: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of sums."""
    return x.new_empty(shape, dtype=crumb_dtype(x))


def split_attention(x: Tensor, *args: Any) -> Tensor:
    radix = args[-2]
    return empty_map(x, x.shape[1] // radix)


def split_attention_train(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    bn0_batch_stats, fc1_weight = args[6:8]
    bn1_batch_stats, radix, _ = args[-3:]
    batch, features = x.shape[:2]
    channels, inter = features // radix, fc1_weight.shape[0]
    of_bn0, of_bn1 = features if bn0_batch_stats else 0, inter if bn1_batch_stats else 0
    return (
        empty_map(x, channels),
        empty_crumb(x, batch, channels),
        empty_crumb(x, batch, inter),
        empty_crumb(x, batch, radix, channels),
        *(empty_crumb(x, size) for size in (of_bn0, of_bn0, of_bn1, of_bn1)),
    )


def split_attention_backward(dout: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    bn0_weight, bn0_bias = args[1:3]
    fc1_weight, fc2_weight, bn1_weight, bn1_bias = args[7:11]
    needed = args[-1]
    inter, features = fc1_weight.shape[0], x.shape[1]

    def gradient(i: int, like: Tensor | None, *shape: int) -> Tensor:
        like = x if like is None else like
        return like.new_empty(shape if needed[i] else (0,))

    return (
        empty_map(x, features) if needed[0] else x.new_empty(0),
        gradient(1, bn0_weight, features),
        gradient(2, bn0_bias, features),
        gradient(3, fc1_weight, *fc1_weight.shape),
        gradient(4, fc1_weight, inter),
        gradient(5, fc2_weight, *fc2_weight.shape),
        gradient(6, fc2_weight, features),
        gradient(7, bn1_weight, inter),
        gradient(8, bn1_bias, inter),
    )


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_crumb(x, x.shape[1]), empty_crumb(x, x.shape[1])


def pool(x: Tensor, *args: Any) -> Tensor:
    radix = args[-1]
    return empty_crumb(x, x.shape[0], x.shape[1] // radix)


def recombine(x: Tensor, *args: Any) -> Tensor:
    attention = args[-1]
    return empty_map(x, attention.shape[2])


def pool_backward(dout: Tensor, x: Tensor, relu: bool, *args: Any) -> tuple[Tensor, Tensor]:
    radix = args[-1]
    splits = (radix, x.shape[1] // radix)
    sums = empty_crumb(x, x.shape[0], 4, *splits) if relu else empty_crumb(x, 0)
    return empty_crumb(x, x.shape[0], *splits), sums


def prologue_backward(sums: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    features = sums.shape[2] * sums.shape[3]
    return sums.new_empty(features), sums.new_empty(features)


def recombine_backward(dout: Tensor, x: Tensor, *_: Any) -> Tensor:
    return empty_map(x, x.shape[1])


OPS = (
    split_attention,
    split_attention_train,
    split_attention_backward,
    batch_statistics,
    pool,
    recombine,
    pool_backward,
    prologue_backward,
    recombine_backward,
)


def register(namespace: str) -> None:
    """Give every op of the namespace its fake kernel, behind the check that all of them need."""
    for fake in OPS:
        _register(f"{namespace}::{fake.__name__}", fake)


def _register(name: str, fake: Callable[..., Any]) -> None:
    run = latest(fake)

    @torch.library.register_fake(name, allow_override=True)
    def checked(first: Tensor, *args: Any) -> Any:
        # Beside a meta tensor PyTorch calls this, whatever the device of the others.
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.device != first.device:
                raise RuntimeError(f"expected all tensors on {first.device}, got {tensor.device}")
        return run(first, *args)
