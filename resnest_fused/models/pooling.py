"""The poolings of a ResNeSt: beside the attention, in shortcuts, in front of the classifier."""

# No annotations as strings here: pickle wants their objects in a network that torch.fx traced.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_fused.tracing import as_one_node, is_traced


class _AvgPool2d(torch.autograd.Function):
    """3x3 average pooling with padding 1, which saves its input's shape and not the input.

    It is for contiguous maps only, because the gradient has the input's memory format.
    """

    @staticmethod
    def forward(x: Tensor, stride: int) -> Tensor:
        return F.avg_pool2d(x, 3, stride, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.stride = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        # ATen's backward reads nothing of the input but its shape.
        shaped = dout.new_empty(()).expand(ctx.shape)
        dx = torch.ops.aten.avg_pool2d_backward(
            dout, shaped, [3, 3], [ctx.stride] * 2, [1, 1], False, True, None
        )
        return dx, None


class Avd(nn.Module):
    """The average pooling beside the attention of a strided block, which has the block's stride."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, ceil(H/stride), ceil(W/stride))``."""
        if is_traced(x):
            return as_one_node(self, x)
        if x.is_contiguous():
            return _AvgPool2d.apply(x, self.stride)
        return F.avg_pool2d(x, 3, self.stride, padding=1)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class SameAvgPool2d(nn.Module):
    """2x2 average pooling with stride 1 over a map with a row and a column of zeros added."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)


def _average(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


def _maximum(x: Tensor) -> Tensor:
    return F.adaptive_max_pool2d(x, 1)


def _both(x: Tensor) -> Tensor:
    return (_average(x) + _maximum(x)) / 2


GLOBAL_POOLS = {"avg": _average, "max": _maximum, "avgmax": _both}


class GlobalPool(nn.Module):
    """A map's average, its maximum, or the mean of both: ``(B, C, H, W)`` to ``(B, C)``.

    With the empty name the map stays as it is.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C)``, or the map itself."""
        return GLOBAL_POOLS[self.name](x).flatten(1) if self.name else x

    def extra_repr(self) -> str:
        return repr(self.name)
