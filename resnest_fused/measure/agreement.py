"""Runs two forms of a module on the same call, forward and backward, and says how far they agree.

There are two questions, because rounding and mistakes look different.

**Do they compute the same?** Both run in float64, where every result keeps some 16 digits. No
order of summation costs half of these, for normalisation amplifies rounding by 1/sqrt(eps), about
300, at most. So the 2-norm of a difference (for outputs the largest difference) may be
sqrt(u64) = 1.5e-8 of the result, where u is the dtype's spacing at 1. A mistake is far larger: one
wrong element among a million is 1e-3.

**Do they round alike?** Both run in the dtype of the call, and both are measured against the first
form in float64. The second form may err by

    1.5 * the first form's own error  +  u  +  sqrt(N) * u_sum  (+ 2 / sqrt(N) for gradients)

The first form's error holds the problem's condition and all roundings that both make. The last
rounding is allowed u, that of the narrowest dtype that takes part. A sum of N terms errs by about
sqrt(N) roundings in whatever order it is taken. N is the number of elements that came in, and u_sum
is that of float32. In gradients, rounding may turn a ReLU's element on or off, and that element's
error is as large as the element. Where such elements are many, 1.5 times covers them. Where they
are few, up to four among N do.

What exceeds its bound is drawn again with inputs moved a little. It fails if it exceeds in ten
draws. Of two forms that err alike, either errs more in half of all draws, whatever the distribution
of their errors. So luck lasts that long less than once in a thousand times, and a mistake lasts.
In float64 three draws tell. There only inputs that leave nothing but rounding exceed, such as a
batch of equal images, which normalisation takes to the very edge of a ReLU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_DRAWS, _WIDE_DRAWS = 10, 3

# What is compared, in the order of reports.
OUTPUTS = "outputs"
INPUT_GRADIENTS = "input gradients"
PARAMETER_GRADIENTS = "parameter gradients"
BUFFERS = "buffers"
KINDS = (OUTPUTS, INPUT_GRADIENTS, PARAMETER_GRADIENTS, BUFFERS)


class Check(NamedTuple):
    """The agreement of one quantity; errors are those of :func:`relative_error`.

    Example::

        >>> print(Check("outputs", "", torch.float32, 2e-7, 3e-7, 4e-7))
        outputs, in float32 off by 3.0e-07, allowed 4.0e-07

    Attributes:
        kind: what is compared, such as "outputs" or "parameter gradients".
        tensor: the name of the tensor where there are several, else "".
        dtype: what both forms ran in.
        reference_error: the error of the unfused form against its own run in float64. None when
            the fused result is compared with the unfused one directly.
        error: that of the fused form, against the same.
        allowed: the largest error that passes.
    """

    kind: str
    tensor: str
    dtype: torch.dtype
    reference_error: float | None
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number no larger than allowed."""
        return self.error <= self.allowed

    @property
    def excess(self) -> float:
        """The error in units of what is allowed; infinite when it is no number."""
        if self.passed:
            return self.error / self.allowed if self.error else 0.0
        ratio = self.error / self.allowed if self.allowed else math.inf
        return math.inf if math.isnan(ratio) else ratio

    def __str__(self) -> str:
        what = f"{self.kind}: {self.tensor}" if self.tensor else self.kind
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{what}, in {dtype} off by {self.error:.1e}, allowed {self.allowed:.1e}"


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        args, kwargs: its arguments; tensors carry whether they require a gradient.
        gradients: for each tensor of the output the gradient that comes back, or None. Empty when
            nothing is to be differentiated.
        grad_enabled: whether operations are recorded.
        autocast: the dtype of autocast, or None where it is off.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: tuple[Tensor | None, ...] = ()
    grad_enabled: bool = True
    autocast: torch.dtype | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments that hold floating-point numbers."""
        return [t for t in tensors_of((self.args, self.kwargs)) if t.is_floating_point()]

    def moved(self, generator: torch.Generator) -> Call:
        """The call with every number multiplied by one near 1, so that means move, too."""

        def factor(shape: Iterable[int]) -> Tensor:
            return 1 + (torch.rand(tuple(shape), generator=generator, device="cpu") - 0.5) / 8

        def move(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            factor = (
                1 + (torch.rand(value.shape, generator=generator, device="cpu") - 0.5).to(value) / 8
            )
            return (value.detach() * factor).requires_grad_(value.requires_grad)

        args, kwargs, gradients = tree_map(move, (self.args, self.kwargs, self.gradients))
        return self._replace(args=args, kwargs=kwargs, gradients=gradients)


# The results of one run by kind and by name.
Results = dict[str, dict[str, Tensor]]
# By kind, name and dtype.
_Checks = dict[tuple[str, str, torch.dtype], Check]


class Form(NamedTuple):
    """One form of a module.

    Attributes:
        name: "fused" or "unfused", for errors.
        module: the module to call while it has this form.
        take: makes a context manager in which the module has this form.
    """

    name: str
    module: nn.Module
    take: Callable[[], contextlib.AbstractContextManager[Any]]


class Incomparable(Exception):
    """One of the two forms raised."""


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested containers and dataclasses, in order.

    Example::

        a, b = tensors_of({"x": [a], "y": (b, 3)})
    """
    found: list[Tensor] = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = dataclasses.fields(leaf)
            found += tensors_of([getattr(leaf, field.name) for field in fields])
    return found


