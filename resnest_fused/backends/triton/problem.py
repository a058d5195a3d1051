"""A call's arguments, checked and brought into a form that the Triton kernels walk."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnest_fused.checks import (
    check_dout,
    check_fcs,
    check_map,
    check_norm,
    check_running,
    check_sums,
)
from resnest_fused.ops import (
    FcArguments,
    MapArguments,
    NormArguments,
    RunningArguments,
    empty_sums,
)


class Map(NamedTuple):
    """A feature map in a layout that the kernels walk, and the prologue it goes through."""

    x: Tensor  # (B, R*C, H, W)
    relu: bool
    bn0: NormArguments
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
        return empty_sums(self.x, *shape)

    def with_statistics(self, mean: Tensor, var: Tensor) -> Map:
        """The same map, in which bn0 has these statistics."""
        return self._replace(bn0=self.bn0._replace(mean=mean, var=var))


class Mlp(NamedTuple):
    """The layers between the pool and recombine."""

    fcs: FcArguments
    bn1: NormArguments

    @property
    def group_inter(self) -> int:
        """Inputs of fc2 in each group."""
        return self.fcs.fc2_weight.shape[1]

    @property
    def group_channels(self) -> int:
        """Inputs of fc1 in each group."""
        return self.fcs.fc1_weight.shape[1]


def check(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


def check_no_batch_stats(name: str, bn: NormArguments) -> None:
    check(
        not bn.batch_stats,
        f"{name}_batch_stats: expected False, as this op takes statistics only as mean and var",
    )


def make_phase_map(args: MapArguments, bn0: NormArguments) -> Map:
    """The map of an op that computes no batch statistics itself."""
    check_no_batch_stats("bn0", bn0)
    return make_map(args, bn0)


def make_map(args: MapArguments, bn0: NormArguments) -> Map:
    x = args.x
    check_map(x, args.radix)
    batch, features, height, width = x.shape
    check(args.relu or (bn0.mean is None and not bn0.batch_stats), "relu: expected True behind bn0")
    bn0 = _take_norm("bn0", bn0, batch * height * width, features, x)
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    return Map(_aligned(x), args.relu, bn0, args.radix)


def take_mlp(m: Map, fcs: FcArguments, bn1: NormArguments) -> Mlp:
    check_map(m.x, m.radix, fcs.cardinality)
    check_fcs(m.x, m.radix, fcs)
    fcs = FcArguments._make(_contiguous(field) for field in fcs)
    return Mlp(fcs, _take_norm("bn1", bn1, m.batch, fcs.inter, m.x))


def take_dout(m: Map, dout: Tensor) -> Tensor:
    """dout in x's layout."""
    check_dout(dout, m.channels, m.x)
    memory_format = torch.channels_last if m.nhwc else torch.contiguous_format
    return _aligned(dout.contiguous(memory_format=memory_format))


def take_sums(name: str, sums: Tensor, shape: tuple[int, ...], x: Tensor) -> Tensor:
    check_sums(name, sums, shape, x)
    return sums.contiguous()


def take_running(name: str, args: RunningArguments, elements: int, x: Tensor) -> RunningArguments:
    check_running(name, args, elements, x)
    return args._replace(mean=_contiguous(args.mean), var=_contiguous(args.var))


def _take_norm(
    name: str, norm: NormArguments, elements: int, features: int, x: Tensor
) -> NormArguments:
    tensors = {field: getattr(norm, field) for field in ("weight", "bias", "mean", "var")}
    check_norm(name, tensors, norm.eps, norm.batch_stats, elements, features, x)
    return NormArguments._make(_contiguous(field) for field in norm)


def _contiguous(field: Any) -> Any:
    return field.contiguous() if isinstance(field, Tensor) else field


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, at an address that is a multiple of 16 bytes.

    For other addresses Triton compiles another kernel, whose threads may sum in another order. Then
    a sample's result would depend on its place in the batch.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
