"""The ops as PyTorch sees them: schema, fakes, results, phases, arguments that do not fit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import DIFFERENTIABLE, EPS, LAYOUTS, NORMS, PROLOGUES, Call, Case, draw, draw_any
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused import reference

ops = getattr(torch.ops, cases.NAMESPACES[cases.BACKEND])
Arguments = dict[str, Any]

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [
    Case(3, 6, 4, 5, radix, 2, 6, *dtypes, layout, bias=bias, norm=norm, prologue=prologue)
    for radix, *dtypes, layout, bias, norm, prologue in (
        (2, torch.float32, None, "nchw", True, "batch", "none"),
        (1, torch.float64, None, "channels_last", False, "running", "relu"),
        (3, torch.bfloat16, torch.float32, "channels_last", True, "none", "running"),
        (2, torch.float16, None, "transposed", True, "batch", "batch"),
        (2, torch.float32, None, "channels_last", True, "running", "batch"),
    )
]


# --- the arguments of each op for a call, by name


def _batch_norm(call: Call, name: str, statistics: str) -> Arguments:
    """bn0's or bn1's; mean and var are the running ones or None."""
    running = statistics == "running"
    return {
        f"{name}_weight": call.params.get(f"{name}_weight"),
        f"{name}_bias": call.params.get(f"{name}_bias"),
        f"{name}_mean": call.params[f"{name}_running_mean"] if running else None,
        f"{name}_var": call.params[f"{name}_running_var"] if running else None,
        f"{name}_eps": EPS,
        f"{name}_batch_stats": False,
    }


def _prologue(call: Call) -> Arguments:
    """Statistics are given, even the batch's if the case has batch statistics."""
    statistics = call.case.prologue
    arguments = {"x": call.x, "relu": statistics != "none", "radix": call.case.radix}
    arguments |= _batch_norm(call, "bn0", statistics)
    if statistics == "batch":
        arguments["bn0_mean"], arguments["bn0_var"] = ops.batch_statistics(call.x)
    return arguments


def _whole(call: Call) -> Arguments:
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    return {
        **_prologue(call),
        **{name: call.params.get(name) for name in names},
        **_batch_norm(call, "bn1", call.case.norm),
        "cardinality": call.case.cardinality,
    }


def _train(call: Call) -> Arguments:
    arguments = _whole(call)
    for name, statistics in (("bn0", call.case.prologue), ("bn1", call.case.norm)):
        arguments |= _batch_norm(call, name, statistics)
        arguments[f"{name}_batch_stats"] = statistics == "batch"
    return arguments


def _backward(call: Call) -> Arguments:
    arguments = _train(call)
    results = ops.split_attention_train(**arguments)
    _, gap, hidden, attention, bn0_mean, bn0_var, bn1_mean, bn1_var = results
    if call.case.prologue == "batch":
        arguments |= {"bn0_mean": bn0_mean, "bn0_var": bn0_var}
    if call.case.norm == "batch":
        arguments |= {"bn1_mean": bn1_mean, "bn1_var": bn1_var}
    saved = {"gap": gap, "hidden": hidden, "attention": attention}
    # An absent bn0 has no gradients to ask for.
    needed = [call.case.has_bn0 or not name.startswith("bn0") for name in DIFFERENTIABLE]
    return {"dout": call.dout, **arguments, **saved, "needed": needed}


def _between(call: Call, *names: str) -> Arguments:
    """Random values for what the MLP would give to a phase."""
    case = call.case
    dtype = torch.promote_types(case.dtype, torch.float32)
    features = case.radix * case.channels
    random = {
        "attention": torch.rand(case.batch, case.radix, case.channels, dtype=dtype),
        "dgap": torch.randn(case.batch, case.channels, dtype=dtype),
        "mean_dz": torch.randn(features, dtype=dtype),
        "mean_dz_xhat": torch.randn(features, dtype=dtype),
    }
    return {name: random[name] for name in names}


def _recombine_backward(call: Call) -> Arguments:
    arguments = {"dout": call.dout, **_prologue(call), **_between(call, "attention", "dgap")}
    if call.case.prologue == "batch":
        return arguments | _between(call, "mean_dz", "mean_dz_xhat")
    return arguments | {"mean_dz": None, "mean_dz_xhat": None}


def _pool_backward(call: Call) -> Arguments:
    return {"dout": call.dout, **_prologue(call)}