class RandomStates:
    """The states of the CPU's random generator and of those of the tensors' devices."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        devices = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        self._devices = sorted(devices, key=str)
        self._states = self._read()

    def _read(self) -> list[Tensor]:
        modules = [torch.get_device_module(device) for device in self._devices]
        states = [m.get_rng_state(d) for m, d in zip(modules, self._devices, strict=True)]
        return [torch.get_rng_state(), *states]

    def moved(self) -> bool:
        """Whether a number was drawn since."""
        return any(not torch.equal(a, b) for a, b in zip(self._states, self._read(), strict=True))

    def restore(self) -> None:
        """Put all of them back to where they were."""
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


_TABLES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back every module's class, attributes, parameters, buffers and children at the end."""
    before = [
        (module, type(module), dict(vars(module)), [dict(table) for table in _tables(module)])
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, kind, attributes, entries in before:
            if type(module) is not kind:
                module.__class__ = kind
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            for name, value in attributes.items():
                if now.get(name) is not value:
                    now[name] = value
            for table, entry in zip(_tables(module), entries, strict=True):
                table.clear()
                table.update(entry)


def _tables(module: nn.Module) -> list[dict[str, Any]]:
    # A scripted module's are views of C++ objects, and hold nothing that changes.
    tables = (vars(module).get(name) for name in _TABLES)
    return [table for table in tables if isinstance(table, dict)]


def stand_in(
    model: nn.Module,
    parameter: Callable[[Tensor], Tensor] | None,
    buffer: Callable[[str, Tensor], Tensor],
) -> None:
    """Put other tensors in the place of parameters and buffers; :func:`preserved` undoes it.

    Example::

        with preserved(model):
            stand_in(model, copied, lambda name, tensor: copied(tensor))

    Args:
        model: the module, with its submodules.
        parameter: makes a new tensor from each parameter; None leaves all.
        buffer: makes a new tensor from each buffer's own name and the buffer.
    """
    new: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in vars(module)["_parameters"].items() if parameter else ():
            if tensor is not None and parameter is not None:
                if id(tensor) not in new:
                    new[id(tensor)] = nn.Parameter(parameter(tensor), tensor.requires_grad)
                module._parameters[name] = new[id(tensor)]  # type: ignore[assignment]
        for name, tensor in vars(module)["_buffers"].items():
            if tensor is not None:
                if id(tensor) not in new:
                    new[id(tensor)] = buffer(name, tensor)
                module._buffers[name] = new[id(tensor)]


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of the tensor, in ``dtype`` when that is given and its values are floating.

    Example::

        wide = copied(weight, torch.float64)
    """
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(wanted, copy=True)


def run(
    form: Form, call: Call, dtype: torch.dtype | None = None, all_parameters: bool = False
) -> Results:
    """The results of a form for a call; its module stays as it was.

    Example::

        form = Form("unfused", module, contextlib.nullcontext)
        out = run(form, Call((x,), {}))[OUTPUTS][""]

    Args:
        form, call: what is called, and how.
        dtype: of the run, or None for the dtypes that the call and the module have.
        all_parameters: whether also to differentiate by parameters that require no gradient.

    Raises:
        Incomparable: the form raised an error.
    """
    try:
        with form.take(), preserved(form.module):
            return _run(form.module, call, dtype, all_parameters)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        where = "" if dtype is None else f" in {str(dtype).removeprefix('torch.')}"
        raise Incomparable(
            f"the {form.name} module raised {type(error).__name__}{where}: {reason}"
        ) from error


def _run(module: nn.Module, call: Call, dtype: torch.dtype | None, all_parameters: bool) -> Results:
    stand_in(module, lambda t: copied(t, dtype), lambda _, t: copied(t, dtype))
    parameters = dict(module.named_parameters())
    if all_parameters:
        for parameter in parameters.values():
            parameter.requires_grad_(parameter.is_floating_point())
    leaves: list[Tensor] = []

    def enter(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        leaf = copied(value, dtype).requires_grad_(value.requires_grad)
        if not leaf.requires_grad:
            return leaf
        leaves.append(leaf)
        return leaf.clone()  # no leaf, which nothing may change in place

    device = call.tensors[0].device.type if call.tensors else "cpu"
    autocast = call.autocast if dtype is None else None
    with (
        torch.set_grad_enabled(call.grad_enabled),
        torch.autocast(device, autocast, enabled=autocast is not None),
    ):
        args, kwargs = tree_map(enter, (call.args, call.kwargs))
        outputs = tensors_of(module(*args, **kwargs))
    results: Results = {OUTPUTS: _numbered([out.detach() for out in outputs])}
    if call.gradients:
        wanted = {name: p for name, p in parameters.items() if p.requires_grad}
        sources = [*leaves, *wanted.values()]
        found = _gradients(outputs, sources, call.gradients)
        results[INPUT_GRADIENTS] = _numbered(found[: len(leaves)])
        results[PARAMETER_GRADIENTS] = dict(zip(wanted, found[len(leaves) :], strict=True))
    results[BUFFERS] = {name: buffer.detach() for name, buffer in module.named_buffers()}
    return results


def _gradients(
    outputs: list[Tensor], sources: list[Tensor], gradients: tuple[Tensor | None, ...]
) -> list[Tensor]:
    """The gradients of the sources; zeros where nothing depends on them."""
    # As a number's gradients, since for others autograd imports SymPy, which takes seconds.
    terms = [
        (out * gradient.to(out.dtype)).sum()
        for out, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and out.requires_grad
    ]
    found: Iterable[Tensor | None] = [None] * len(sources)
    if terms and sources:
        found = torch.autograd.grad(terms, sources, allow_unused=True)
    return [
        torch.zeros_like(source) if gradient is None else gradient
        for source, gradient in zip(sources, found, strict=True)
    ]


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(i) if len(tensors) > 1 else "": tensor for i, tensor in enumerate(tensors)}


def relative_error(
    result: Tensor, expected: Tensor, order: float = math.inf, floor: float = 0.0
) -> float:
    """|result - expected| / |expected| in the norm of ``order``, in float64; NaN for any NaN.

    The norm is the largest value when ``order`` is infinite, and the root of the squares' sum
    when it is 2. ``floor`` is the least that is divided by.

    Example::

        >>> relative_error(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0]))
        0.25
    """
    if expected.numel() == 0:
        return 0.0
    result, expected = result.double().flatten(), expected.double().flatten()
    difference = torch.linalg.vector_norm(result - expected, order).item()
    scale = torch.linalg.vector_norm(expected, order).item()
    # Both zero throughout is agreement, not 0/0.
    if difference == 0:
        return 0.0
    scale = max(scale, floor)
    return difference / scale if scale else math.inf


def compare(
    unfused: Form, fused: Form, call: Call, rounded: bool = False
) -> tuple[list[Check], str | None]:
    """Every check of one call, and a remark on what was not checked, or None.

    Every run starts from the present states of the random generators, which are left there. With
    ``rounded`` the fused form has parameters of its own, which are rounded to their dtype. Then
    float64 would show that rounding, so the dtype of the call alone counts.

    Example::

        unfused = Form("unfused", module, lambda: unfused_for_a_while(module))
        fused = Form("fused", module, contextlib.nullcontext)
        checks, remark = compare(unfused, fused, Call((x,), {}))
        print(worst(checks))

    Raises:
        Incomparable: one of the forms raised an error.
    """
    random = RandomStates(call.tensors)
    drew = False

    def results(form: Form, call: Call, dtype: torch.dtype | None = None) -> Results:
        nonlocal drew
        try:
            # Rounding is judged by the size of every parameter's gradient, so the truth has all.
            return run(form, call, dtype, all_parameters=form is unfused and dtype is not None)
        finally:
            drew = drew or random.moved()
            random.restore()

    own = _narrowest(unfused.module, call)
    wide = own == torch.float64 or not rounded

    elements = max(sum(t.numel() for t in call.tensors), 1)

    def draw(call: Call) -> _Checks:
        truth = results(unfused, call, torch.float64)
        checks: _Checks = {}
        if wide:
            checks |= _formula(truth, results(fused, call, torch.float64))
        if own != torch.float64 and not (drew and wide):
            pair = results(unfused, call), results(fused, call)
            checks |= _rounding(truth, *pair, own, elements)
        return checks

    checks = draw(call)
    generator = torch.Generator("cpu").manual_seed(0)
    for draws in range(1, _DRAWS):
        failed = {key: check for key, check in checks.items() if not check.passed}
        directly = any(check.reference_error is None for check in failed.values())
        if not failed or (directly and draws >= _WIDE_DRAWS):
            break
        again = draw(call.moved(generator))
        checks |= {key: min(found, again[key], key=_excess) for key, found in failed.items()}
    remark = None
    if drew and wide and own != torch.float64:
        remark = "it draws random numbers, whose values depend on the dtype: float64 alone"
    return list(checks.values()), remark


def worst(checks: Iterable[Check]) -> Check:
    """The check that is nearest to what is allowed, or farthest beyond.

    Example::

        print(worst(checks))
    """
    return max(checks, key=_excess)


def _excess(check: Check) -> float:
    return check.excess


def _narrowest(module: nn.Module, call: Call) -> torch.dtype:
    dtypes = [t.dtype for t in (*call.tensors, *module.parameters()) if t.is_floating_point()]
    if call.autocast is not None:
        dtypes.append(call.autocast)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _formula(truth: Results, found: Results) -> _Checks:
    """Both in float64."""
    checks: _Checks = {}
    means = _mean_squares(truth)
    for kind, name, expected, result in _pairs(truth, found):
        if expected.is_floating_point():
            same = _both_beyond(expected, result)
            error = _error(means, kind, expected, result, same)
            allowed = torch.finfo(torch.float64).eps ** 0.5
        else:
            equal = expected.shape == result.shape and torch.equal(expected, result)
            error, allowed = 0.0 if equal else math.inf, 0.0
        key = kind, name, torch.float64
        checks[key] = Check(*key, None, error, allowed)
    return checks


def _rounding(
    truth: Results, unfused: Results, found: Results, dtype: torch.dtype, elements: int
) -> _Checks:
    """Both against the truth; ``dtype`` is the call's narrowest, ``elements`` is its N."""
    slack = torch.finfo(dtype).eps + elements**0.5 * torch.finfo(torch.float32).eps
    checks: _Checks = {}
    means = _mean_squares(truth)
    for kind, name, expected, result in _pairs(unfused, found):
        if not expected.is_floating_point():
            continue
        exact, same = truth[kind][name], _both_beyond(expected, result)
        own = _error(means, kind, exact, expected, same)
        error = _error(means, kind, exact, result, same)
        # Where the unfused form alone gives NaN, anything is as good.
        allowed = math.inf if math.isnan(own) else 1.5 * own + slack
        if kind in (INPUT_GRADIENTS, PARAMETER_GRADIENTS):
            allowed += 2 / elements**0.5
        key = kind, name, dtype
        checks[key] = Check(*key, own, error, allowed)
    return checks


