"""Runs every fused module of a model beside its unfused self, on its inputs in the model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_map

from resnest_fused.children import path_of
from resnest_fused.fusing import folding, proof
from resnest_fused.fusing.swap import layout_of, unfused_class
from resnest_fused.fusing.wrapping import core
from resnest_fused.measure import agreement
from resnest_fused.measure.agreement import Call, Check, Form, Incomparable, tensors_of
from resnest_fused.modules import FusedModule


class VerifyEntry(NamedTuple):
    """How one fused module compares with its unfused self.

    Attributes:
        name: the module's name in the model; "" for the model itself.
        kind: the unfused class, as ``package.module.Class``.
        checks: every quantity that was compared, in float64 and in the module's own dtype. A module
            that ran several times has the worst check of each quantity.
        problem: why the module was not compared, or not to the end; None when it was.
        remark: what was not checked although the module was compared, and why; None for nothing.
        disproof: by how much the module differs from its unfused self in the proof that
            :func:`resnest_fused.fuse` makes of unknown classes; None if it does not.
    """

    name: str
    kind: str
    checks: tuple[Check, ...]
    problem: str | None = None
    remark: str | None = None
    disproof: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the module was compared and every quantity is within its bound."""
        return self.problem is None and not self.failed and self.disproof is None

    @property
    def failed(self) -> tuple[Check, ...]:
        """The quantities beyond their bounds."""
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        name = f"{self.name or '(the model itself)'}, {self.kind}"
        if self.problem is not None:
            text = f"not compared: {name}: {self.problem}"
        elif not self.passed:
            text = f"DIFFERS: {name}"
        else:
            nearest = agreement.worst(self.checks)
            text = f"agrees: {name}: {len(self.checks)} quantities, nearest to its bound {nearest}"
        if self.remark is not None:
            text += f"; {self.remark}"
        if self.disproof is not None:
            text += f"\n    on random inputs and parameters: {self.disproof}"
        return "\n".join([text, *(f"    {check}" for check in self.failed)])


@dataclass(frozen=True, repr=False)
class VerifyReport:
    """Every fused module of a model beside its unfused self, in the model's order.

    A report is true when there is a fused module and all of them agree. A module that did not run,
    or could not be compared, does not agree. ``str(report)`` has a line for each module.

    Attributes:
        entries: one for each module.
    """

    entries: tuple[VerifyEntry, ...]

    @property
    def passed(self) -> bool:
        """Whether there is a fused module and all of them agree."""
        return bool(self.entries) and all(entry.passed for entry in self.entries)

    def __bool__(self) -> bool:
        return self.passed

    def _summary(self) -> str:
        agreeing = sum(entry.passed for entry in self.entries)
        return f"{agreeing} of {len(self.entries)} fused modules agree with their unfused selves"

    def __repr__(self) -> str:
        return f"VerifyReport({self._summary()})"

    def __str__(self) -> str:
        if not self.entries:
            return "no fused module found: fuse the model first, with resnest_fused.fuse"
        return "\n".join([self._summary(), *map(str, self.entries)])


