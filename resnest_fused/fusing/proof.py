"""Proves on synthetic inputs, before a module is fused, that it computes split attention.

The module's copy and its fused form run in float64 on maps of several sizes, in eval and in
training mode, forward and backward. Every parameter, every norm's affine parameters and running
statistics are random: in a fresh norm they make it the identity, which would hide that it is not
called. The convolution in front, or each path, is replaced by a small affine map, which both forms
call: unlike an identity it shows where it is called.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from torch.nn.modules.linear import Identity
from torch.nn.modules.pooling import AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d
from torch.nn.parameter import is_lazy

from resnest_fused.children import calls_are_watched, computes_as, computes_as_conv
from resnest_fused.fusing import folding, watching
from resnest_fused.fusing.recognition import features_of
from resnest_fused.fusing.wrapping import core
from resnest_fused.layout import Layout, read
from resnest_fused.measure import agreement
from resnest_fused.measure.agreement import Call, Form, Incomparable
from resnest_fused.modules import FusedModule

# There are more than two samples, since normalising two gives +1 and -1, and once more than 32,
# where some norms take parts of the batch.
_BATCHES = (5, 33, 4)
# By the number of the map's dimensions.
_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((4,), (1,), (7,)),
    2: ((3, 4), (1, 1), (6, 6)),
    3: ((3, 4, 2), (1, 1, 1), (2, 3, 5)),
}
_LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.contiguous_format)
# Of the map that has one sample and many pixels, and large numbers, which tell a ReLU from a ReLU6.
_LARGE_SIZES: dict[int, tuple[int, ...]] = {1: (131,), 2: (17, 16), 3: (9, 5, 6)}
_LARGE = 50.0


class Unproven(Exception):
    """The module could not be tried out."""


class _Affine(nn.Module):
    """Stands in for the convolution: a x + b, with a number of each for every feature."""

    def __init__(self, features: int, dimensions: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(features, *[1] * dimensions))
        self.shift = nn.Parameter(torch.empty(features, *[1] * dimensions))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _AffineOfMean(_Affine):
    """Stands in where any number of features enters: each result is one of their mean."""

    def __init__(self, features: int, dimensions: int, stride: tuple[int, ...] = ()) -> None:
        super().__init__(features, dimensions)
        self._pixels: Any = ..., *(slice(None, None, step) for step in stride)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean(1, keepdim=True)[self._pixels])


def difference(
    module: nn.Module, layout: Layout, fused: type[FusedModule], backend: str = "auto"
) -> str | None:
    """By how much ``module`` would differ if ``fused`` were its class; None if it would not.

    The module stays as it is, and so do random generators. Its own hooks and those of its children
    do not run, since they run around the fused module too.

    Raises:
        Unproven: the module could not be tried out; the message gives the reason.
    """
    if calls_are_watched():
        # Every child would be called then, and the op's own work would not be tried.
        raise Unproven("hooks for all modules are registered; fuse the model before")
    random = agreement.RandomStates([*module.parameters(), *module.buffers()])
    try:
        with torch.inference_mode(False), _one_thread():
            return _difference(module, layout, fused, backend)
    except (Incomparable, Unproven) as error:
        raise Unproven(str(error)) from error
    except Exception as error:  # of the module's code, or of a mode that the caller is in
        raise Unproven(f"{type(error).__name__}: {error}") from error
    finally:
        random.restore()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Runs without threads, which would wait for each other at each of many small tensors.

    On two shared cores two threads took 4.4 s for ResNeSt-50, and one 0.35 s (Zen 4, 2026-11-27).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# What was found equal, in this process; and what differs, in one call of fuse or verify.
_proven: WeakKeyDictionary[type[nn.Module], set[Any]] = WeakKeyDictionary()
Disproved = dict[Any, str]


def difference_by_class(
    module: nn.Module,
    layout: Layout,
    fused: type[FusedModule],
    backend: str,
    disproved: Disproved,
) -> str | None:
    """:func:`difference`, found once for modules of one class and configuration."""
    kind: Any = core(type(module))
    try:
        replaced = dict(_stand_ins(module, layout, 0, 0))
        configuration = tuple(_configuration(module, replaced))
    except _Varied:
        return difference(module, layout, fused, backend)
    key = kind.forward, layout, backend, configuration
    if key in _proven.get(kind, ()):
        return None
    if key not in disproved:
        found = difference(module, layout, fused, backend)
        if found is None:
            _proven.setdefault(kind, set()).add(key)
            return None
        disproved[key] = found
    return disproved[key]


def _difference(
    module: nn.Module, layout: Layout, fused: type[FusedModule], backend: str
) -> str | None:
    try:
        radix, features = read(module, layout.radix), _features(module, layout)
    except AttributeError as error:
        raise Unproven(f"not as registered: {error}") from error
    if features is None or not isinstance(radix, int) or radix < 1:
        raise Unproven("the number of its features is unknown")
    if folding.count_folded(module):
        raise Unproven("it has folded norms")
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise Unproven("it has lazy parameters; call the model once before")
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    if device is None or device.type == "meta":
        device = torch.device("cpu")
    dimensions = _dimensions(module, layout)
    generator = torch.Generator("cpu").manual_seed(0)
    twin = _twin(module, layout, features, dimensions, device, generator)

    used = False

    def attend(x: Tensor) -> Tensor:
        nonlocal used
        used = True
        return fused._fused_attention(twin, x)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def as_fused() -> Iterator[None]:
        with agreement.preserved(twin):
            twin.__class__ = fused
            vars(twin).update(backend=backend, _fused_attention=attend)
            yield

    forms = Form("unfused", twin, contextlib.nullcontext), Form("fused", twin, as_fused)
    calls = []
    inputs = _inputs(module, layout, features)
    for batch, size, memory in zip(_BATCHES, _SIZES[dimensions], _LAYOUTS, strict=True):
        call = _call(forms[0], (batch, inputs, *size), memory, generator)
        calls.append(call)
        if len(calls) == 1:
            trait = _trait(forms[0], call, layout)
            if trait is not None:
                return f"its forward {trait}"
        # A norm may be frozen in training; its mode counts then, not the module's.
        for mode in (_eval, _training, _norms_in_eval)[: 2 if len(calls) > 1 else 3]:
            problem = _compared(forms, call, mode)
            if problem is not None:
                return problem
    if not used:
        return "its forward does not call the parts that the op would replace"
    large = _large_call(forms[0], (inputs, *_LARGE_SIZES[dimensions]), generator)
    without = calls[0]._replace(gradients=(), grad_enabled=False)
    problem = _compared(forms, large, _eval) or _compared(forms, without, _training)
    problem = problem or _questions(forms[0], calls[0])
    if problem is not None:
        return problem
    # A norm may take the place of nothing later: then it is called where the forward calls nothing.
    nothing = [part for part in ("bn0", "drop", "bn1") if _is_identity(twin, layout, part)]
    for part in nothing:
        width, depth = features, dimensions
        if part == "bn1":
            fc1 = read(twin, layout.fc1)
            width, depth = features_of(fc1) or 1, 0 if isinstance(fc1, nn.Linear) else dimensions
        *parents, name = getattr(layout, part)
        probe = _Affine(width, depth)
        for parameter in probe.parameters():
            parameter.data = _draw(torch.randn, parameter.shape, generator).to(device)
        setattr(read(twin, tuple(parents)), name, probe)
    return _compared(forms, calls[0], _eval) if nothing else None


def _trait(form: Form, call: Call, layout: Layout) -> str | None:
    """What forbids the op whatever the numbers are, or None."""
    module = form.module
    (x,) = (value.detach().clone() for value in call.args)
    with form.take(), agreement.preserved(module), torch.no_grad():
        before = dict(vars(module))
        lengths = _lengths(module)
        found = module(x)
        after = _lengths(module)
        changed = [
            name
            for name, value in vars(module).items()
            if before.get(name) is not value or lengths.get(name) != after.get(name)
        ]
    if not isinstance(found, Tensor):
        return f"returns a {type(found).__name__}, expected a tensor"
    if not torch.equal(x, call.args[0]):
        return "changes its input in place, which the op would not"
    # Where a block is kept, its own forward still runs.
    return (
        f"sets {', '.join(changed)}, which the op would not"
        if changed and not layout.within
        else None
    )


def _lengths(module: nn.Module) -> dict[str, int]:
    """How much each container among a module's attributes holds: one that grows keeps something."""
    containers = list, dict, set, deque
    return {name: len(value) for name, value in vars(module).items() if type(value) in containers}


