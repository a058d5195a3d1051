"""Makes the contenders of one case, compares their results, and times them in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from grid import DTYPES, LAYOUTS, Case
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused.measure.timing import Work, take_turns

# Short calls are timed together for this long, far above the clock's own cost.
BURST_S = 1e-3
# Bounds on relative differences in the 2-norm, which show that the right thing is timed. The tests
# judge precision. The ReLU between the FCs is often so near zero that rounding flips it, which
# changes gradients by up to a tenth.
OUTPUT_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-2}
GRADIENT_TOLERANCE = 0.2

Step = Callable[[], tuple[Tensor, ...]]


def interleave(
    case: Case, backend: str, compiler: str | None, seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one entry a round.

    Args:
        case: the call to measure.
        backend: the one that the fused module is to use.
        compiler: ``torch.compile``'s backend; None leaves ``compile`` out.
        seconds: time to spend on rounds.
        min_rounds: rounds to make even if they take longer.

    Raises:
        AssertionError: the fused module's results are not eager's, or a contender changes its
            input.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.set_grad_enabled(case.train):
        works = {name: Work(step) for name, step in _contenders(case, backend, compiler).items()}
        return take_turns(works, min_rounds, seconds=seconds, burst=BURST_S, settle=True)


def _contenders(case: Case, backend: str, compiler: str | None) -> dict[str, Step]:
    x, dout = random_maps(case)
    given = x.clone()
    eager, fused = make_module(case, fused=False), make_module(case, fused=True)
    fused.load_state_dict(eager.state_dict())
    fused.backend = backend
    check(case, make_step(fused, x, dout)(), exact_step(eager, x, dout)())

    steps = {"eager": make_step(eager, x, dout)}
    if compiler is not None:
        compiled = torch.compile(copy.deepcopy(eager), backend=compiler)
        steps["compile"] = make_step(compiled, x, dout)
    steps["fused"] = make_step(fused, x, dout)
    steps["copy"] = _copy(case)
    for step in steps.values():
        step()  # compiles
    assert torch.equal(x, given), f"{case}: a contender changes its input"
    return steps


def random_maps(case: Case) -> tuple[Tensor, Tensor]:
    """x and the gradient of out."""
    dtype, layout = DTYPES[case.dtype], LAYOUTS[case.layout]
    features = case.radix * case.channels

    def random(channels: int) -> Tensor:
        shape = (case.batch, channels, case.side, case.side)
        return torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)

    # Their strength varies by sample and channel. With the same gap everywhere, bn1 would amplify
    # rounding and the attention would hardly matter.
    x = random(features)
    if case.form == "attention":
        x.relu_()
    else:
        x += torch.randn(features, 1, 1, dtype=dtype)
    x *= 2 * torch.rand(case.batch, features, 1, 1, dtype=dtype)
    return x, random(case.channels)


def make_module(case: Case, fused: bool) -> nn.Module:
    """The case's module, whose input is a ReLU's output or, after conv, a convolution's."""
    module: nn.Module
    if case.form == "attention":
        kind = rf.FusedSplitAttention if fused else rf.SplitAttention
        module = kind(case.channels, case.radix)
    else:
        kind = rf.FusedSplitAttentionConv2d if fused else rf.SplitAttentionConv2d
        module = kind(case.channels, case.channels, 1, radix=case.radix)
        module.conv = nn.Identity()
    return module.to(DTYPES[case.dtype]).train(case.train)


def make_step(module: nn.Module, x: Tensor, dout: Tensor) -> Step:
    """A call of ``module`` and, in train mode, of its backward."""
    if not module.training:
        return lambda: (module(x),)
    x = x.detach().requires_grad_()
    dout = dout.to(x.dtype)
    inputs = [x, *module.parameters()]

    def train() -> tuple[Tensor, ...]:
        out = module(x)
        return (out, *torch.autograd.grad(out, inputs, dout))

    return train


def exact_step(eager: nn.Module, x: Tensor, dout: Tensor) -> Step:
    """The step to compare with: eager in float32."""
    return make_step(copy.deepcopy(eager).float(), x.float(), dout)


def _copy(case: Case) -> Step:
    """The floor: reads half of the floor's units and writes as many."""
    source = torch.ones(case.floor_units * case.elements // 2, dtype=DTYPES[case.dtype])
    target = torch.ones_like(source)
    return lambda: (target.copy_(source),)


@torch.no_grad()
def check(
    case: Case,
    results: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    name: str = "fused",
    slack: float = 1,
) -> None:
    """Compare a contender with eager in float32, because eager is worse in half precision.

    One that rounds as often as eager does has ``slack`` times the tolerance.

    The parameters' gradients count as one vector, because in front of bn1 that of fc1's bias is
    nothing but rounding.
    """
    parts = {"output": (slice(0, 1), OUTPUT_TOLERANCE[case.dtype])}
    if case.train:
        parts["gradient of x"] = (slice(1, 2), GRADIENT_TOLERANCE)
        parts["gradient of the parameters"] = (slice(2, None), GRADIENT_TOLERANCE)
    for what, (part, tolerance) in parts.items():
        got, want = (
            torch.cat([tensor.flatten().double() for tensor in tensors[part]])
            for tensors in (results, expected)
        )
        error = float((got - want).norm() / want.norm())
        assert error <= slack * tolerance, (
            f"{case}: the {name} {what} differs from eager's by {error:.1e}"
        )
