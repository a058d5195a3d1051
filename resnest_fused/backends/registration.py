"""Binds the table of ops to a namespace of PyTorch's: kernels, fake kernels, FLOP formulas.

A registration lasts for the whole process: an op cannot be defined twice, and graphs and modules
hold it. But a notebook may reload a module, or a program may import it again after removing it from
``sys.modules``. So each call looks up the current function in its module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnest_fused import ops
from resnest_fused.backends import flops


def latest(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an op's flat arguments; it calls the current version of ``function``."""

    def call(*args: Any, **_: Any) -> Any:
        run = getattr(sys.modules.get(function.__module__), function.__name__, function)
        table = getattr(sys.modules.get(ops.__name__), "TABLE", ops.TABLE)
        return run(*table[function.__name__].unpack(args))

    return call


def bind(namespace: str) -> dict[str, Callable[..., Any]]:
    """Give every op of the namespace its fake kernel and its FLOP formula; the ops by name."""
    found = {name: getattr(getattr(torch.ops, namespace), name).default for name in ops.TABLE}
    for name, op in ops.TABLE.items():
        _register_fake(f"{namespace}::{name}", op.fake)
    for formula in flops.FORMULAS:
        flops.register(getattr(getattr(torch.ops, namespace), formula.__name__), latest(formula))
    return found


def _register_fake(name: str, fake: Callable[..., Any]) -> None:
    run = latest(fake)

    @torch.library.register_fake(name, allow_override=True)
    def checked(first: Tensor, *args: Any) -> Any:
        # One meta tensor suffices for PyTorch to call this, so the others are checked.
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.device != first.device:
                raise RuntimeError(f"expected all tensors on {first.device}, got {tensor.device}")
        return run(first, *args)
