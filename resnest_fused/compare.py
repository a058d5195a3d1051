"""Measures how far a fused network agrees with its reference, and time and memory of both."""

from __future__ import annotations

import copy
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# In float32 1e-5, which is 84 units of rounding; in float64 as many.
_UNITS = 1e-5 / torch.finfo(torch.float32).eps


class Check(NamedTuple):
    """One quantity's agreement; errors are those of :func:`relative_error`.

    Attributes:
        quantity: what is compared.
        reference_error: the reference's error against its own run in float32, or None when the
            fused result is compared with the reference's directly.
        error: the fused result's error, against that float32 run or against the reference.
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


def relative_error(result: Tensor, expected: Tensor, order: float = math.inf) -> float:
    """|result - expected| / |expected| in the norm of ``order``, in float64; NaN for any NaN.

    The norm is the largest value when ``order`` is infinite, and the root of the squares' sum
    when it is 2.
    """
    if expected.numel() == 0:
        return 0.0
    result, expected = result.double().flatten(), expected.double().flatten()
    difference = torch.linalg.vector_norm(result - expected, order)
    # Both zero throughout is agreement, not 0/0.
    scale = torch.linalg.vector_norm(expected, order)
    return 0.0 if difference == 0 else (difference / scale).item()


def check(
    quantity: str,
    reference: Tensor,
    fused: Tensor,
    exact: Tensor | None,
    allowed: float,
    order: float = math.inf,
) -> Check:
    """Compare a fused result with the reference's, or with ``exact`` when that is given.

    Against ``exact`` the fused error may be 1.5 times the reference's and one unit of rounding,
    and ``allowed`` where that is more.
    """
    if exact is None:
        return Check(quantity, None, relative_error(fused, reference, order), allowed)
    own = relative_error(reference, exact, order)
    error = relative_error(fused, exact, order)
    eps = torch.finfo(reference.dtype).eps
    return Check(quantity, own, error, max(1.5 * own + eps, allowed))


def check_eval(reference: nn.Module, fused: nn.Module, x: Tensor) -> tuple[Check, list[TopFive]]:
    """Agreement of the logits in eval mode; in 16-bit dtypes both are measured against float32.

    Args:
        reference, fused: networks with the same weights, in x's dtype.
        x: a batch of their input.
    """
    exact = None
    with torch.no_grad():
        logits, fused_logits = reference.eval()(x), fused.eval()(x)
        if _is_narrow(x.dtype):
            exact = copy.deepcopy(reference).float()(x.float())
    allowed = 0.0 if _is_narrow(x.dtype) else _UNITS * torch.finfo(x.dtype).eps
    result = check("logits", logits, fused_logits, exact, allowed)
    # Two networks that each are this far from the same logits can swap classes this much apart.
    gap = 2 * (result.allowed + (result.reference_error or 0)) * logits.double().abs().max()
    return result, [_top_five(a, b, gap) for a, b in zip(logits, fused_logits, strict=True)]


def _is_narrow(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).bits == 16


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
    samples and the edges of ReLU amplify it. So modules are compared one by one: each gets the
    input and the output gradient that it meets in the reference's step. Reported are the largest
    errors over modules, in the 2-norm, as a single ReLU that rounding turns on or off changes
    single gradients by as much as they are large. Loss and modules must share half the dtype's
    digits; in 16-bit dtypes modules are measured against float32, and may err by 1.5 times what the
    reference does. The networks are left as they were, in training mode.

    Args:
        reference, fused: networks with the same weights, in x's dtype.
        names: the fused modules, by their names in the network.
        x, target: a batch of input, and of class indices ``(B,)``.
    """
    loss, met = _record(reference.train(), list(names), x, target)
    fused_loss = step(copy.deepcopy(fused.train()), x, target)
    half = torch.finfo(x.dtype).eps ** 0.5
    by_quantity: dict[str, list[Check]] = {}
    for name, (entering, dout) in met.items():
        module = reference.get_submodule(name)
        results = _run_module(module, entering, dout)
        fused_results = _run_module(fused.get_submodule(name), entering, dout)
        exact = None
        if _is_narrow(x.dtype):
            exact = _run_module(module, entering.float(), dout.float())
        for quantity, result in results.items():
            by_quantity.setdefault(quantity, []).append(
                check(
                    quantity,
                    result,
                    fused_results[quantity],
                    exact[quantity] if exact else None,
                    half,
                    order=2,
                )
            )
    return [check("loss", loss, fused_loss, None, half), *map(_worst, by_quantity.values())]


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


def _worst(checks: list[Check]) -> Check:
    """The largest errors of one quantity over modules, with the largest that is allowed."""
    # By torch, whose max keeps NaN.
    _, own, errors, allowed = zip(*checks, strict=True)
    error = torch.tensor(errors, dtype=torch.float64).max().item()
    own_error = None if None in own else max(own)
    return Check(checks[0].quantity, own_error, error, max(allowed))


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
    """Bytes of tensors that eager PyTorch operators make in ``call`` and that live at once at most.

    What lived before does not count, nor the scratch memory that an operator takes and frees.
    """
    with _LiveStorages() as live:
        call()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Follows the storages that operators return, from there to their release."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A storage that first appears as an argument was there before.
        for storage in self._new_storages((args, kwargs)):
            self._know(storage, 0)
        result = func(*args, **kwargs)
        for storage in self._new_storages(result):
            self._know(storage, storage.nbytes())
        self.peak = max(self.peak, self._held)
        return result

    def _new_storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    yield storage

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        self._known.add(storage._cdata)
        self._held += size
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._held -= size
