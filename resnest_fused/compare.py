"""Measures how far a fused network agrees with its reference, and time and memory of both."""

from __future__ import annotations

import copy
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnest_fused.agreement import Check, relative_error, worst
from resnest_fused.fusing import VerifyReport, verify

# In float32 1e-5, which is 84 units of rounding; in float64 as many.
_UNITS = 1e-5 / torch.finfo(torch.float32).eps


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


def check(
    kind: str, reference: Tensor, fused: Tensor, exact: Tensor | None, allowed: float
) -> Check:
    """Compare a fused result with the reference's, or with ``exact`` when that is given.

    Against ``exact`` the fused error may be 1.5 times the reference's and one unit of rounding,
    and ``allowed`` where that is more.
    """
    dtype = reference.dtype
    if exact is None:
        return Check(kind, "", dtype, None, relative_error(fused, reference), allowed)
    own = relative_error(reference, exact)
    error = relative_error(fused, exact)
    return Check(kind, "", dtype, own, error, max(1.5 * own + torch.finfo(dtype).eps, allowed))


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


def check_train(reference: nn.Module, fused: nn.Module, x: Tensor, target: Tensor) -> Check:
    """Agreement of the loss of a training step, in half the dtype's digits.

    Of gradients nothing can be said here: rounding alone moves those of a whole network by
    percents, as normalisation over few samples and the edges of ReLU amplify it. They are
    :func:`check_modules`'s. The networks are left as they were, in training mode.

    Args:
        reference, fused: networks with the same weights, in x's dtype.
        x, target: a batch of input, and of class indices ``(B,)``.
    """
    loss = step(copy.deepcopy(reference.train()), x, target)
    fused_loss = step(copy.deepcopy(fused.train()), x, target)
    return check("loss", loss, fused_loss, None, torch.finfo(x.dtype).eps ** 0.5)


def check_modules(fused: nn.Module, x: Tensor) -> tuple[VerifyReport, list[Check]]:
    """:func:`resnest_fused.verify`'s report, and of its checks the worst by kind and dtype."""
    report = verify(fused, x)
    groups: dict[tuple[str, torch.dtype], list[Check]] = {}
    for entry in report.entries:
        for each in entry.checks:
            groups.setdefault((each.kind, each.dtype), []).append(each)
    return report, [worst(group) for group in groups.values()]


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