def _questions(form: Form, call: Call) -> str | None:
    """What a forward asks about its input that other inputs may answer in another way."""
    module = form.module
    asked: dict[str, None] = {}
    for set_mode in (_eval, _training):
        with form.take(), agreement.preserved(module):
            agreement.stand_in(module, None, lambda _, buffer: agreement.copied(buffer))
            set_mode(module)
            try:
                asked |= dict.fromkeys(watching.questions(module, call.args[0].detach().clone()))
            except Exception as error:
                raise Unproven(f"it cannot be watched: {type(error).__name__}: {error}") from error
    return f"its forward asks {', '.join(asked)}, and may decide by that" if asked else None


def _eval(module: nn.Module) -> str:
    module.eval()
    return "eval"


def _training(module: nn.Module) -> str:
    module.train()
    return "training"


def _norms_in_eval(module: nn.Module) -> str:
    module.train()
    for child in module.modules():
        if "running_mean" in child._buffers:
            child.eval()
    return "training with norms in eval"


def _compared(
    forms: tuple[Form, Form], call: Call, set_mode: Callable[[nn.Module], str]
) -> str | None:
    mode = set_mode(forms[0].module)
    checks, _ = agreement.compare(*forms, call)
    worst = agreement.worst(checks)
    return None if worst.passed else f"fused it would compute something else, in {mode}: {worst}"


