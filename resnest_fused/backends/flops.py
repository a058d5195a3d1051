"""The ops' FLOPs, for ``torch.utils.flop_counter.FlopCounterMode``.

PyTorch counts only matrix products and convolutions. In split attention these are the two FCs, 1x1
convolutions of gap ``(B, C, 1, 1)``. PyTorch's own formulas count them here, so fused and unfused
networks have the same total. The ops of single phases have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from resnest_fused.importing import when_imported
from resnest_fused.ops import GradientResults

Shape = Sequence[int]
# Stride, padding, dilation, transposed and output padding of the FCs.
_POINTWISE = ([1, 1], [0, 0], [1, 1], False, [0, 0])


def split_attention(map: Any, bn0: Any, fcs: Any, bn1: Any) -> int:
    return _fcs(map.x[0], fcs.cardinality, fcs.fc1_weight, fcs.fc2_weight)


def split_attention_train(map: Any, bn0: Any, fcs: Any, bn1: Any) -> int:
    return split_attention(map, bn0, fcs, bn1)


def split_attention_backward(
    dout: Shape, map: Any, bn0: Any, fcs: Any, bn1: Any, saved: Any, needed: list[bool]
) -> int:
    wanted = dict(zip(GradientResults._fields, needed, strict=True))
    dgap = wanted["dx"] or wanted["dbn0_weight"] or wanted["dbn0_bias"]
    dbn1 = wanted["dbn1_weight"] or wanted["dbn1_bias"]
    dhidden = dgap or wanted["dfc1_weight"] or wanted["dfc1_bias"] or dbn1
    return sum(
        _fc_backward(map.x[0], fcs.cardinality, weight, dinputs, dweight)
        for weight, dinputs, dweight in (
            (fcs.fc1_weight, dgap, wanted["dfc1_weight"]),
            (fcs.fc2_weight, dhidden, wanted["dfc2_weight"]),
        )
    )


def _fcs(batch: int, groups: int, *weights: Shape) -> int:
    count = _formula(torch.ops.aten.convolution)
    total = 0
    for weight in weights:
        inputs, outputs = _maps(batch, groups, weight)
        total += count(inputs, weight, None, *_POINTWISE, groups, out_val=outputs)
    return total


def _fc_backward(batch: int, groups: int, weight: Shape, dinputs: bool, dweight: bool) -> int:
    inputs, outputs = _maps(batch, groups, weight)
    count = _formula(torch.ops.aten.convolution_backward)
    mask, gradients = [dinputs, dweight, False], (inputs, weight, None)
    return count(outputs, inputs, weight, None, *_POINTWISE, groups, mask, out_val=gradients)


def _formula(op: Any) -> Any:
    from torch.utils.flop_counter import flop_registry

    return flop_registry[op]


def _maps(batch: int, groups: int, weight: Shape) -> tuple[list[int], list[int]]:
    """The shapes of an FC's input and output."""
    outputs, group_inputs, *_ = weight
    return [batch, groups * group_inputs, 1, 1], [batch, outputs, 1, 1]


# Each is the formula of the op with its name. It receives shapes instead of tensors.
FORMULAS = (split_attention, split_attention_train, split_attention_backward)


def register(op: Any, formula: Callable[..., int]) -> None:
    """Give an op its formula when PyTorch's counter is imported, which imports Triton, too."""

    def enter(counter: Any) -> None:
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formula)

    when_imported("torch.utils.flop_counter", enter)