def _prologue_backward(call: Call) -> Arguments:
    _, sums = ops.pool_backward(**_pool_backward(call))
    pixels = call.case.height * call.case.width
    return {"sums": sums, **_between(call, "attention", "dgap"), "pixels": pixels}


def _running(call: Call) -> Arguments:
    """bn0's statistics are cumulative. A norm without batch statistics has none to update."""
    case = call.case
    arguments: Arguments = {"x": call.x}
    for name, statistics, features in (
        ("bn0", case.prologue, case.radix * case.channels),
        ("bn1", case.norm, case.inter),
    ):
        updated = statistics == "batch"
        dtype = torch.promote_types(case.dtype, torch.float32)
        arguments |= {
            f"{name}_running_mean": torch.randn(features) if updated else None,
            f"{name}_running_var": torch.rand(features) if updated else None,
            f"{name}_num_batches_tracked": torch.tensor(4) if updated else None,
            f"{name}_mean": torch.randn(features, dtype=dtype) if updated else None,
            f"{name}_var": torch.rand(features, dtype=dtype) if updated else None,
            f"{name}_momentum": None if name == "bn0" else 0.25,
        }
    return arguments


ARGUMENTS: dict[str, Callable[[Call], Arguments]] = {
    "split_attention": _whole,
    "split_attention_train": _train,
    "split_attention_backward": _backward,
    "batch_statistics": lambda call: {"x": call.x},
    "pool": _prologue,
    "recombine": lambda call: {**_prologue(call), **_between(call, "attention")},
    "pool_backward": _pool_backward,
    "prologue_backward": _prologue_backward,
    "recombine_backward": _recombine_backward,
    "update_running_statistics": _running,
}


def _op(name: str) -> Any:
    return getattr(ops, name).default


# --- what PyTorch asks of an op


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name: str, case: Case) -> None:
    if name == "prologue_backward" and not case.has_bn0:
        case = CASES[-1]
    torch.library.opcheck(_op(name), (), ARGUMENTS[name](draw(case)), test_utils=CHECKS)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("every_other", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_backward_of_some(case: Case, every_other: int) -> None:
    arguments = _backward(draw(case))
    arguments["needed"][every_other::2] = [False] * (5 - every_other)
    torch.library.opcheck(_op("split_attention_backward"), (), arguments, test_utils=CHECKS)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed", "batch_last"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_fake_kernels_know_the_strides(name: str, layout: str) -> None:
    call = draw_any(Case(3, 6, 4, 5, layout=layout, norm="batch", prologue="batch"))
    arguments = ARGUMENTS[name](call)
    on_meta = {n: a.to("meta") if isinstance(a, Tensor) else a for n, a in arguments.items()}
    results, expected = _op(name)(**on_meta), _op(name)(**arguments)
    if results is None or isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    for result, real in zip(results, expected, strict=True):
        if real is None:
            assert result is None
            continue
        assert result.shape == real.shape
        assert result.stride() == real.stride()
        assert result.dtype == real.dtype


# --- what the ops hand on


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_what_is_saved(prologue: str, norm: str) -> None:
    """What the training forward hands to the backward."""
    call = draw(Case(3, 6, 2, 2, 2, 3, 9, torch.bfloat16, norm=norm, prologue=prologue))
    out, gap, hidden, attention, *statistics = ops.split_attention_train(**_train(call))
    assert out.dtype == torch.bfloat16
    for saved in (gap, hidden, attention, *statistics):
        assert saved.dtype == torch.float32
    splits = _activated(call).reshape(3, 2, 6, 4)
    torch.testing.assert_close(gap, splits.sum(dim=1).mean(dim=-1))
    assert torch.equal(gap, ops.pool(**ARGUMENTS["pool"](call)))
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(3, 6))
    torch.testing.assert_close(
        out, (attention[..., None] * splits).sum(dim=1).reshape(3, 6, 2, 2).bfloat16()
    )
    assert hidden.shape == (3, 9)
    for of, values, mean, var in (
        (prologue, call.x.float().transpose(0, 1).flatten(1), *statistics[:2]),
        (norm, hidden.T, *statistics[2:]),
    ):
        if of == "batch":
            torch.testing.assert_close(mean, values.mean(dim=1))
            torch.testing.assert_close(var, values.var(dim=1, correction=0))
        else:
            assert mean.numel() == var.numel() == 0


