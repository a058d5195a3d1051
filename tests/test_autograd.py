"""First and second derivatives, what is saved for them, and which gradients are asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import NORMS, PROLOGUES, Call, Case, draw, draw_any
from torch import Tensor

import resnest_fused as rf

# (prologue, norm)
NORMALISATIONS = [("none", norm) for norm in NORMS] + [
    ("relu", "batch"),
    ("running", "running"),
    ("batch", "none"),
    ("batch", "batch"),
]
FORMS = [
    Case(3, 4, 2, 3, radix, cardinality, 4, torch.float64, norm=norm, prologue=prologue)
    for radix in (1, 2, 3)
    for cardinality in (1, 2)
    for prologue, norm in NORMALISATIONS
] + [
    Case(*sizes, torch.float64, **options, prologue=prologue)
    for prologue in PROLOGUES
    for *sizes, options in (
        (3, 4, 3, 2, 2, 2, 2, {"layout": "channels_last", "norm": "batch"}),
        (2, 4, 3, 2, 2, 1, 2, {"layout": "transposed", "norm": "running"}),
        (3, 2, 1, 1, 2, 1, 3, {"bias": False, "norm": "none"}),
        (3, 2, 2, 2, 2, 1, 3, {"affine": False, "norm": "batch"}),
    )
]


def _as_function(call: Call):
    """The call as a function of its differentiable tensors, and those tensors."""
    names = call.differentiable()

    def function(*tensors: Tensor) -> Tensor:
        return call.forward(**dict(zip(names, tensors, strict=True)))

    return function, [call.tensor(name).detach().requires_grad_() for name in names]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_gradcheck(case: Case) -> None:
    function, inputs = _as_function(draw(case))
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_gradgradcheck(case: Case) -> None:
    function, inputs = _as_function(draw(case))
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("prologue", "norm"), NORMALISATIONS)
def test_double_backward_in_float32(prologue: str, norm: str) -> None:
    """A gradient penalty gives the parameters the gradients that the reference gives them.

    The median of the draws counts, because a variance of three samples may magnify rounding.
    """
    errors = [_error_of_penalty(prologue, norm) for _ in range(9)]
    assert sorted(errors)[4] <= 1e-4, errors


def _error_of_penalty(prologue: str, norm: str) -> float:
    """The largest relative error of the gradients."""
    call = draw(Case(3, 8, 4, 4, 2, 2, 8, norm=norm, prologue=prologue))

    def penalty(backend: str | None) -> tuple[Tensor, ...]:
        leaves = {n: call.tensor(n).clone().requires_grad_() for n in call.differentiable()}
        out = call.forward(backend, **leaves)
        (dx,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
        names = ["x", "fc1_weight", "fc2_weight", "fc2_bias"]
        names += ["bn0_weight", "bn0_bias"] if call.case.has_bn0 else []
        wanted = [leaves[name] for name in names]
        return torch.autograd.grad(dx.square().sum(), wanted)

    pairs = zip(penalty(None), penalty("reference"), strict=True)
    return max(float((ours - expected).norm() / expected.norm()) for ours, expected in pairs)


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_first_gradients_are_the_same_with_and_without_create_graph(prologue: str) -> None:
    call = draw(Case(3, 8, 4, 4, 2, 2, 8, torch.float64, prologue=prologue))
    x = call.x.requires_grad_()
    out = call.forward()
    (plain,) = torch.autograd.grad(out, x, call.dout, retain_graph=True)
    (differentiable,) = torch.autograd.grad(out, x, call.dout, create_graph=True)
    assert not plain.requires_grad
    assert differentiable.requires_grad
    torch.testing.assert_close(differentiable.detach(), plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["running", "batch"])
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_subset_of_gradients(prologue: str, norm: str) -> None:
    """A gradient does not depend on which others are asked for, and no others are computed."""
    call = draw_any(Case(3, 6, 3, 3, 2, 2, 6, norm=norm, prologue=prologue))
    names = call.differentiable()
    _, expected = call.gradients()
    for size in range(1, len(names) + 1):
        for subset in itertools.combinations(names, size):
            leaves = {n: call.tensor(n).detach().clone().requires_grad_(n in subset) for n in names}
            call.forward(**leaves).backward(call.dout)
            for name, leaf in leaves.items():
                if name in subset:
                    assert torch.equal(leaf.grad, expected[name]), (name, subset)
                else:
                    assert leaf.grad is None, (name, subset)


def test_without_a_gradient_to_compute_nothing_is_recorded() -> None:
    call = draw(Case(2, 4, 3, 3))
    assert not call.forward().requires_grad
    call.x.requires_grad_()
    with torch.no_grad():
        assert call.forward().grad_fn is None
    with torch.inference_mode():
        assert call.forward().is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_out_is_the_same_with_and_without_gradients(
    prologue: str, norm: str, dtype: torch.dtype
) -> None:
    for layout in ("nchw", "channels_last"):
        case = Case(3, 8, 5, 5, layout=layout, norm=norm, dtype=dtype, prologue=prologue)
        call = draw_any(case)
        out, _ = call.gradients()
        assert torch.equal(call.forward(), out)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_saved_are_x_and_small_tensors(prologue: str, dtype: torch.dtype, layout: str) -> None:
    case = Case(4, 32, 20, 20, dtype=dtype, layout=layout, prologue=prologue)
    call = draw_any(case)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = call.x.requires_grad_()
    call.params["fc1_weight"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call.forward()
    assert x.data_ptr() in saved
    assert out.data_ptr() not in saved
    parameters = sum(p.nbytes for p in call.params.values())
    # gap, hidden, attention, and the batch's mean and variance for bn1 and bn0, in float32
    small = 4 * (4 * 32 + 4 * 32 + 4 * 2 * 32 + 2 * 32)
    small += 4 * 2 * 64 if prologue == "batch" else 0
    assert sum(saved.values()) <= x.nbytes + parameters + small


def test_backward_twice_over_one_forward() -> None:
    call = draw(Case(3, 8, 4, 4))
    x = call.x.requires_grad_()
    out = call.forward()
    (first,) = torch.autograd.grad(out, x, call.dout, retain_graph=True)
    (second,) = torch.autograd.grad(out, x, call.dout)
    assert torch.equal(first, second)


def test_changing_x_between_forward_and_backward_is_noticed() -> None:
    call = draw(Case(3, 8, 4, 4))
    call.params["fc1_weight"].requires_grad_()
    out = call.forward()
    call.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_checkpointing_gives_the_same_gradients(prologue: str) -> None:
    call = draw_any(Case(3, 8, 4, 4, prologue=prologue))
    _, expected = call.gradients(names=["x"])
    x = call.x.requires_grad_()
    out = torch.utils.checkpoint.checkpoint(lambda x: call.forward(x=x), x, use_reentrant=False)
    (dx,) = torch.autograd.grad(out, x, call.dout)
    assert torch.equal(dx, expected["x"])


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_torch_func_grad(prologue: str) -> None:
    case = Case(3, 8, 4, 4, dtype=torch.float64, norm="running", prologue=prologue)
    call = draw_any(case)
    dx = torch.func.grad(lambda x: (call.forward(x=x) * call.dout).sum())(call.x)
    _, expected = call.gradients(names=["x"])
    torch.testing.assert_close(dx, expected["x"])


def test_parameters_learn() -> None:
    """A few steps of SGD follow the reference's."""
    eager = rf.SplitAttention(8, radix=2, cardinality=2, inter_channels=8).double()
    fused = rf.FusedSplitAttention(8, radix=2, cardinality=2, inter_channels=8).double()
    fused.load_state_dict(eager.state_dict())
    x, target = torch.randn(6, 16, 4, 4).double(), torch.randn(6, 8, 4, 4).double()
    for module in (eager, fused):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            optimizer.step()
    for (name, ours), expected in zip(
        fused.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_of_gradients_counts_every_path_once(training: bool) -> None:
    """A module applied twice: its second input depends on its own parameters."""
    module = rf.FusedSplitAttention(8).double().train(training)
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    loss = module(torch.cat([module(x)] * 2, 1)).square().sum()
    names, parameters = zip(*module.named_parameters(), strict=True)
    plain = torch.autograd.grad(loss, parameters, retain_graph=True)
    graph = torch.autograd.grad(loss, parameters, create_graph=True)
    # In front of bn1 the gradient of fc1's bias is nothing but rounding.
    largest = max(float(grad.abs().max()) for grad in plain)
    for name, ours, expected in zip(names, graph, plain, strict=True):
        assert (ours - expected).abs().max() <= 1e-9 * largest, name
