"""The ops' FLOPs, for ``torch.utils.flop_counter.FlopCounterMode``.

It counts products of matrices and convolutions alone. Of split attention these are the two FCs, 1x1
convolutions of gap ``(B, C, 1, 1)``, counted here by PyTorch's own formulas: so a fused network's
total is the unfused one's. The ops of single phases have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from resnest_fused.backends.registration import latest

Shape = Sequence[int]
# Stride, padding, dilation, transposed and output padding of the FCs.
_POINTWISE = ([1, 1], [0, 0], [1, 1], False, [0, 0])


def split_attention(x: Shape, *args: Any, **_: Any) -> int:
    fc1_weight, _, fc2_weight = args[6:9]
    return _fcs(x[0], args[-1], fc1_weight, fc2_weight)


def split_attention_train(x: Shape, *args: Any, **_: Any) -> int:
    fc1_weight, _, fc2_weight = args[7:10]
    return _fcs(x[0], args[-1], fc1_weight, fc2_weight)


def split_attention_backward(dout: Shape, x: Shape, *args: Any, **_: Any) -> int:
    fc1_weight, fc2_weight = args[7:9]
    cardinality, needed = args[-2:]
    dx, dbn0_weight, dbn0_bias, dfc1_weight, dfc1_bias, dfc2_weight, _, *dbn1 = needed
    dgap = dx or dbn0_weight or dbn0_bias
    dhidden = dgap or dfc1_weight or dfc1_bias or any(dbn1)
    return sum(
        _fc_backward(x[0], cardinality, weight, dinputs, dweight)
        for weight, dinputs, dweight in (
            (fc1_weight, dgap, dfc1_weight),
            (fc2_weight, dhidden, dfc2_weight),
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
    """The shapes of what an FC takes and gives."""
    outputs, group_inputs, *_ = weight
    return [batch, groups * group_inputs, 1, 1], [batch, outputs, 1, 1]


OPS = (split_attention, split_attention_train, split_attention_backward)


def register(namespace: str) -> None:
    """Give the namespace's ops their formulas, where PyTorch can count at all."""
    try:
        from torch.utils.flop_counter import flop_registry, register_flop_formula
    except Exception:  # it imports Triton, which may be broken
        return
    for formula in OPS:
        op = getattr(getattr(torch.ops, namespace), formula.__name__)
        if op not in flop_registry:
            register_flop_formula(op)(latest(formula))