def _activated(call: Call) -> Tensor:
    """z in float32 or float64."""
    wide = call.to(torch.promote_types(call.case.dtype, torch.float32))
    bn0 = None
    if call.case.has_bn0:
        names = ("bn0_weight", "bn0_bias", "bn0_running_mean", "bn0_running_var")
        of_batch = call.case.prologue == "batch"
        bn0 = rf.BatchNormArgs(*map(wide.params.get, names), eps=EPS, batch_stats=of_batch)
    return reference.prologue(wide.x, bn0, call.case.prologue == "relu", training=False)


@pytest.mark.parametrize("index", range(9))
@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_gradients_that_are_not_needed_have_no_elements(statistics: str, index: int) -> None:
    call = draw(Case(3, 6, 4, 5, 2, 2, 6, norm=statistics, prologue=statistics))
    arguments = _backward(call)
    everything = ops.split_attention_backward(**arguments)
    only = ops.split_attention_backward(**arguments | {"needed": [i == index for i in range(9)]})
    for i, (grad, expected) in enumerate(zip(only, everything, strict=True)):
        assert expected.shape == call.tensor(DIFFERENTIABLE[i]).shape
        if i == index:
            assert torch.equal(grad, expected)
        else:
            assert grad.numel() == 0


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("radix", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_phases_make_up_the_whole(prologue: str, norm: str, radix: int, layout: str) -> None:
    """The MLP between them runs in PyTorch, forward and backward."""
    options = {"layout": layout, "norm": norm, "prologue": prologue}
    call = draw(Case(3, 6, 4, 5, radix, 2, 8, torch.float64, **options))
    p = {name: tensor.clone().requires_grad_() for name, tensor in call.params.items()}
    of_prologue = _prologue(call)

    gap = ops.pool(**of_prologue).requires_grad_()
    hidden = F.conv2d(gap[..., None, None], p["fc1_weight"], p["fc1_bias"], groups=2)
    if norm != "none":
        names = ("bn1_running_mean", "bn1_running_var", "bn1_weight", "bn1_bias")
        running_mean, running_var, weight, bias = (p[name] for name in names)
        running = running_mean.detach(), running_var.detach()
        hidden = F.batch_norm(hidden, *running, weight, bias, norm == "batch", eps=EPS)
    logits = F.conv2d(hidden.relu(), p["fc2_weight"], p["fc2_bias"], groups=2)
    attention = reference.r_softmax(logits, radix, cardinality=2)[..., 0, 0]
    between = {"attention": attention.detach().contiguous()}
    results = {"out": ops.recombine(**of_prologue, **between)}

    dattention, sums = ops.pool_backward(call.dout, **of_prologue)
    of_mlp = [name for name in call.differentiable() if not name.startswith(("x", "bn0"))]
    leaves = [gap, *(p[name] for name in of_mlp)]
    between["dgap"], *grads = torch.autograd.grad(attention, leaves, dattention)
    results |= dict(zip(of_mlp, grads, strict=True))
    of_batch = {"mean_dz": None, "mean_dz_xhat": None}
    if call.case.has_bn0:
        dweight, dbias = ops.prologue_backward(sums, **between, pixels=4 * 5)
        results |= {"bn0_weight": dweight, "bn0_bias": dbias}
        if prologue == "batch":
            count = 3 * 4 * 5
            of_batch = {"mean_dz": dbias / count, "mean_dz_xhat": dweight / count}
    else:
        assert sums.shape == ((0,) if prologue == "none" else (3, 4, radix, 6))
    results["x"] = ops.recombine_backward(call.dout, **of_prologue, **between, **of_batch)

    out, grads = call.gradients()
    assert set(results) == {"out", *grads}
    for name, expected in {"out": out, **grads}.items():
        torch.testing.assert_close(results[name], expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_of_the_pool_s_backward(dtype: torch.dtype, layout: str) -> None:
    """S1 to S4 by their definitions."""
    call = draw(Case(3, 6, 4, 5, 2, dtype=dtype, layout=layout, prologue="running"))
    dattention, sums = ops.pool_backward(**_pool_backward(call))
    wide = call.to(torch.float64)
    mean, var = wide.params["bn0_running_mean"], wide.params["bn0_running_var"]
    xhat = (wide.x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    z = _activated(wide).reshape(3, 2, 6, 20)
    xhat, g, m = xhat.reshape(z.shape), wide.dout.reshape(3, 1, 6, 20), (z > 0).double()
    expected = torch.stack([(part * m).sum(dim=-1) for part in (g, m, g * xhat, xhat)], dim=1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for result, truth in ((sums, expected), (dattention, (g * z).sum(dim=-1))):
        torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


def test_phases_of_an_empty_batch() -> None:
    call = draw_any(Case(0, 6, 4, 5, prologue="running"))
    assert ops.pool(**ARGUMENTS["pool"](call)).shape == (0, 6)
    assert ops.recombine(**ARGUMENTS["recombine"](call)).shape == (0, 6, 4, 5)
    assert ops.recombine_backward(**_recombine_backward(call)).shape == (0, 12, 4, 5)
    for grad in ops.prologue_backward(**_prologue_backward(call)):
        assert torch.equal(grad, torch.zeros(12))
    for statistic in ops.batch_statistics(call.x):  # zeros change no sum over processes
        assert torch.equal(statistic, torch.zeros(12))


# --- running statistics


def _norms(momenta: tuple[float | None, ...], *features: int) -> list[nn.BatchNorm2d]:
    """Batch normalisations that have seen a few batches."""
    norms = []
    for momentum, count in zip(momenta, features, strict=True):
        bn = nn.BatchNorm2d(count, momentum=momentum)
        bn.running_mean, bn.running_var = torch.randn(count), torch.rand(count) + 0.5
        bn.num_batches_tracked += 3
        norms.append(bn)
    return norms


def check_running_statistics(
    update: Callable[..., None], dtype: torch.dtype, stored: torch.dtype, batch: int
) -> None:
    """Against torch's own batch normalisation in float64, for several batches."""
    momenta = (0.3, None)
    for swapped in (False, True):
        ours = _norms(momenta[::-1] if swapped else momenta, 1100, 7)
        theirs = [copy.deepcopy(bn).double() for bn in ours]
        for bn, truth in zip(ours, theirs, strict=True):
            bn.running_mean, bn.running_var = (
                bn.running_mean.to(stored),
                bn.running_var.to(stored),
            )
            truth.running_mean.copy_(bn.running_mean)
            truth.running_var.copy_(bn.running_var)
        wide = torch.promote_types(dtype, torch.float32)
        for _ in range(3):
            x = torch.empty(batch, 1100, 2, 3, dtype=dtype)
            arguments: list[Any] = [x]
            for bn, truth, pixels in zip(ours, theirs, ((2, 3), (1, 1)), strict=True):
                values = torch.randn(batch, bn.num_features, *pixels).double()
                mean = var = torch.full((bn.num_features,), torch.nan)
                if batch:
                    truth(values)
                    var, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
                else:
                    truth.num_batches_tracked += 1
                arguments += [bn.running_mean, bn.running_var, bn.num_batches_tracked]
                arguments += [mean.to(wide), var.to(wide), bn.momentum]
            update(*arguments)
        for bn, truth in zip(ours, theirs, strict=True):
            assert torch.equal(bn.num_batches_tracked, truth.num_batches_tracked)
            eps = max(torch.finfo(stored).eps, torch.finfo(wide).eps)
            for name in ("running_mean", "running_var"):
                result, expected = getattr(bn, name).double(), getattr(truth, name)
                torch.testing.assert_close(result, expected, rtol=8 * eps, atol=8 * eps)


RUNNING = pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)


@pytest.mark.parametrize("batch", [5, 0])
@RUNNING
def test_running_statistics(dtype: torch.dtype, stored: torch.dtype, batch: int) -> None:
    check_running_statistics(ops.update_running_statistics, dtype, stored, batch)


def check_running_statistics_of_one_norm(update: Callable[..., None]) -> None:
    """As bn0 and as bn1: the second update starts from the first."""
    (_, one), (_, other) = _norms((0.5, None), 300, 300), _norms((0.5, None), 300, 300)
    other.load_state_dict(one.state_dict())
    statistics = [(torch.randn(300), torch.rand(300)) for _ in range(2)]
    of_bn0, of_bn1 = ((*_state(one), *pair, None) for pair in statistics)
    update(torch.empty(5, 300, 1, 1), *of_bn0, *of_bn1)
    for mean, var in statistics:
        bn = rf.BatchNormArgs(
            running_mean=other.running_mean,
            running_var=other.running_var,
            momentum=None,
            num_batches_tracked=other.num_batches_tracked,
        )
        reference.update_running_statistics(bn, mean, var, 5)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_running_statistics_of_one_norm_used_twice() -> None:
    check_running_statistics_of_one_norm(ops.update_running_statistics)


def test_running_statistics_that_do_not_fit_change_nothing() -> None:
    norms = _norms((0.5, None), 8, 8)
    before = copy.deepcopy([bn.state_dict() for bn in norms])
    good: list[list[Any]] = [
        [*_state(bn), torch.randn(8), torch.rand(8), bn.momentum] for bn in norms
    ]
    x = torch.empty(5, 8, 1, 1)
    for place, wrong in (
        (0, torch.randn(7)),
        (0, torch.randn(8, 2)[:, 0]),
        (1, None),
        (1, torch.rand(8).double()),
        (2, None),
        (2, torch.tensor([1, 2])),
        (3, torch.randn(8).double()),
        (4, torch.rand(1)),
    ):
        bad = [*good[1][:place], wrong, *good[1][place + 1 :]]
        with pytest.raises((ValueError, TypeError, RuntimeError), match="bn1"):
            ops.update_running_statistics(x, *good[0], *bad)
    with pytest.raises((ValueError, RuntimeError), match="bn0: expected more than 1 value"):
        ops.update_running_statistics(x[:1], *good[0], *good[1])
    for bn, state in zip(norms, before, strict=True):
        for name, value in bn.state_dict().items():
            assert torch.equal(value, state[name]), name


def _state(bn: nn.BatchNorm2d) -> tuple[Any, ...]:
    return bn.running_mean, bn.running_var, bn.num_batches_tracked


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_statistics_of_a_large_mean(dtype: torch.dtype, layout: str) -> None:
    """They are as precise as the data allow; E[x^2] - E[x]^2 would have no correct digit."""
    x = draw_any(Case(5, 12, 9, 7, dtype=dtype, layout=layout)).x + 1000 * torch.randn(24, 1, 1)
    x = LAYOUTS[layout](x.to(dtype))
    mean, var = ops.batch_statistics(x)
    values = x.double().transpose(0, 1).flatten(1)
    true_mean, true_var = values.mean(dim=1), values.var(dim=1, correction=0)
    std = true_var.sqrt()
    ulp = torch.finfo(torch.float32).eps * (true_mean.abs() + std)
    assert ((mean - true_mean).abs() <= 2 * ulp).all()
    assert ((var - true_var).abs() <= 4 * ulp * std).all()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_batch_statistics_of_a_pixel_unlike_the_others(layout: str) -> None:
    """Padding makes such corners. No sum may start from it and then cancel."""
    x = 3 + 0.01 * torch.randn(2, 8, 56, 56)
    x[:, :, 0, 0] = 0
    mean, var = ops.batch_statistics(LAYOUTS[layout](x))
    true_var, true_mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_dx_of_a_mean_far_from_zero(mean: float, layout: str) -> None:
    """Subtracting the batch statistics' share loses no digits to cancellation."""
    call = draw_any(Case(4, 8, 14, 14, layout=layout, prologue="running"))
    x = LAYOUTS[layout](call.x + mean)
    center, var = ops.batch_statistics(x)
    weight, bias = torch.ones_like(var), torch.full_like(var, 3.0)
    between = _between(call, "attention", "dgap", "mean_dz", "mean_dz_xhat")
    bn0 = (weight, bias, center, var, EPS)
    dx = ops.recombine_backward(call.dout, x, True, 2, *bn0, False, **between)

    of = {name: tensor.double() for name, tensor in between.items()}
    scale = (var.double() + EPS).rsqrt()[:, None, None]
    xhat = (x.double() - center.double()[:, None, None]) * scale
    dz = of["attention"].reshape(4, 16, 1, 1) * call.dout.double().repeat(1, 2, 1, 1)
    dz = dz + of["dgap"].repeat(1, 2)[..., None, None] / 14**2
    lost = of["mean_dz"][:, None, None] + xhat * of["mean_dz_xhat"][:, None, None]
    truth = scale * (torch.where(xhat + 3 > 0, dz, 0) - lost)
    far_from_the_edge = (xhat + 3).abs() > 0.01
    assert ((dx - truth).abs() * far_from_the_edge).max() <= 5e-6


# --- the C++ checks: memory safety does not depend on the Python ones

BN0 = ("bn0_weight", "bn0_bias", "bn0_mean", "bn0_var")
BN1 = ("bn1_weight", "bn1_bias", "bn1_mean", "bn1_var")
WHOLE = ("x", *BN0, "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", *BN1)
TENSORS = {
    "split_attention": WHOLE,
    "split_attention_train": WHOLE,
    "split_attention_backward": (
        *("dout", *WHOLE),
        *("gap", "hidden", "attention"),
    ),
    "batch_statistics": ("x",),
    "pool": ("x", *BN0),
    "recombine": ("x", *BN0, "attention"),
    "pool_backward": ("dout", "x", *BN0),
    "prologue_backward": ("sums", "attention", "dgap"),
    "recombine_backward": (
        *("dout", "x", *BN0, "attention", "dgap"),
        *("mean_dz", "mean_dz_xhat"),
    ),
}
SPOILED = {
    "one element less": lambda t: t.flatten()[1:].clone(),
    "another number of dimensions": lambda t: t[None],
    "wrong first size": lambda t: torch.cat((t, t)),
    "integer": lambda t: t.long(),
}


def _arguments(name: str) -> Arguments:
    return _arguments_of(name, ops)


@functools.cache
def _arguments_of(name: str, ops: Any) -> Arguments:
    """Valid arguments with every tensor; training ops get running statistics."""
    backward = name in ("split_attention_backward", "recombine_backward")
    statistics = "batch" if backward else "running"
    call = draw_any(Case(3, 6, 4, 5, 2, 2, 6, norm=statistics, prologue=statistics))
    arguments = ARGUMENTS[name](call)
    _op(name)(**arguments)
    return arguments


def _assert_refused(name: str, arguments: Arguments) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        _op(name)(**arguments)


@pytest.mark.parametrize("name", TENSORS)
def test_every_tensor_is_among_those_tested(name: str) -> None:
    schema = _op(name)._schema
    assert TENSORS[name] == tuple(a.name for a in schema.arguments if "Tensor" in str(a.type))
    assert set(TENSORS[name]) == {n for n, a in _arguments(name).items() if isinstance(a, Tensor)}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize(("name", "tensor"), [(n, t) for n in TENSORS for t in TENSORS[n]])
def test_tensors_that_do_not_fit_are_refused(name: str, tensor: str, spoil: str) -> None:
    more_samples = spoil == "wrong first size" and tensor == "x"
    if more_samples and not {"dout", "attention"} & set(TENSORS[name]):
        spoil = "one element less"  # more samples are no error
    arguments = _arguments(name)
    _assert_refused(name, arguments | {tensor: SPOILED[spoil](arguments[tensor])})


@pytest.mark.parametrize(
    ("radix", "cardinality"), [(0, 1), (-2, 1), (5, 1), (2, 0), (2, -1), (2, 4), (2**62, 2**62)]
)
def test_counts_that_do_not_fit_are_refused(radix: int, cardinality: int) -> None:
    counts = {"radix": radix, "cardinality": cardinality}
    for name in ("split_attention", "split_attention_train", "split_attention_backward"):
        _assert_refused(name, _arguments(name) | counts)
    if radix != 2:
        for name in ("pool", "pool_backward"):
            _assert_refused(name, _arguments(name) | {"radix": radix})


@pytest.mark.parametrize("name", [name for name in TENSORS if "x" in TENSORS[name]])
def test_an_image_without_pixels_is_refused(name: str) -> None:
    arguments = _arguments(name)
    for tensor in arguments.keys() & {"x", "dout"}:
        arguments[tensor] = arguments[tensor][:, :, :0]
    _assert_refused(name, arguments)


@pytest.mark.parametrize("half", ["bn0_mean", "bn0_var", "bn1_mean", "bn1_var", "mean_dz"])
def test_half_of_the_statistics_is_refused(half: str) -> None:
    for name in TENSORS:
        if half in TENSORS[name]:
            _assert_refused(name, _arguments(name) | {half: None})


def test_bn0_without_a_relu_is_refused() -> None:
    for name in TENSORS:
        if "bn0_mean" in TENSORS[name]:
            _assert_refused(name, _arguments(name) | {"relu": False})
