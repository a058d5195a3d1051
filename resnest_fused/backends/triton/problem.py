"""Validation of a call, as ``csrc/problem.cpp`` does it for the native kernels.

What memory safety needs is checked here, whoever calls the op; errors for users come from
``functional.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnest_fused.backends.fakes import crumb_dtype, empty_crumb

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """A batch normalisation; absent without statistics unless they are the batch's."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0
    batch_stats: bool = False


class Map(NamedTuple):
    """A feature map in a layout that the kernels walk, and the prologue it goes through."""

    x: Tensor  # (B, R*C, H, W)
    relu: bool
    bn0: Norm
    radix: int

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def features(self) -> int:
        return self.x.shape[1]

    @property
    def channels(self) -> int:
        return self.x.shape[1] // self.radix

    @property
    def pixels(self) -> int:
        return self.x.shape[2] * self.x.shape[3]

    @property
    def nhwc(self) -> bool:
        # A map that is both (one channel, or one pixel) counts as NCHW.
        return not self.x.is_contiguous()

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of sums."""
        return empty_crumb(self.x, *shape)

    def with_statistics(self, mean: Tensor, var: Tensor) -> Map:
        """The same with statistics that bn0 now has."""
        return self._replace(bn0=self.bn0._replace(mean=mean, var=var))


class Fcs(NamedTuple):
    """The layers between the pool and recombine, and the groups that they work in."""

    fc1_weight: Tensor  # (I, C/K, 1, 1)
    fc1_bias: Tensor | None  # (I)
    bn1: Norm
    fc2_weight: Tensor  # (R*C, I/K, 1, 1), rows in the logits' order
    fc2_bias: Tensor | None  # (R*C)
    cardinality: int

    @property
    def inter(self) -> int:
        return self.fc1_weight.shape[0]

    @property
    def group_inter(self) -> int:
        return self.fc2_weight.shape[1]

    @property
    def group_channels(self) -> int:
        return self.fc1_weight.shape[1]


def check(fits: bool, message: str) -> None:
    if not fits:
        raise RuntimeError(message)


def make_map(x: Tensor, relu: bool, bn0: Norm, radix: int) -> Map:
    check(x.dim() == 4, f"x: expected 4 dimensions, got {x.dim()}")
    check(radix >= 1, f"radix: expected at least 1, got {radix}")
    check(x.dtype in DTYPES, "x: expected float32, float64, bfloat16 or float16")
    batch, features, height, width = x.shape
    check(
        features > 0 and features % radix == 0,
        f"x: expected channels divisible by radix, got {features}",
    )
    check(height > 0 and width > 0, "x: expected at least one pixel")
    check(relu or (bn0.mean is None and not bn0.batch_stats), "relu: expected True behind bn0")
    bn0 = _take_norm("bn0", bn0, features, batch * height * width, x)
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return Map(_aligned(x), relu, bn0, radix)


def take_fcs(m: Map, fcs: Fcs) -> Fcs:
    x, groups = m.x, fcs.cardinality
    check(groups >= 1, f"cardinality: expected at least 1, got {groups}")
    check(
        m.channels % groups == 0,
        f"x: expected channels divisible by radix * cardinality, got {m.features}",
    )
    check(fcs.fc1_weight.dim() == 4, "fc1_weight: expected 4 dimensions")
    inter = fcs.fc1_weight.shape[0]
    check(
        inter > 0 and inter % groups == 0,
        f"fc1_weight: expected rows divisible by cardinality, got {inter}",
    )
    for weight, bias in ((fcs.fc1_weight, fcs.fc1_bias), (fcs.fc2_weight, fcs.fc2_bias)):
        check(
            bias is None or bias.dtype == weight.dtype,
            "fc1_bias, fc2_bias: expected their weight's dtype",
        )
    return Fcs(
        _take_parameter("fc1_weight", fcs.fc1_weight, (inter, m.channels // groups, 1, 1), x),
        _take_optional("fc1_bias", fcs.fc1_bias, inter, x),
        _take_norm("bn1", fcs.bn1, inter, m.batch, x),
        _take_parameter("fc2_weight", fcs.fc2_weight, (m.features, inter // groups, 1, 1), x),
        _take_optional("fc2_bias", fcs.fc2_bias, m.features, x),
        groups,
    )


def take_dout(m: Map, dout: Tensor) -> Tensor:
    """dout in x's layout."""
    batch, _, height, width = m.x.shape
    _check_shape("dout", dout, (batch, m.channels, height, width), m.x)
    check(dout.dtype == m.x.dtype, "dout: expected x's dtype")
    memory_format = torch.channels_last if m.nhwc else torch.contiguous_format
    return _aligned(dout.contiguous(memory_format=memory_format))


def take_crumb(name: str, crumb: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    _check_shape(name, crumb, shape, x)
    check(crumb.dtype == crumb_dtype(x), f"{name}: expected float32, float64 beside a float64 x")
    return crumb.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """At an address that is a multiple of 16 bytes, as fresh tensors are.

    For another Triton makes another kernel, whose threads may sum in another order: then a sample's
    result would depend on where in its batch it lies.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _take_norm(name: str, norm: Norm, features: int, elements: int, x: Tensor) -> Norm:
    check(
        (norm.mean is None) == (norm.var is None),
        f"{name}_mean, {name}_var: expected both or neither",
    )
    present = norm.batch_stats or norm.mean is not None
    check(
        not present or norm.eps > 0 or (norm.eps == 0 and not norm.batch_stats),
        f"{name}_eps: expected more than 0 with batch statistics and not less without, got "
        f"{norm.eps}",
    )
    check(
        not norm.batch_stats or elements != 1,
        f"{name}: expected more than 1 value per channel when training",
    )
    weight, bias, mean, var = (
        _take_optional(f"{name}_{field}", getattr(norm, field), features, x)
        for field in ("weight", "bias", "mean", "var")
    )
    return norm._replace(weight=weight, bias=bias, mean=mean, var=var)


def _take_optional(name: str, tensor: Tensor | None, size: int, x: Tensor) -> Tensor | None:
    return None if tensor is None else _take_parameter(name, tensor, (size,), x)


def _take_parameter(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    _check_shape(name, tensor, shape, x)
    check(tensor.dtype in (x.dtype, torch.float32), f"{name}: expected x's dtype or float32")
    return tensor.contiguous()


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    check(
        tuple(tensor.shape) == shape,
        f"{name}: expected shape {shape}, got {tuple(tensor.shape)}",
    )
    check(tensor.device == x.device, f"{name}: expected on x's device")