def verify(model: nn.Module, /, *inputs: Any, **options: Any) -> VerifyReport:
    """Run every fused module beside its unfused self, on its inputs in one call of the model.

    ::

        rf.fuse(model)
        report = rf.verify(model, images)
        assert report, report

    ``model(*inputs, **options)`` runs once. If gradients are enabled and a tensor requires one, a
    random projection of the outputs is differentiated, whatever they mean. Then each fused module
    runs, forward and backward, on the inputs and output gradients that it had in the model. So does
    its unfused self: the same object with its original class and its original norms. Both have the
    model's parameters, buffers, children, hooks, training modes, autocast and ``requires_grad`` as
    they are now. This finds what :func:`resnest_fused.fuse` cannot see, such as a class that was
    patched later.

    Outputs, gradients of inputs and parameters, and buffers are compared twice. In float64 they are
    compared with each other: the 2-norm of a difference (the largest one, for outputs) may be
    1.5e-8 of the result. In the call's dtypes both are compared with the unfused module in float64.
    There the fused module's error may be the sum of

    - 1.5 times the unfused module's error,
    - one rounding of the narrowest dtype,
    - sqrt(N) roundings of float32, as for a sum of N elements in any order,
    - for gradients, four of N elements: a rounding turns them on or off at the edge of a ReLU.

    What exceeds its bound is drawn again with slightly moved inputs. It differs if it exceeds the
    bound in ten draws, or in float64 in three. Buffers of integers must be equal. A tensor's size
    counts as at least the average over all parameters' gradients, or buffers. Folded layers hold
    rounded weights. So a module with folded layers is compared in its dtype alone, and without the
    folded parameters.

    Nothing stays changed, even if the model raises: parameters, their ``.grad``, buffers,
    attributes of modules, modes, hooks, and the states of PyTorch's random generators. What hooks
    and children do elsewhere happens several times more. Random modules get the same random numbers
    in both runs, and are compared in float64 alone, since other dtypes draw other numbers.

    A compiled model runs eagerly. The module in a ``DataParallel`` or ``DistributedDataParallel``
    runs without its wrapper, on this process's inputs alone. Processes that share a
    ``SyncBatchNorm`` must all call this function, each with its own inputs. On the CPU PyTorch's
    ``SyncBatchNorm`` does not run, so it cannot be compared there. Reentrant checkpoints raise
    PyTorch's RuntimeError, since they allow no such differentiation. With FSDP call this function
    before sharding.

    Args:
        model: any module, with fused modules in it or fused itself.
        inputs, options: the model's arguments.

    Returns:
        The report. A module used in several places has one entry. A module that the call did not
        run has not passed.

    Raises:
        TypeError: ``model`` is not a module.
        Exception: whatever the model raises. What a module raises when it runs alone is reported.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = {
        name: module
        for name, module in model.named_modules()
        if unfused_class(module) is not None or isinstance(module, FusedModule)
    }
    if not found:
        return VerifyReport(())
    inner = model
    while isinstance(inner, DataParallel | DistributedDataParallel):
        inner = inner.module
    tensors = [*model.parameters(), *model.buffers(), *tensors_of((inputs, options))]
    random = agreement.RandomStates(tensors)
    try:
        with _eagerly():
            calls = _record(inner, list(found.values()), inputs, options)
            disproved: proof.Disproved = {}
            entries = [
                _proven(_compare(name, module, calls[module]), module, disproved)
                for name, module in found.items()
            ]
    finally:
        random.restore()
    return VerifyReport(tuple(entries))


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    # Importing Dynamo takes seconds, and nothing is compiled before it is imported.
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _compare(name: str, module: nn.Module, calls: list[Call]) -> VerifyEntry:
    original = unfused_class(module)
    entry = VerifyEntry(name, path_of(original or type(module)), ())
    if original is None:
        return entry._replace(problem="a subclass of a fused class, which has no unfused self")
    if not calls:
        return entry._replace(problem="not run by this call of the model")

    @contextlib.contextmanager
    def unfused() -> Iterator[None]:
        with agreement.preserved(module):
            module.__class__ = original
            folding.unfold(module)
            yield

    folded = folding.count_folded(module) > 0
    forms = Form("unfused", module, unfused), Form("fused", module, contextlib.nullcontext)
    checks: dict[tuple[str, str, torch.dtype], list[Check]] = {}
    remarks: dict[str, None] = {}
    problem = None
    for call in calls:
        try:
            found, remark = agreement.compare(*forms, call, folded)
        except Incomparable as error:
            problem = str(error)
            continue
        for check in found:
            checks.setdefault((check.kind, check.tensor, check.dtype), []).append(check)
        backward = None if call.gradients else "forward only, as no gradient came to it"
        remarks |= dict.fromkeys(text for text in (remark, backward) if text is not None)
    worst = tuple(agreement.worst(several) for several in checks.values())
    return entry._replace(checks=worst, problem=problem, remark="; ".join(remarks) or None)


def _proven(entry: VerifyEntry, module: nn.Module, disproved: proof.Disproved) -> VerifyEntry:
    """The entry after the proof that the fused class computes what the unfused one does."""
    layout = layout_of(module)
    if unfused_class(module) is None or layout is None or entry.problem is not None:
        return entry
    cls: Any = core(type(module))
    try:
        disproof = proof.difference_by_class(
            module, layout, cls, vars(module).get("backend", "auto"), disproved
        )
    except proof.Unproven as error:
        remarks = [*([entry.remark] if entry.remark else []), f"no proof: {error}"]
        return entry._replace(remark="; ".join(remarks))
    return entry._replace(disproof=disproof)


def _record(
    model: nn.Module, modules: list[nn.Module], inputs: Any, options: dict[str, Any]
) -> dict[nn.Module, list[Call]]:
    """The calls of each module, with gradients, in one call of the model."""
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}
    edges: list[tuple[nn.Module, int, list[GradientEdge | None]]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().clone().requires_grad_(value.requires_grad)

        args, kwargs = tree_map(keep, (args, kwargs))
        call = Call(args, kwargs, grad_enabled=torch.is_grad_enabled())
        device = call.tensors[0].device.type if call.tensors else "cpu"
        if torch.is_autocast_enabled(device):
            call = call._replace(autocast=torch.get_autocast_dtype(device))
        calls[module].append(call)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        # Before anything changes the output in place.
        ways = [get_gradient_edge(t) if t.requires_grad else None for t in tensors_of(output)]
        edges.append((module, len(calls[module]) - 1, ways))

    with agreement.preserved(model):
        agreement.stand_in(model, None, lambda _, buffer: buffer.detach().clone())
        handles: list[Any] = []
        try:
            for module in modules:
                handles.append(
                    module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
                )
                handles.append(module.register_forward_hook(leave))
            output = model(*inputs, **options)
        finally:
            # Before the backward pass, in which checkpoints call modules again.
            for handle in handles:
                handle.remove()
        gradients = _differentiate(output, [way for _, _, ways in edges for way in ways if way])
    for module, index, ways in edges:
        met = tuple(next(gradients) if way else None for way in ways)
        if any(gradient is not None for gradient in met):
            calls[module][index] = calls[module][index]._replace(gradients=met)
    return calls


def _differentiate(output: Any, edges: list[GradientEdge]) -> Iterator[Tensor | None]:
    """The gradients of a random projection of the output; None where it does not depend on them."""
    ends = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
    if not ends or not edges:
        return iter([None] * len(edges))
    generator = torch.Generator("cpu").manual_seed(0)
    weights = []
    for end in ends:
        # Weights have either sign, and none is near zero, where a narrow dtype would lose it.
        sizes = torch.rand(end.shape, generator=generator, device="cpu") + 0.5
        signs = torch.rand(end.shape, generator=generator, device="cpu") - 0.5
        weights.append(sizes.copysign(signs).to(end))
    return iter(torch.autograd.grad(ends, edges, weights, allow_unused=True))
