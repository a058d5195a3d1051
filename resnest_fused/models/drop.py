"""Random parts of a network that are left out in training: DropBlock and stochastic depth."""

# No annotations as strings here: pickle wants their objects in a network that torch.fx traced.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_fused.tracing import as_one_node, is_traced


class DropBlock2d(nn.Module):
    """DropBlock (arXiv:1810.12890): in training, square blocks of each channel become zero.

    ::

        gamma = scale * rate / k^2 * H*W / ((H-k+1) * (W-k+1)),   k = min(block_size, H, W)
        keep  = 1 - dilate_k(bernoulli(gamma)),                   independent per sample and channel
        out   = x * keep * (number of elements / sum of keep)

    Blocks lie wholly inside the map. They may overlap, so somewhat less than ``scale * rate`` of
    the elements is dropped. ``(B, C, H, W)`` to the same shape and dtype; in eval mode the input.

    Example::

        drop = DropBlock2d(0.1, block_size=3)

    Args:
        rate: the share that is to be dropped, in [0, 1). :attr:`rate` is a buffer that is not
            saved: a schedule sets it without that a compiled network is compiled anew.
        block_size: the side of a block in pixels.
        scale: a factor of the rate.
    """

    idle_in_eval = True

    rate: Tensor

    def __init__(self, rate: float, block_size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(float(rate)), persistent=False)
        self.block_size = block_size
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        if is_traced(x):
            return as_one_node(self, x)
        if not self.training:
            return x
        height, width = x.shape[-2:]
        size = min(self.block_size, height, width)
        rows, columns = height - size + 1, width - size + 1
        gamma = self.scale * self.rate * (height * width / (size**2 * rows * columns))
        with torch.no_grad():
            corners = torch.rand(*x.shape[:2], rows, columns, device=x.device) < gamma
            # Every block begins at its corner: a maximum over all corners that reach a pixel.
            corners = F.pad(corners.to(x.dtype), [size - 1] * 4)
            keep = 1 - F.max_pool2d(corners, size, stride=1)
            # In float32, as a sum of ones stops growing at 2048 in float16.
            kept = keep.sum(dtype=torch.promote_types(x.dtype, torch.float32))
            keep = keep * (keep.numel() / kept.clamp(min=1)).to(x.dtype)
        return x * keep

    def extra_repr(self) -> str:
        return f"rate={float(self.rate):g}, block_size={self.block_size}, scale={self.scale:g}"


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, whole samples of a branch become zero.

    The others are divided by ``1 - rate``. ``(B, ...)`` to the same shape; in eval mode the input.

    Example::

        drop = DropPath(0.1)

    Args:
        rate: the probability with which a sample is dropped, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ...)`` to the same shape."""
        if is_traced(x):
            return as_one_node(self, x)
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        keep = x.new_empty(shape).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
