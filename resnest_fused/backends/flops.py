"""The ops' FLOPs, for ``torch.utils.flop_counter.FlopCounterMode``.

It counts products of matrices and convolutions alone; of split attention these are the two FCs, 1x1
convolutions of gap ``(B, C, 1, 1)``. They count here as PyTorch counts them, so that a fused
network's total is the unfused one's. The ops of single phases have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import (
    conv_backward_flop,
    conv_flop_count,
    flop_registry,
    register_flop_formula,
)

from resnest_fused.backends.registration import latest

Shape = Sequence[int]


def split_attention(x: Shape, *args: Any, **_: Any) -> int:
    fc1_weight, _, fc2_weight = args[6:9]
    return _fc(x[0], fc1_weight) + _fc(x[0], fc2_weight)


def split_attention_train(x: Shape, *args: Any, **_: Any) -> int:
    fc1_weight, _, fc2_weight = args[7:10]
    return _fc(x[0], fc1_weight) + _fc(x[0], fc2_weight)


def split_attention_backward(dout: Shape, x: Shape, *args: Any, **_: Any) -> int:
    fc1_weight, fc2_weight = args[7:9]
    cardinality, needed = args[-2:]
    dx, dbn0_weight, dbn0_bias, dfc1_weight, dfc1_bias, dfc2_weight, _, *dbn1 = needed
    dgap = dx or dbn0_weight or dbn0_bias
    dhidden = dgap or dfc1_weight or dfc1_bias or any(dbn1)
    return _fc_backward(x[0], fc1_weight, cardinality, dgap, dfc1_weight) + _fc_backward(
        x[0], fc2_weight, cardinality, dhidden, dfc2_weight
    )


def _fc(batch: int, weight: Shape) -> int:
    outputs, inputs, *_ = weight
    return conv_flop_count([batch, inputs, 1, 1], list(weight), [batch, outputs, 1, 1])


def _fc_backward(batch: int, weight: Shape, groups: int, dinputs: bool, dweight: bool) -> int:
    outputs, group_inputs, *_ = weight
    inputs = [batch, group_inputs * groups, 1, 1]
    return conv_backward_flop(
        [batch, outputs, 1, 1],
        inputs,
        weight,
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        groups,
        [dinputs, dweight, False],
        out_val=(inputs, weight, None),
    )


OPS = (split_attention, split_attention_train, split_attention_backward)


def register(namespace: str) -> None:
    """Give the namespace's ops their formulas."""
    for formula in OPS:
        op = getattr(getattr(torch.ops, namespace), formula.__name__)
        if op not in flop_registry:
            register_flop_formula(op)(latest(formula))
