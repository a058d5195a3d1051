"""Checks an op's arguments; an error names the argument, the expected and the given value."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from resnest_fused.ops import FcArguments, RunningArguments

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_map(x: Tensor, radix: int, cardinality: int = 1) -> None:
    """Check a feature map (B, R*C, H, W) and the counts that divide its channels.

    Raises:
        TypeError: an argument is of another type, or x of another dtype.
        ValueError: a shape or a count does not fit.
    """
    _check_is_tensor("x", x)
    _check_count("radix", radix)
    _check_count("cardinality", cardinality)
    dtype = x.dtype
    if dtype not in _DTYPES:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {dtype}")
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions (B, R*C, H, W), got shape {tuple(x.shape)}")
    _, features, height, width = x.shape
    if features == 0 or features % radix:
        raise ValueError(f"x: expected channels divisible by radix={radix}, got {features}")
    if height == 0 or width == 0:
        raise ValueError(f"x: expected at least one pixel, got height={height} and width={width}")
    channels = features // radix
    if channels % cardinality:
        raise ValueError(
            f"x: expected channels/radix divisible by cardinality={cardinality}, got "
            f"{features}/{radix}={channels}"
        )


def check_fcs(x: Tensor, radix: int, fcs: FcArguments) -> None:
    """Check the two FCs behind a checked map.

    Raises:
        TypeError, ValueError: as :func:`check_map`.
    """
    fc1_weight, fc2_weight, cardinality = fcs.fc1_weight, fcs.fc2_weight, fcs.cardinality
    features = x.shape[1]
    channels = features // radix
    _check_is_tensor("fc1_weight", fc1_weight)
    if fc1_weight.dim() != 4:
        raise ValueError(
            f"fc1_weight: expected 4 dimensions (I, C/K, 1, 1), got shape {tuple(fc1_weight.shape)}"
        )
    # Weights that fit each other are right, and x is wrong.
    of_weights = fc1_weight.shape[1] * cardinality
    _check_is_tensor("fc2_weight", fc2_weight)
    if channels != of_weights and fc2_weight.shape[:1] == (radix * of_weights,):
        raise ValueError(
            f"x: expected {radix * of_weights} channels, as fc1_weight and fc2_weight have, got "
            f"{features}"
        )
    inter = fc1_weight.shape[0]
    if inter == 0 or inter % cardinality:
        raise ValueError(
            f"fc1_weight: expected rows divisible by cardinality={cardinality}, got {inter}"
        )
    _check_tensor("fc1_weight", fc1_weight, (inter, channels // cardinality, 1, 1), x)
    _check_tensor("fc2_weight", fc2_weight, (features, inter // cardinality, 1, 1), x)
    for name, bias, weight in (
        ("fc1_bias", fcs.fc1_bias, fc1_weight),
        ("fc2_bias", fcs.fc2_bias, fc2_weight),
    ):
        if bias is not None:
            _check_tensor(name, bias, (weight.shape[0],), x, " or None")
            if bias.dtype != weight.dtype:
                raise TypeError(f"{name}: expected its weight's {weight.dtype}, got {bias.dtype}")


def check_norm(
    name: str,
    tensors: Mapping[str, Tensor | None],
    eps: float,
    batch_stats: bool,
    elements: int,
    features: int,
    x: Tensor,
) -> None:
    """Check a batch normalisation.

    Args:
        name: bn0 or bn1.
        tensors: by name; the last two are the statistics.
        eps: added to the variance.
        batch_stats: whether it uses batch statistics.
        elements: the number of elements per feature in the batch.
        features: F, the size of every tensor.
        x: the map of the call.

    Raises:
        TypeError, ValueError: as :func:`check_map`.
    """
    for field, tensor in tensors.items():
        if tensor is not None:
            _check_tensor(f"{name}.{field}", tensor, (features,), x, " or None")
    *_, mean, var = tensors
    if (tensors[mean] is None) != (tensors[var] is None):
        raise ValueError(f"{name}: expected {mean} and {var} both given or both None")
    check_number(f"{name}.eps", eps)
    if not (eps > 0 if batch_stats else eps >= 0):
        least = "more than 0 with batch statistics" if batch_stats else "at least 0"
        raise ValueError(f"{name}.eps: expected {least}, got {eps}")
    if elements == 1 and batch_stats:
        raise ValueError(
            f"{name}: Expected more than 1 value per channel when training, got input size "
            f"[1, {features}, 1, 1]"
        )


def check_running(name: str, args: RunningArguments, elements: int, x: Tensor) -> None:
    """Check running statistics, and the batch's over so many elements that they take in.

    Raises:
        TypeError, ValueError: as :func:`check_map`.
    """
    statistics = {field: getattr(args, field) for field in ("running_mean", "running_var")}
    batch = {field: getattr(args, field) for field in ("mean", "var")}
    given = [tensor for tensor in (*statistics.values(), *batch.values()) if tensor is not None]
    if given and len(given) < 4:
        raise ValueError(f"{name}: expected running_mean, running_var, mean and var, or none")
    for field, tensor in statistics.items():
        if tensor is not None:
            _check_tensor(f"{name}.{field}", tensor, tuple(given[0].shape), x)
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(f"{name}.{field}: expected a contiguous vector")
    for field, tensor in batch.items():
        if tensor is not None:
            check_sums(f"{name}.{field}", tensor, tuple(given[0].shape), x)
    if given and elements == 1:
        raise ValueError(f"{name}: expected more than 1 value per channel")
    check_counter(f"{name}.num_batches_tracked", args.num_batches_tracked, x)
    if given and args.momentum is None and args.num_batches_tracked is None:
        raise ValueError(f"{name}.momentum: expected a number without num_batches_tracked")


def check_counter(name: str, counter: Any, x: Tensor) -> None:
    """Check the number of batches that a norm has seen, a tensor or None.

    Raises:
        TypeError, ValueError: as :func:`check_map`.
    """
    if counter is not None:
        _check_is_tensor(name, counter, " or None")
        if counter.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {tuple(counter.shape)}")
        if counter.dtype == torch.bool:
            raise TypeError(f"{name}: expected a number, got {counter.dtype}")
        if counter.is_meta and not x.is_meta:
            raise ValueError(f"{name}: expected on {x.device} as x is, got {counter.device}")


def check_number(name: str, number: Any) -> None:
    """Check that an argument is a number.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(number, (Real, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {number!r}")


def check_sums(name: str, sums: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Check a tensor of sums that an op of this package made.

    Raises:
        TypeError, ValueError: as :func:`check_map`.
    """
    _check_place(name, sums, shape, x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if sums.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} beside x's {x.dtype}, got {sums.dtype}")


def check_dout(dout: Tensor, channels: int, x: Tensor) -> None:
    """Check the gradient of the output.

    Raises:
        TypeError, ValueError: as :func:`check_map`.
    """
    _check_place("dout", dout, (x.shape[0], channels, *x.shape[2:]), x)
    if dout.dtype != x.dtype:
        raise TypeError(f"dout: expected x's {x.dtype}, got {dout.dtype}")


def _check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, (Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {count!r}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")


def _check_is_tensor(name: str, tensor: Any, or_none: str = "") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor{or_none}, got {type(tensor).__name__}")


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, or_none: str = ""
) -> None:
    _check_is_tensor(name, tensor, or_none)
    _check_place(name, tensor, shape, x)
    if tensor.dtype != x.dtype and tensor.dtype != torch.float32:
        or_float = "" if x.dtype == torch.float32 else " or torch.float32"
        raise TypeError(f"{name}: expected x's {x.dtype}{or_float}, got {tensor.dtype}")


def _check_place(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} as x is, got {tensor.device}")
