"""The three ops as PyTorch sees them: schema, fake kernels, crumbs, arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import NORMS, Call, Case, draw
from torch import Tensor

import resnest_fused as rf  # noqa: F401  (registers the ops)

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [
    Case(3, 6, 4, 5, radix, 2, 6, dtype, param_dtype, layout, bias=bias, norm=norm)
    for radix, dtype, param_dtype, layout, bias, norm in (
        (2, torch.float32, None, "nchw", True, "batch"),
        (1, torch.float64, None, "channels_last", False, "running"),
        (3, torch.bfloat16, torch.float32, "channels_last", True, "none"),
        (2, torch.float16, None, "transposed", True, "batch"),
    )
]


def _parameters(call: Call) -> tuple[Tensor | None, ...]:
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "bn1_weight", "bn1_bias")
    return tuple(call.params.get(name) for name in names)


def _running(call: Call) -> tuple[Tensor | None, Tensor | None]:
    if call.case.norm != "running":
        return None, None
    return call.params["running_mean"], call.params["running_var"]


def _eval_arguments(call: Call) -> tuple[Any, ...]:
    sizes = (call.case.radix, call.case.cardinality)
    return (call.x, *_parameters(call), *_running(call), 1e-5, *sizes)


def _train_arguments(call: Call) -> tuple[Any, ...]:
    *rest, radix, cardinality = _eval_arguments(call)
    return (*rest, call.case.norm == "batch", radix, cardinality)


def _backward_arguments(call: Call, needed: tuple[bool, ...] = (True,) * 7) -> tuple[Any, ...]:
    case, p = call.case, call.params
    _, gap, hidden, attention, mean, var = torch.ops.resnest_fused.split_attention_train(
        *_train_arguments(call)
    )
    statistics = (mean, var) if case.norm == "batch" else _running(call)
    return (
        call.dout,
        call.x,
        p["fc1_weight"],
        p["fc2_weight"],
        p.get("bn1_weight"),
        p.get("bn1_bias"),
        *statistics,
        gap,
        hidden,
        attention,
        1e-5,
        case.norm == "batch",
        case.radix,
        case.cardinality,
        needed,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_forward(case: Case) -> None:
    op = torch.ops.resnest_fused.split_attention.default
    torch.library.opcheck(op, _eval_arguments(draw(case)), test_utils=CHECKS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_train(case: Case) -> None:
    op = torch.ops.resnest_fused.split_attention_train.default
    torch.library.opcheck(op, _train_arguments(draw(case)), test_utils=CHECKS)


@pytest.mark.parametrize(
    "needed", [(True,) * 7, (True, False) * 3 + (True,), (False, True) * 3 + (False,)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_backward(case: Case, needed: tuple[bool, ...]) -> None:
    op = torch.ops.resnest_fused.split_attention_backward.default
    torch.library.opcheck(op, _backward_arguments(draw(case), needed), test_utils=CHECKS)


@pytest.mark.parametrize("norm", NORMS)
def test_crumbs(norm: str) -> None:
    """What the training forward hands to the backward."""
    case = Case(3, 6, 2, 2, 2, 3, 9, torch.bfloat16, norm=norm)
    call = draw(case)
    op = torch.ops.resnest_fused.split_attention_train
    out, gap, hidden, attention, mean, var = op(*_train_arguments(call))
    assert out.dtype == torch.bfloat16
    for crumb in (gap, hidden, attention, mean, var):
        assert crumb.dtype == torch.float32
    splits = call.x.float().reshape(3, 2, 6, 4)
    torch.testing.assert_close(gap, splits.sum(dim=1).mean(dim=-1))
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(3, 6))
    torch.testing.assert_close(
        out, (attention[..., None] * splits).sum(dim=1).reshape(3, 6, 2, 2).bfloat16()
    )
    assert hidden.shape == (3, 9)
    if norm == "batch":
        torch.testing.assert_close(mean, hidden.mean(dim=0))
        torch.testing.assert_close(var, hidden.var(dim=0, correction=0))
    else:
        assert mean.numel() == var.numel() == 0


@pytest.mark.parametrize("index", range(7))
def test_gradients_that_are_not_needed_have_no_elements(index: int) -> None:
    call = draw(Case(3, 6, 4, 5, 2, 2, 6))
    op = torch.ops.resnest_fused.split_attention_backward
    everything = op(*_backward_arguments(call))
    only = op(*_backward_arguments(call, tuple(i == index for i in range(7))))
    for i, (grad, expected) in enumerate(zip(only, everything, strict=True)):
        assert expected.numel() > 0
        if i == index:
            assert torch.equal(grad, expected)
        else:
            assert grad.numel() == 0


def test_fake_kernels_know_the_strides() -> None:
    for layout in ("nchw", "channels_last", "transposed", "batch_last"):
        call = draw(Case(3, 6, 4, 5, layout=layout, norm="running"))
        op = torch.ops.resnest_fused.split_attention
        arguments = _eval_arguments(call)
        on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        assert op(*on_meta).stride() == op(*arguments).stride()


# --- the C++ checks: memory safety does not depend on the Python ones

FORWARD_NAMES = (
    "x",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
    "bn1_weight",
    "bn1_bias",
    "bn1_mean",
    "bn1_var",
)
BACKWARD_NAMES = (
    "dout",
    "x",
    "fc1_weight",
    "fc2_weight",
    "bn1_weight",
    "bn1_bias",
    "mean",
    "var",
    "gap",
    "hidden",
    "attention",
)
SPOILED = {
    "one element less": lambda t: t.flatten()[1:].clone(),
    "another number of dimensions": lambda t: t[None],
    "wrong first size": lambda t: torch.cat((t, t)),
    "integer": lambda t: t.long(),
}


def _assert_refused(op: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError):
        op(*arguments)


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("name", FORWARD_NAMES)
def test_forward_ops_refuse_tensors_that_do_not_fit(name: str, spoil: str) -> None:
    if name == "x" and spoil == "wrong first size":
        spoil = "one element less"  # more samples are no error
    call = draw(Case(3, 6, 4, 5, 2, 2, 6, norm="running"))
    index = FORWARD_NAMES.index(name)
    for op, arguments in (
        (torch.ops.resnest_fused.split_attention, _eval_arguments(call)),
        (torch.ops.resnest_fused.split_attention_train, _train_arguments(call)),
    ):
        op(*arguments)
        bad = SPOILED[spoil](arguments[index])
        _assert_refused(op, (*arguments[:index], bad, *arguments[index + 1 :]))


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("name", BACKWARD_NAMES)
def test_backward_op_refuses_tensors_that_do_not_fit(name: str, spoil: str) -> None:
    call = draw(Case(3, 6, 4, 5, 2, 2, 6, norm="batch"))
    op = torch.ops.resnest_fused.split_attention_backward
    arguments = _backward_arguments(call)
    op(*arguments)
    index = BACKWARD_NAMES.index(name)
    bad = SPOILED[spoil](arguments[index])
    _assert_refused(op, (*arguments[:index], bad, *arguments[index + 1 :]))


@pytest.mark.parametrize(
    ("radix", "cardinality"), [(0, 1), (-2, 1), (5, 1), (2, 0), (2, -1), (2, 4), (2**62, 2**62)]
)
def test_ops_refuse_counts_that_do_not_fit(radix: int, cardinality: int) -> None:
    call = draw(Case(3, 6, 4, 5, 2, 1, 6, norm="batch"))
    ops = torch.ops.resnest_fused
    for op, arguments in (
        (ops.split_attention, _eval_arguments(draw(Case(3, 6, 4, 5, 2, 1, 6, norm="none")))),
        (ops.split_attention_train, _train_arguments(call)),
    ):
        op(*arguments)
        _assert_refused(op, (*arguments[:-2], radix, cardinality))
    *rest, _, _, needed = _backward_arguments(call)
    _assert_refused(ops.split_attention_backward, (*rest, radix, cardinality, needed))


def test_ops_refuse_an_image_without_pixels() -> None:
    call = draw(Case(3, 6, 4, 5, norm="none"))
    arguments = _eval_arguments(call)
    _assert_refused(torch.ops.resnest_fused.split_attention, (call.x[:, :, :0], *arguments[1:]))


def test_half_of_the_statistics_is_refused() -> None:
    call = draw(Case(3, 6, 4, 5, norm="running"))
    arguments = list(_eval_arguments(call))
    arguments[FORWARD_NAMES.index("bn1_var")] = None
    _assert_refused(torch.ops.resnest_fused.split_attention, tuple(arguments))
