"""Code that was hooked, replaced or substituted, before fuse or after, is called.

In each test the unfused module is the truth: both modules get the same changes.
"""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_ins import FROZEN_NORM, define
from test_fuse import features, randomise, step
from test_modules import FusedOps
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

import resnest_fused as rf
from resnest_fused import children


class Block(nn.Module):
    """Both kinds of module, with children of every kind that the op absorbs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = rf.SplitAttentionConv2d(4, 8, 3, padding=1)
        self.attention = rf.SplitAttention(4, cardinality=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.conv(x))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """A model and its fused copy, in float64."""
    plain = randomise(Block()).double()
    fused = copy.deepcopy(plain)
    assert len(rf.fuse(fused)) == 2
    return plain, fused


def inputs() -> Tensor:
    return features(8, 4, 6, 5)


def assert_same(
    fused: nn.Module, plain: nn.Module, before: dict[bool, dict[str, Tensor]] | None = None
) -> None:
    """Both give the same, in eval and in training, and not the same as ``before``."""
    for training in (False, True):
        found, expected = (step(model, inputs(), training) for model in (fused, plain))
        for name, truth in expected.items():
            torch.testing.assert_close(found[name], truth, rtol=1e-9, atol=1e-11, msg=name)
        if before is not None:
            assert not torch.allclose(expected["out"], before[training]["out"], rtol=1e-2)


def both_modes(model: nn.Module) -> dict[bool, dict[str, Tensor]]:
    return {training: step(copy.deepcopy(model), inputs(), training) for training in (False, True)}


def halved(function: Callable[..., Tensor], wrap: bool) -> Callable[..., Tensor]:
    def replaced(self: nn.Module, x: Tensor) -> Tensor:
        return 0.5 * function(self, x) + 0.25

    # Profilers wrap like this, which makes the replacement look like the original.
    return functools.wraps(function)(replaced) if wrap else replaced


METHODS = [
    (nn.BatchNorm2d, "forward"),
    (nn.modules.batchnorm._BatchNorm, "forward"),
    (nn.Conv2d, "forward"),
    (rf.SplitAttention, "forward"),
    (rf.SplitAttentionConv2d, "forward"),
]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("kind", "name"), METHODS, ids=str)
def test_a_class_s_method_replaced_after_fuse(
    kind: type, name: str, wrap: bool, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = pair
    before = both_modes(plain)
    monkeypatch.setattr(kind, name, halved(getattr(kind, name), wrap))
    assert_same(fused, plain, before)
    monkeypatch.undo()
    with FusedOps() as ops:
        step(fused, inputs(), True)
    assert ops.names["split_attention_train"] == 2  # absorbed again


def test_a_convolution_s_inner_method_replaced_after_fuse(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = pair
    before = both_modes(plain)
    original = nn.Conv2d._conv_forward

    def replaced(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return original(self, x, 2 * weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", replaced)
    assert_same(fused, plain, before)


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_calls_of_every_module_replaced_after_fuse(
    name: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = pair
    before = both_modes(plain)
    original = getattr(nn.Module, name)

    def replaced(self: nn.Module, *args: Any) -> Any:
        out = original(self, *args)
        return out + 0.5 if isinstance(self, nn.Conv2d | nn.BatchNorm2d) else out

    monkeypatch.setattr(nn.Module, name, replaced)
    assert_same(fused, plain, before)


GLOBAL_HOOKS = {
    "forward": register_module_forward_hook,
    "forward-pre": register_module_forward_pre_hook,
    "backward": register_module_full_backward_hook,
    "backward-pre": register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("register", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS)
def test_hooks_of_all_modules_see_every_child(register: Any, pair: Any) -> None:
    plain, fused = pair
    x = inputs()
    if "backward" in register.__name__:
        # PyTorch refuses them in front of an in-place ReLU, fused or not.
        plain, fused, x = plain.attention, fused.attention, features(8, 8, 6, 5)
    met: list[str] = []

    def note(module: nn.Module, *_: Any) -> None:
        met.append(type(module).__name__.removeprefix("Fused"))

    handle = register(note)
    try:
        step(plain, x, True)
        expected = met.copy()
        met.clear()
        step(fused, x, True)
        assert met == expected and {"Conv2d", "BatchNorm2d", "SplitAttention"} <= set(met)
    finally:
        handle.remove()
    met.clear()
    with FusedOps() as ops:
        step(fused, x, True)
    assert not met and ops.names["split_attention_train"] > 0


def test_a_hook_of_all_modules_may_change_what_they_give(pair: Any) -> None:
    plain, fused = pair
    before = both_modes(plain)

    def inject(module: nn.Module, _: Any, out: Tensor) -> Tensor | None:
        return out * 0.5 + 0.25 if isinstance(module, nn.Conv2d | nn.BatchNorm2d) else None

    handle = register_module_forward_hook(inject)
    try:
        assert_same(fused, plain, before)
    finally:
        handle.remove()


# --- classes that took another's name


class Halving(nn.Module):
    """Takes the arguments of any layer and halves what it gets."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * self.weight


@pytest.mark.parametrize("name", ["BatchNorm2d", "SyncBatchNorm", "ReLU", "Identity"])
def test_a_class_bound_to_torch_s_name_is_not_torch_s(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn, name, Halving)
    plain = rf.SplitAttentionConv2d(4, 8, 3, norm_layer=Halving).double()
    fused = copy.deepcopy(plain)
    rf.fuse(fused)
    assert_same(fused, plain)
    # The original class is still known, and absorbed.
    original = rf.SplitAttention(4, norm_layer=nn.modules.batchnorm.BatchNorm2d)
    rf.fuse(original)
    with FusedOps() as ops:
        step(original, features(4, 8, 3, 3), True)
    assert ops.names["split_attention_train"] == 1


class ScaledBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


REBOUND_BEFORE_IMPORT = """
import sys
import torch
from torch import Tensor, nn

{rebind}

import resnest_fused as rf

torch.manual_seed(0)
plain = rf.SplitAttentionConv2d(4, 8, 3).double().eval()
for module in plain.modules():
    if hasattr(module, "running_var"):
        nn.init.uniform_(module.running_mean)
        nn.init.uniform_(module.running_var, 0.5, 2)
x = torch.randn(4, 4, 6, 6).double()
expected = plain(x)
assert len(rf.fuse(plain)) == 1
torch.testing.assert_close(plain(x), expected)
"""
REBINDINGS = {
    "class": """
class Mine(nn.BatchNorm2d):
    def forward(self, x):
        return 0.5 * super().forward(x)
nn.BatchNorm2d = Mine
""",
    "class where it is defined": """
class Mine(nn.BatchNorm2d):
    def forward(self, x):
        return 0.5 * nn.modules.batchnorm._BatchNorm.forward(self, x)
nn.modules.batchnorm.BatchNorm2d = nn.BatchNorm2d = Mine
""",
    "method": """
original = nn.Conv2d.forward
nn.Conv2d.forward = lambda self, x: 0.5 * original(self, x)
""",
}


@pytest.mark.parametrize("rebind", REBINDINGS.values(), ids=REBINDINGS)
def test_what_was_replaced_before_the_import(rebind: str, tmp_path: Any) -> None:
    code = REBOUND_BEFORE_IMPORT.format(rebind=rebind)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# --- children that compute something else in other ways


def _with_class(child: nn.Module, **body: Any) -> None:
    child.__class__ = type("Changed", (type(child),), body)


class Doubling(Tensor):
    """Convolutions and batch normalisations of such a tensor give twice as much."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("conv2d", "batch_norm"):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {})) * 2
        return super().__torch_function__(function, types, args, kwargs or {})


def _double_weight(child: nn.Module) -> None:
    child._parameters["weight"] = nn.Parameter(child.weight.detach().as_subclass(Doubling))


def _halve_convolution(child: nn.Module) -> None:
    convolve = child._conv_forward
    child._conv_forward = lambda *args: convolve(*args) * 0.5


def _halve_call(child: nn.Module) -> None:
    call = child._call_impl
    child._call_impl = lambda *args: call(*args) * 0.5


def _shift_mean(child: nn.Module) -> None:
    mean = child._buffers.pop("running_mean")
    vars(child)["running_mean"] = mean + 0.5


CHANGES: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "__call__": (
        "bn1",
        lambda m: _with_class(m, __call__=lambda self, x: nn.Module.__call__(self, x) * 0.5),
    ),
    "_call_impl": ("fc2", _halve_call),
    "_conv_forward": ("fc2", _halve_convolution),
    "a weight that is computed": (
        "fc2",
        lambda m: _with_class(m, weight=property(lambda self: self._parameters["weight"] * 0.5)),
    ),
    "a weight with functions of its own": ("fc2", _double_weight),
    "a mean that is no buffer": ("bn1", _shift_mean),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_child_that_computes_something_else(change: str, pair: Any) -> None:
    plain, fused = pair
    before = both_modes(plain)
    name, make = CHANGES[change]
    for model in (plain, fused):
        for module in (model.conv, model.attention):
            make(module.get_submodule(name))
    if change == "a mean that is no buffer":  # which training does not read
        found, expected = (step(model, inputs(), False) for model in (fused, plain))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(expected["out"], before[False]["out"], rtol=1e-2)
    else:
        assert_same(fused, plain, before)


def test_a_method_of_another_class_is_a_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.ReLU, "forward", nn.SiLU.forward)
    assert children.own_method(nn.ReLU) is None
    assert children.own_method(nn.SiLU) is nn.SiLU.forward


# --- frozen batch normalisations

BY_NAME = FROZEN_NORM.replace("self.weight * (", "self.weight * 1.5 * (")


@pytest.mark.parametrize("module", ["mine.layers", "detectron2.layers.batch_norm"])
def test_a_frozen_norm_is_not_known_by_its_name(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by its class's name, nor by its module's name if that now has another class."""
    monkeypatch.setitem(sys.modules, module, None)
    impostor = define(module, BY_NAME).FrozenBatchNorm2d
    define(module, FROZEN_NORM)  # what is found there now
    monkeypatch.undo()
    plain = rf.SplitAttentionConv2d(4, 8, 3, norm_layer=impostor).double()
    fused = copy.deepcopy(plain)
    rf.fuse(fused)
    assert_same(fused, plain)
    with FusedOps() as ops:
        step(fused, inputs(), False)
    assert ops.names["pool"] == 1


def test_a_frozen_norm_s_forward_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from stand_ins import FrozenBatchNorm2d

    plain = rf.SplitAttentionConv2d(4, 8, 3, norm_layer=FrozenBatchNorm2d).double()
    fused = copy.deepcopy(plain)
    rf.fuse(fused)
    before = both_modes(plain)
    monkeypatch.setattr(FrozenBatchNorm2d, "forward", halved(FrozenBatchNorm2d.forward, True))
    assert_same(fused, plain, before)
    monkeypatch.undo()
    children._find_forward.cache_clear()  # it remembers the replacement