def _is_identity(module: nn.Module, layout: Layout, part: str) -> bool:
    path = getattr(layout, part)
    # A property gives a norm another name, which cannot be set.
    if path is None or type(read(module, path)) is not Identity:
        return False
    return path[-1] in read(module, path[:-1])._modules


def _features(module: nn.Module, layout: Layout) -> int | None:
    """radix * channels, the number of features that enter the attention; None if unknown."""
    for part in (layout.fc2, layout.conv):
        features = features_of(read(module, part, None))
        if features is not None:
            return features
    channels, radix = getattr(module, "channels", None), read(module, layout.radix)
    return radix * channels if isinstance(channels, int) and isinstance(radix, int) else None


def _stand_ins(
    module: nn.Module, layout: Layout, features: int, dimensions: int
) -> Iterator[tuple[nn.Module, Callable[[], nn.Module]]]:
    """The children that something cheap stands in for, and what makes it."""
    if layout.within is not None:
        attention = set(read(module, layout.within[1:]).modules())
        for child in module.modules():
            if child not in attention and computes_as_conv(type(child)):
                conv: Any = child
                yield child, partial(_AffineOfMean, conv.out_channels, dimensions, conv.stride)
    elif layout.conv is not None:
        yield read(module, layout.conv), partial(_Affine, features, dimensions)
    for path in layout.paths:
        channels = features // len(layout.paths)
        yield read(module, path), partial(_AffineOfMean, channels, dimensions)


def _inputs(module: nn.Module, layout: Layout, features: int) -> int:
    """The number of features that enter the twin."""
    if not layout.paths and layout.within is None:
        return features
    first = read(module, layout.paths[0]) if layout.paths else module
    found = (getattr(layer, "in_channels", None) for layer in first.modules())
    inputs = next((number for number in found if isinstance(number, int)), 1)
    divided = layout.divided is not None and read(module, layout.divided)
    return len(layout.paths) * inputs if divided else inputs


_OF_DIMENSIONS = (
    (1, (BatchNorm1d, AdaptiveAvgPool1d)),
    (2, (BatchNorm2d, AdaptiveAvgPool2d)),
    (3, (BatchNorm3d, AdaptiveAvgPool3d)),
)


def _dimensions(module: nn.Module, layout: Layout) -> int:
    """Those of the maps: 1, 2 or 3."""
    for part in (layout.conv, layout.bn0, layout.fc1, *(other.path for other in layout.others)):
        layer = read(module, part, None)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and 3 <= weight.dim() <= 5:
            return weight.dim() - 2
        for dimensions, kinds in _OF_DIMENSIONS:
            if isinstance(layer, kinds):
                return dimensions
    return 2


