"""Measures how far a fused network agrees with its reference, and time and memory of both."""

from __future__ import annotations

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# Direct differences: 1e-5 in float32 is 84 units of rounding, float64 gets as many.
_UNITS = 1e-5 / torch.finfo(torch.float32).eps


class Check(NamedTuple):
    """One quantity's agreement; an error is max|a - b| / max|b|.

    Attributes:
        quantity: what is compared.
        reference_error: the reference's error against its own run in float64, or None when the
            fused result is compared with the reference's directly.
        error: the fused result's error, against the same as ``reference_error`` or the reference.
        allowed: the largest error that passes.
    """

    quantity: str
    reference_error: float | None
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number no larger than allowed."""
        return self.error <= self.allowed


class TopFive(NamedTuple):
    """The five classes with the largest logits for one input, by both networks.

    Attributes:
        reference: class indices by the reference, best first.
        fused: class indices by the fused network.
        tied: they differ only where the reference's own logits lie within the allowed error.
    """

    reference: list[int]
    fused: list[int]
    tied: bool

    @property
    def passed(self) -> bool:
        """Whether they are the same or differ only between ties."""
        return self.reference == self.fused or self.tied


class Timing(NamedTuple):
    """Seconds of one call: median, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float


def relative_error(result: Tensor, expected: Tensor) -> float:
    """max|result - expected| / max|expected|, taken in float64; NaN when either holds one."""
    if expected.numel() == 0:
        return 0.0
    result, expected = result.double(), expected.double()
    difference = (result - expected).abs().max()
    # Both zero throughout is agreement, not 0/0.
    return 0.0 if difference == 0 else (difference / expected.abs().max()).item()


def check(quantity: str, reference: Tensor, fused: Tensor, exact: Tensor | None) -> Check:
    """Compare a fused result with the reference's in the same dtype.

    With ``exact``, the reference's result in float64, the fused error may be 1.5 times the
    reference's error and one unit of rounding; without, 84 units of rounding.
    """
    eps = torch.finfo(reference.dtype).eps
    if exact is None:
        return Check(quantity, None, relative_error(fused, reference), _UNITS * eps)
    own = relative_error(reference, exact)
    return Check(quantity, own, relative_error(fused, exact), 1.5 * own + eps)


def check_eval(
    reference: nn.Module, fused: nn.Module, x: Tensor
) -> tuple[Check, list[TopFive]]:
    """Agreement of the logits in eval mode; in 16-bit dtypes both are measured against float64.

    Args:
        reference, fused: networks with the same weights, in x's dtype.
        x: a batch of their input.
    """
    exact = None
    with torch.no_grad():
        logits, fused_logits = reference.eval()(x), fused.eval()(x)
        if torch.finfo(x.dtype).bits == 16:
            exact = copy.deepcopy(reference).double()(x.double())
    result = check("logits", logits, fused_logits, exact)
    # Two networks that each are this far from the same logits can swap classes this much apart.
    gap = 2 * (result.allowed + (result.reference_error or 0)) * logits.double().abs().max()
    return result, [_top_five(a, b, gap) for a, b in zip(logits, fused_logits, strict=True)]


def _top_five(logits: Tensor, fused_logits: Tensor, gap: Tensor) -> TopFive:
    count = min(5, len(logits))
    best, fused_best = logits.topk(count).indices, fused_logits.topk(count).indices
    apart = (logits[best].double() - logits[fused_best].double()).abs().max()
    return TopFive(best.tolist(), fused_best.tolist(), bool(apart <= gap))