def _pairs(expected: Results, found: Results) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """What both have, by kind and name; every output and input gradient must be there."""
    for kind in KINDS:
        for name, tensor in expected.get(kind, {}).items():
            if name in found[kind]:
                yield kind, name, tensor, found[kind][name]
            elif kind in (OUTPUTS, INPUT_GRADIENTS):
                yield kind, name, tensor, tensor.new_empty(0)


def _mean_squares(truth: Results) -> dict[str, float]:
    """The mean square of all elements, for the kinds where a tensor counts as at least so large.

    Some are zero but for rounding, such as fc1.bias's gradient in front of a normalisation.
    """
    means = {}
    for kind in (PARAMETER_GRADIENTS, BUFFERS):
        tensors = [t.double() for t in truth.get(kind, {}).values() if t.is_floating_point()]
        count = sum(t.numel() for t in tensors)
        squares = sum(torch.linalg.vector_norm(t).item() ** 2 for t in tensors)
        means[kind] = squares / count if count else 0.0
    return means


def _both_beyond(a: Tensor, b: Tensor) -> Tensor | None:
    """Where both hold the same NaN or infinity, which is agreement; None if nowhere."""
    if a.shape != b.shape or bool(a.isfinite().all()):
        return None
    same = ((a == b) | (a.isnan() & b.isnan())) & ~a.isfinite()
    return same if same.any() else None


def _error(
    means: dict[str, float], kind: str, expected: Tensor, result: Tensor, skipped: Tensor | None
) -> float:
    if expected.shape != result.shape:
        return math.inf
    if skipped is not None:
        if skipped.all():
            return math.nan  # nothing is left to compare
        expected, result = expected.masked_fill(skipped, 0), result.masked_fill(skipped, 0)
    if kind == OUTPUTS:
        return relative_error(result, expected)
    floor = (means.get(kind, 0.0) * expected.numel()) ** 0.5
    return relative_error(result, expected, 2, floor)