def _draw(
    random: Callable[..., Tensor], shape: Iterable[int], generator: torch.Generator
) -> Tensor:
    # On the generator's device, whatever the default device is.
    return random(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def _twin(
    module: nn.Module,
    layout: Layout,
    features: int,
    dimensions: int,
    device: torch.device,
    generator: torch.Generator,
) -> nn.Module:
    """A copy of the module with random numbers, without hooks and without its convolution."""
    kind: Any = core(type(module))
    if issubclass(kind, FusedModule):
        kind = kind.__bases__[-1]  # its unfused class
    twin = kind.__new__(kind)
    # What the copy must not share, nor copy.
    memo: dict[int, Any] = {id(module): twin}
    for child in module.modules():
        for name, value in vars(child).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                memo[id(value)] = OrderedDict()
    for parameter in module.parameters():
        memo[id(parameter)] = parameter
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    with torch.device(device):
        for child, make in _stand_ins(module, layout, features, dimensions):
            memo[id(child)] = make()
    try:
        vars(twin).update(copy.deepcopy(vars(module), memo))
    except Exception as error:
        raise Unproven(f"it cannot be copied: {type(error).__name__}: {error}") from error
    vars(twin).pop("_compiled_call_impl", None)  # of Module.compile, which is bound to the module
    for child in twin.modules():
        if computes_as(type(child), SyncBatchNorm):
            child.__class__ = BatchNorm2d  # which it is for one process; it runs on the CPU too

    def parameter_of(tensor: Tensor) -> Tensor:
        fan_in = tensor[0].numel() if tensor.dim() > 1 and len(tensor) else 1
        return (_draw(torch.randn, tensor.shape, generator) / fan_in**0.5).to(device)

    def buffer_of(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            if tensor.is_meta:
                return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            return agreement.copied(tensor, torch.float64)
        # Of a normalisation, a frozen one's weight and bias among them. Any other, such as a
        # temperature, must not count, as a checkpoint may bring other values after the proof.
        values = _draw(torch.rand, tensor.shape, generator)
        return (values - (0.5 if name in ("running_mean", "bias") else -0.5)).to(device)

    agreement.stand_in(twin, parameter_of, buffer_of)
    return twin.requires_grad_()


def _call(
    unfused: Form, shape: tuple[int, ...], memory: torch.memory_format, generator: torch.Generator
) -> Call:
    device = next(unfused.module.parameters()).device
    batch, features, *size = shape

    def draw(*sizes: int) -> Tensor:
        drawn = _draw(torch.randn, sizes, generator).to(device)
        return drawn.to(memory_format=memory) if drawn.dim() == 4 else drawn

    # The samples differ in their means, since bn1 divides by the spread of these.
    x = draw(batch, features, *size) + draw(batch, features, *[1] * len(size))
    unfused.module.eval()
    results = agreement.run(unfused, Call((x,), {}, grad_enabled=False), torch.float64)
    gradients = tuple(draw(*out.shape) for out in results[agreement.OUTPUTS].values())
    return Call((x.requires_grad_(),), {}, gradients)


def _large_call(unfused: Form, shape: tuple[int, ...], generator: torch.Generator) -> Call:
    """One sample without gradients, or two where the module refuses one, as some norms do."""
    device = next(unfused.module.parameters()).device
    unfused.module.eval()
    x = _LARGE * _draw(torch.randn, (2, *shape), generator).to(device)
    one, two = (Call((x[:batch],), {}, grad_enabled=False) for batch in (1, 2))
    try:
        agreement.run(unfused, one, torch.float64)
    except Incomparable:
        return two
    return one


class _Varied(Exception):
    """The module holds something that may differ between modules that look alike."""


_OF_MODULES = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}


def _configuration(module: nn.Module, replaced: Iterable[nn.Module]) -> Iterator[Any]:
    """All that distinguishes modules of one class, other than the values of their tensors.

    The modules that a stand-in replaces do not.
    """
    left_out = {child for part in replaced for child in part.modules()}
    for name, child in module.named_modules():
        if child in left_out:
            continue
        yield name, type(child), *_behaviour(type(child))
        for key, value in vars(child).items():
            if key in ("_parameters", "_buffers"):
                for tensor_name, tensor in value.items():
                    unknown = tensor is None or is_lazy(tensor)
                    yield tensor_name, None if unknown else tensor.shape
            elif key not in _OF_MODULES and key != "_modules":
                yield key, _simple(value)


def _behaviour(kind: type) -> Iterator[Any]:
    """The methods and constants of a class, any of which may be replaced after a proof."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            if isinstance(value, list | tuple | dict | set):
                yield name, repr(value)
            elif not name.startswith("__") or isinstance(value, types.FunctionType):
                yield name, value


def _simple(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | None | types.FunctionType | type | torch.dtype):
        return value
    if isinstance(value, list | tuple):
        return type(value), *map(_simple, value)
    if isinstance(value, dict):
        return tuple((_simple(key), _simple(item)) for key, item in value.items())
    raise _Varied