def check_train(
    reference: nn.Module, fused: nn.Module, names: Iterable[str], x: Tensor, target: Tensor
) -> list[Check]:
    """Agreement of a training step: the loss, and every fused module's results where it stands.

    Rounding alone moves the gradient of a whole network by percents, as normalisation over few
    samples and the edges of ReLU amplify it; so the loss of the whole step is held to half the
    dtype's digits, and modules are compared one by one: each gets the input and the output
    gradient that it meets in the reference's step. Reported are the largest errors over modules,
    against float64 where the dtype is narrower. The networks are left as they were, in training
    mode.

    Args:
        reference, fused: networks with the same weights, in x's dtype.
        names: the fused modules, by their names in the network.
        x, target: a batch of input, and of class indices ``(B,)``.
    """
    loss, met = _record(reference.train(), list(names), x, target)
    fused_loss = step(copy.deepcopy(fused.train()), x, target)
    half = torch.finfo(x.dtype).eps ** 0.5
    checks = [Check("loss", None, relative_error(fused_loss, loss), half)]
    worst: dict[str, list[Check]] = {}
    for name, (entering, dout) in met.items():
        module = reference.get_submodule(name)
        results = _run_module(module, entering, dout)
        fused_results = _run_module(fused.get_submodule(name), entering, dout)
        exact = None
        if x.dtype != torch.float64:
            exact = _run_module(module, entering.double(), dout.double())
        for quantity, result in results.items():
            worst.setdefault(quantity, []).append(
                check(quantity, result, fused_results[quantity], exact and exact[quantity])
            )
    return checks + [_worst(found, x.dtype) for found in worst.values()]


def _record(
    model: nn.Module, names: list[str], x: Tensor, target: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss of a step, and by module the input and the output gradient that it met."""
    model = copy.deepcopy(model)
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def record(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            inputs[name] = args[0].detach().clone()
            out.register_hook(lambda gradient: gradients.__setitem__(name, gradient))

        return record

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    loss = step(model, x, target)
    return loss, {name: (inputs[name], gradients[name]) for name in names}


def _run_module(module: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Forward and backward of a copy of ``module`` in x's dtype."""
    module = copy.deepcopy(module).to(x.dtype)
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(dout)
    assert x.grad is not None
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    running = [b.flatten() for b in module.buffers() if b.is_floating_point()]
    return {
        "module outputs": out.detach(),
        "module input gradients": x.grad,
        # Together, as fc1.bias has none but rounding when a normalisation follows.
        "module parameter gradients": torch.cat(gradients),
        "module running statistics": torch.cat(running),
    }


def _worst(checks: list[Check], dtype: torch.dtype) -> Check:
    """The largest errors of one quantity over modules, and what they allow."""
    # By torch, whose max keeps NaN.
    error = torch.tensor([c.error for c in checks], dtype=torch.float64).max().item()
    if dtype == torch.float64:
        return checks[0]._replace(error=error, allowed=torch.finfo(dtype).eps ** 0.5)
    own = max(c.reference_error or 0 for c in checks)
    return Check(checks[0].quantity, own, error, 1.5 * own + torch.finfo(dtype).eps)


def step(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Forward, cross entropy, backward; returns the loss. Gradients start from none."""
    model.zero_grad(set_to_none=True)
    loss = _loss(model, x, target)
    loss.backward()
    return loss.detach()


def _loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    logits = model(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, advance: Callable[[], None]
) -> dict[str, Timing]:
    """Time ``calls`` in turn, ``repeats`` rounds after one round of warm-up.

    In turn, so that whatever else the machine does meets all of them alike. ``advance`` is called
    after each of the ``(repeats + 1) * len(calls)`` calls.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
            advance()
    return {name: _timing(measured[1:]) for name, measured in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    if len(seconds) == 1:
        return Timing(*seconds * 3)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[-1])


def saved_for_backward(model: nn.Module, x: Tensor, target: Tensor) -> int:
    """Bytes that a training forward keeps for backward, each storage once.

    Parameters, buffers and the input, which live anyway, do not count.
    """
    living = [x, *model.parameters(), *model.buffers()]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in living}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(model, x, target)
    return sum(sizes.values())


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes of CPU tensors that ``call`` has at once at the most, beyond what was there before.

    From the allocator's own record through torch.profiler; scratch memory that a library takes
    past PyTorch's allocator is not in it.
    """
    # Read when the profiler starts for the first time: silences its log on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        record.export_chrome_trace(trace)
        with open(trace, encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    changes = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
