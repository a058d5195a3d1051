"""The reference backend: plain PyTorch formulas, which run wherever PyTorch runs."""

from __future__ import annotations

from torch import Tensor


def unavailable() -> str | None:
    return None


def can_run(x: Tensor) -> str | None:
    return None


def describe() -> str:
    return "plain PyTorch, unfused, any device"
