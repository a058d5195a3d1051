"""Times the contenders of one case in turns, so that whatever disturbs the machine disturbs all of them.

Clock rates and memory bandwidth drift by more than the differences of interest. A ratio of two numbers
taken a minute apart measures that drift; here every round times every contender once.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from grid import CONTENDERS, DTYPES, LAYOUTS, Case
from torch import Tensor, nn

import resnest_fused as rf

# A timed burst is one call, or as many short ones as fill this, far above the clock's own cost.
BURST_S = 1e-3
# Largest relative difference, in the 2-norm, that rounding explains in every case of the grid.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}

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
        AssertionError: a contender's results are not eager's.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.set_grad_enabled(case.train):
        steps = _contenders(case, backend, compiler)
        calls = {}
        for name, step in steps.items():
            duration = _burst(step, 1)
            calls[name] = max(1, round(BURST_S / duration))
        samples: dict[str, list[float]] = {name: [] for name in steps}
        end = time.perf_counter() + seconds
        while len(samples["eager"]) < min_rounds or time.perf_counter() < end:
            for name, step in steps.items():
                step()  # untimed: caches and allocator are again as this contender leaves them
                samples[name].append(_burst(step, calls[name]))
    return samples


def _burst(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _contenders(case: Case, backend: str, compiler: str | None) -> dict[str, Step]:
    dtype, layout = DTYPES[case.dtype], LAYOUTS[case.layout]

    def random(channels: int) -> Tensor:
        shape = (case.batch, channels, case.side, case.side)
        return torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)

    # What comes in is what a ReLU leaves: with means around zero all attention would be near 1/R.
    x = random(case.radix * case.channels).relu_().requires_grad_(case.train)
    dout = random(case.channels)
    state = rf.SplitAttention(case.channels, case.radix).state_dict()

    def step_of(
        make: type[rf.SplitAttention], prepare: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    ) -> Step:
        module = make(case.channels, case.radix)
        module.load_state_dict(state)
        module.to(dtype).train(case.train)
        inputs = [x, *module.parameters()]
        call = prepare(module)

        def evaluate() -> tuple[Tensor, ...]:
            return (call(x),)

        def train() -> tuple[Tensor, ...]:
            out = call(x)
            return (out, *torch.autograd.grad(out, inputs, dout))

        return train if case.train else evaluate

    def use_backend(module: nn.Module) -> nn.Module:
        module.backend = backend
        return module

    steps = {"eager": step_of(rf.SplitAttention, lambda module: module)}
    if compiler is not None:
        steps["compile"] = step_of(
            rf.SplitAttention, lambda module: torch.compile(module, backend=compiler)
        )
    steps["fused"] = step_of(rf.FusedSplitAttention, use_backend)
    expected = steps["eager"]()
    for name in steps:
        _check_agreement(f"{case}: {name}", steps[name](), expected, TOLERANCE[case.dtype])
    steps["copy"] = _copy(case)
    return {name: steps[name] for name in CONTENDERS if name in steps}


def _copy(case: Case) -> Step:
    """The floor: reads half of the floor's units and writes as many."""
    source = torch.ones(case.floor_units * case.unit // 2, dtype=DTYPES[case.dtype])
    target = torch.ones_like(source)
    return lambda: (target.copy_(source),)


def _check_agreement(
    name: str, results: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float
) -> None:
    for what, got, want in zip(
        ("output", "gradient of x", "gradients of the parameters"),
        _by_kind(results),
        _by_kind(expected),
        strict=False,
    ):
        error = float((got - want).norm() / want.norm())
        assert error <= tolerance, f"{name}: the {what} differs from eager's by {error:.1e}"


def _by_kind(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Output, x's gradient and all parameters' gradients as one.

    As one, because fc1's bias has the gradient 0 in front of a batch normalisation, of which
    rounding leaves only noise.
    """
    out_and_dx = [result.double() for result in results[:2]]
    rest = [result.double().flatten() for result in results[2:]]
    return [*out_and_dx, torch.cat(rest)] if rest else out_and_dx
