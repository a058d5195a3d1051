"""The fused modules against the reference's: any norm, its state, hooks, copies, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_ins import FrozenBatchNorm2d
from test_fuse import square_errors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import resnest_fused as rf
from resnest_fused.modules import fused_attention

NormLayer = Callable[[int], nn.Module] | None
# In float64, where all that differs is the order of sums.
TIGHT = {"rtol": 1e-9, "atol": 1e-10}
both_kinds = pytest.mark.parametrize("conv", [False, True], ids=["attention", "conv"])


def _pair(
    norm_layer: NormLayer = nn.BatchNorm2d,
    conv: bool = False,
    norm1: NormLayer = None,
    **options: Any,
) -> tuple[nn.Module, nn.Module]:
    """A reference module and a fused one with the same state, in float64.

    ``norm1`` makes bn1, if that is to differ from bn0.
    """
    options = {"radix": 2, "cardinality": 2, "inter_channels": 12, **options}
    sizes: tuple[int, ...] = (12,)
    kinds: tuple[type[nn.Module], type[nn.Module]] = rf.SplitAttention, rf.FusedSplitAttention
    if conv:
        sizes = 24, 12, 3
        kinds = rf.SplitAttentionConv2d, rf.FusedSplitAttentionConv2d
    eager, fused = (kind(*sizes, norm_layer=norm_layer, **options) for kind in kinds)
    for module in (eager, fused):
        if norm1 is not None:
            module.bn1 = norm1(module.inter_channels)
        module.double()
    for module in eager.modules():
        if isinstance(module, _BatchNorm | nn.GroupNorm) and module.weight is not None:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    fused.load_state_dict(eager.state_dict())
    return eager, fused


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _input(module: nn.Module, batch: int = 4) -> Tensor:
    """Samples that differ in their means, as bn1 divides by their spread."""
    if hasattr(module, "conv"):
        return _randn(batch, 24, 7, 6) + _randn(batch, 24, 1, 1)
    return _randn(batch, 12 * module.radix, 5, 3) + _randn(batch, 12 * module.radix, 1, 1)


def _assert_close(ours: Tensor | None, expected: Tensor | None, name: str = "") -> None:
    assert (ours is None) == (expected is None), name
    if ours is not None:
        torch.testing.assert_close(ours, expected, **TIGHT, msg=lambda m: f"{name}: {m}")


def _assert_same_state(fused: nn.Module, eager: nn.Module) -> None:
    ours, expected = fused.state_dict(), eager.state_dict()
    assert list(ours) == list(expected)
    for name in ours:
        _assert_close(ours[name], expected[name], name)


def _step(module: nn.Module, x: Tensor, input_grad: bool = True) -> dict[str, Tensor | None]:
    module.zero_grad()
    leaf = x.clone().requires_grad_(input_grad)
    out = module(leaf)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    out.backward(dout)
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": leaf.grad, **grads}


def _assert_same_step(
    fused: nn.Module, eager: nn.Module, x: Tensor, input_grad: bool = True
) -> None:
    """out and every gradient; the state is compared after it."""
    ours, expected = _step(fused, x, input_grad), _step(eager, x, input_grad)
    for name, tensor in expected.items():
        _assert_close(ours[name], tensor, name)
    _assert_same_state(fused, eager)


class FusedOps(TorchDispatchMode):
    """Counts the calls of this package's ops, and names the others that may launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.others: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if op.namespace == "resnest_fused":
            self.names[op._schema.name.removeprefix("resnest_fused::")] += 1
        elif not op.is_view:
            self.others.append(str(op))
        return op(*args, **(kwargs or {}))


# The ops of a training step: all phases in one, or with the modules between them called.
WHOLE = ("split_attention_train", "split_attention_backward")
PHASES = ("pool", "recombine", "pool_backward", "recombine_backward")
RUNNING = "update_running_statistics"
BN0_PHASES = ("batch_statistics", "prologue_backward", *PHASES)


def _ops_of_a_step(module: nn.Module) -> Counter[str]:
    """Without the one for running statistics."""
    with FusedOps() as ops:
        _step(module, _input(module))
    del ops.names[RUNNING]
    return ops.names


class LayerNorm2d(nn.LayerNorm):
    """Over channels, as in ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TwiceBatchNorm2d(nn.BatchNorm2d):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class NamedBatchNorm2d(nn.BatchNorm2d):
    """Has no forward of its own."""


def _bn(**options: Any) -> NormLayer:
    return lambda n: nn.BatchNorm2d(n, **options)


def _group_norm(features: int) -> nn.Module:
    return nn.GroupNorm(3, features)


# Each with the ops of a training step of a module without other special children.
NORM_LAYERS: dict[str, tuple[NormLayer, tuple[str, ...]]] = {
    "default": (nn.BatchNorm2d, WHOLE),
    "none": (None, WHOLE),
    "identity": (lambda n: nn.Identity(), WHOLE),
    "momentum 0.3": (_bn(momentum=0.3), WHOLE),
    "cumulative average": (_bn(momentum=None), WHOLE),
    "momentum 0": (_bn(momentum=0.0), WHOLE),
    "eps 0.1": (_bn(eps=0.1), WHOLE),
    "not affine": (_bn(affine=False), WHOLE),
    "not tracking": (_bn(track_running_stats=False), WHOLE),
    "subclass": (NamedBatchNorm2d, WHOLE),
    "sync": (nn.SyncBatchNorm, WHOLE),
    "frozen": (FrozenBatchNorm2d, WHOLE),
    "group": (_group_norm, PHASES),
    "layer": (LayerNorm2d, PHASES),
    "own forward": (TwiceBatchNorm2d, PHASES),
}


@both_kinds
@pytest.mark.parametrize(("norm_layer", "ops"), NORM_LAYERS.values(), ids=NORM_LAYERS)
def test_any_norm(norm_layer: NormLayer, ops: tuple[str, ...], conv: bool) -> None:
    eager, fused = _pair(norm_layer, conv)
    for training in (True, True, False, True, False):
        for module in (eager, fused):
            module.train(training)
        _assert_same_step(fused, eager, _input(eager))
    assert _ops_of_a_step(fused.train()) == Counter(ops)


# bn0, bn1, and the ops of a training step.
MIXED: dict[str, tuple[NormLayer, NormLayer, tuple[str, ...]]] = {
    "batch, group": (nn.BatchNorm2d, _group_norm, BN0_PHASES),
    "group, batch": (_group_norm, nn.BatchNorm2d, WHOLE),
    "frozen, layer": (FrozenBatchNorm2d, LayerNorm2d, PHASES),
    "instance, identity": (nn.InstanceNorm2d, lambda n: nn.Identity(), WHOLE),
    "frozen, batch": (FrozenBatchNorm2d, nn.BatchNorm2d, WHOLE),
    "batch, frozen": (nn.BatchNorm2d, FrozenBatchNorm2d, WHOLE),
    "sync, own forward": (nn.SyncBatchNorm, TwiceBatchNorm2d, BN0_PHASES),
    "not affine, group": (_bn(affine=False), _group_norm, BN0_PHASES),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("radix", [1, 3])
@pytest.mark.parametrize(("norm0", "norm1", "ops"), MIXED.values(), ids=MIXED)
def test_norms_of_two_kinds(
    norm0: NormLayer,
    norm1: NormLayer,
    ops: tuple[str, ...],
    radix: int,
    memory_format: torch.memory_format,
) -> None:
    eager, fused = _pair(norm0, conv=True, norm1=norm1, radix=radix)
    for training in (True, False):
        for module in (eager, fused):
            module.train(training).to(memory_format=memory_format)
        x = _input(eager).contiguous(memory_format=memory_format)
        _assert_same_step(fused, eager, x)
        assert fused(x).stride() == eager(x).stride()
    assert _ops_of_a_step(fused.train()) == Counter(ops)


@both_kinds
def test_instance_norm_between_the_fcs_is_refused_as_pytorch_refuses_it(conv: bool) -> None:
    for module in _pair(nn.InstanceNorm2d, conv):
        with pytest.raises(ValueError, match="Expected more than 1 spatial element when training"):
            module(_input(module))


# act0, act1, and the ops of a training step behind a BatchNorm2d.
ACTIVATIONS: dict[str, tuple[nn.Module | None, nn.Module, tuple[str, ...]]] = {
    "relu, relu": (nn.ReLU(), nn.ReLU(inplace=True), WHOLE),
    "relu, silu": (nn.ReLU(inplace=True), nn.SiLU(), BN0_PHASES),
    "relu, prelu": (nn.ReLU(), nn.PReLU(), BN0_PHASES),
    "silu, relu": (nn.SiLU(), nn.ReLU(), WHOLE),
    "silu, silu": (nn.SiLU(), nn.SiLU(inplace=True), PHASES),
    "none, relu": (None, nn.ReLU(), WHOLE),
    "relu6, relu": (nn.ReLU6(), nn.ReLU(), WHOLE),
}


@pytest.mark.parametrize("drop", [None, nn.Identity(), nn.Hardtanh()], ids=str)
@pytest.mark.parametrize(("act0", "act1", "ops"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_any_activation(
    act0: nn.Module | None, act1: nn.Module, ops: tuple[str, ...], drop: nn.Module | None
) -> None:
    """Peers may have any activations."""

    class Net(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.bn0, self.drop, self.act0 = nn.BatchNorm2d(24), drop, copy.deepcopy(act0)
            self.fc1, self.bn1 = nn.Conv2d(12, 9, 1), nn.BatchNorm2d(9)
            self.act1, self.fc2 = copy.deepcopy(act1), nn.Conv2d(9, 24, 1)
            self.radix, self.fused = 2, fused

        def forward(self, x: Tensor) -> Tensor:
            if self.fused:
                options = {"radix": 2, "cardinality": 1, "backend": "auto"}
                return fused_attention(x, **dict(self.named_children()), **options)
            for module in (self.bn0, self.drop, self.act0):
                x = x if module is None else module(x)
            first, second = x.chunk(2, dim=1)
            gap = (first + second).mean(dim=(2, 3), keepdim=True)
            logits = self.fc2(self.act1(self.bn1(self.fc1(gap))))
            attention = logits.view(-1, 2, 12, 1, 1).softmax(dim=1)
            return attention[:, 0] * first + attention[:, 1] * second

    eager, fused = Net(False).double(), Net(True).double()
    fused.load_state_dict(eager.state_dict())
    for training in (True, False):
        eager.train(training)
        fused.train(training)
        _assert_same_step(fused, eager, _input(eager))
    if isinstance(drop, nn.Hardtanh):
        ops = tuple(op for op in ops if op not in ("batch_statistics", "prologue_backward"))
    assert _ops_of_a_step(fused.train()) == Counter(ops)


def test_conv_module_in_plain_functions() -> None:
    """Compares with the paper's formulas instead of the reference module."""
    _, fused = _pair(conv=True, cardinality=1)
    x = _input(fused)

    def norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True)

    splits = F.relu(norm(fused.bn0, fused.conv(x))).view(4, 2, 12, 5, 4)
    gap = splits.sum(dim=1).mean(dim=(2, 3), keepdim=True)
    logits = fused.fc2(F.relu(norm(fused.bn1, fused.fc1(gap))))
    expected = (logits.view(4, 2, 12, 1, 1).softmax(dim=1) * splits).sum(dim=1)
    parameters = list(fused.parameters())
    dout = _randn(*expected.shape)
    _assert_close(fused(x), expected)
    for ours, truth in zip(
        torch.autograd.grad(fused(x), parameters, dout),
        torch.autograd.grad(expected, parameters, dout),
        strict=True,
    ):
        _assert_close(ours, truth)


# --- modes, statistics and counts


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@both_kinds
def test_a_training_forward_launches_only_the_op_and_one_for_running_statistics(
    conv: bool, dtype: torch.dtype, momentum: float | None
) -> None:
    _, fused = _pair(_bn(momentum=momentum), conv)
    x = _input(fused).to(dtype)
    fused.to(dtype)
    with FusedOps() as ops:
        fused(x)
    assert ops.names == {"split_attention_train": 1, RUNNING: 1}
    assert ops.others == (["aten.convolution.default"] if conv else [])


NORM_NAMES = pytest.mark.parametrize("name", ["bn0", "bn1"])


@NORM_NAMES
@pytest.mark.parametrize("norm1", [nn.BatchNorm2d, _group_norm], ids=["bn1", "group"])
@pytest.mark.parametrize("module_trains", [True, False])
def test_a_norm_s_own_mode_decides(module_trains: bool, norm1: NormLayer, name: str) -> None:
    """A frozen norm in a training module, and the reverse."""
    eager, fused = _pair(conv=True, norm1=norm1)
    for module in (eager, fused):
        module.train(module_trains)
        module.get_submodule(name).train(not module_trains)
    before = copy.deepcopy(fused.get_submodule(name))
    _assert_same_step(fused, eager, _input(eager))
    after = fused.get_submodule(name)
    if isinstance(after, nn.BatchNorm2d):
        assert torch.equal(after.running_mean, before.running_mean) == module_trains
        assert after.num_batches_tracked == (0 if module_trains else 1)


@NORM_NAMES
@pytest.mark.parametrize("training", [True, False])
def test_tracking_switched_off_later(training: bool, name: str) -> None:
    eager, fused = _pair(conv=True)
    for module in (eager, fused):
        module.train(training)
        module.get_submodule(name).track_running_stats = False
    _assert_same_step(fused, eager, _input(eager))
    assert fused.get_submodule(name).num_batches_tracked == 0


@NORM_NAMES
@pytest.mark.parametrize("number", ["eps", "momentum"])
def test_numbers_that_are_tensors(number: str, name: str) -> None:
    eager, fused = _pair(conv=True)
    for module in (eager, fused):
        setattr(module.get_submodule(name), number, torch.tensor(0.25))
    _assert_same_step(fused, eager, _input(eager))


@NORM_NAMES
def test_without_a_count_of_batches(name: str) -> None:
    """As in checkpoints from before PyTorch counted them."""
    eager, fused = _pair(_bn(momentum=None), conv=True)
    for module in (eager, fused):
        module.get_submodule(name).num_batches_tracked = None
    _assert_same_step(fused, eager, _input(eager))


@pytest.mark.parametrize("norm1", [nn.BatchNorm2d, _group_norm], ids=["bn1", "group"])
def test_an_empty_batch_leaves_the_statistics(norm1: NormLayer) -> None:
    eager, fused = _pair(conv=True, norm1=norm1)
    before = copy.deepcopy(fused.bn0.running_mean)
    _assert_same_step(fused, eager, _input(eager, batch=0))
    assert torch.equal(fused.bn0.running_mean, before)


@both_kinds
@pytest.mark.parametrize("norm1", [nn.BatchNorm2d, _group_norm], ids=["bn1", "group"])
def test_gradient_mode_makes_no_difference_to_the_statistics(norm1: NormLayer, conv: bool) -> None:
    _, fused = _pair(conv=conv, norm1=norm1)
    other = copy.deepcopy(fused)
    x = _input(fused)
    with torch.no_grad():
        fused(x)
    other(x)
    _assert_same_state(fused, other)


def _raise(*_: object) -> None:
    raise ValueError("no")


def _wrong_fc2(module: nn.Module) -> None:
    module.fc2 = nn.Sequential(nn.Conv2d(12, 7, 1)).double()


# What makes a call with four samples fail, after bn0 has seen them.
FAILURES: dict[str, Callable[[nn.Module], Any]] = {
    "fc1 by a hook": lambda m: m.fc1.register_forward_hook(_raise),
    "fc2 by a hook": lambda m: m.fc2.register_forward_pre_hook(_raise),
    "fc2 gives other channels": _wrong_fc2,
}


@both_kinds
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_call_that_fails_changes_nothing(momentum: float | None, conv: bool) -> None:
    _, fused = _pair(_bn(momentum=momentum), conv)
    good = _input(fused)
    before = copy.deepcopy(fused.state_dict())
    for bad in (good[:1], good[:, :-1], good[:, :, :0]):
        with pytest.raises((ValueError, RuntimeError)):
            fused(bad)
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("cause", FAILURES.values(), ids=FAILURES)
def test_a_failure_between_the_fcs_leaves_bn0_alone(cause: Callable[[nn.Module], Any]) -> None:
    _, fused = _pair(conv=True, norm1=_group_norm)
    cause(fused)
    before = copy.deepcopy(fused.bn0.state_dict())
    with pytest.raises(ValueError):
        fused(_input(fused))
    for name, value in fused.bn0.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- which gradients are asked for


FROZEN = {
    "conv": ("conv",),
    "bn0": ("bn0",),
    "bn0's weight": ("bn0.weight",),
    "bn0's bias": ("bn0.bias",),
    "conv and bn0": ("conv", "bn0"),
    "bn1": ("bn1",),
    "norms": ("bn0", "bn1"),
    "fcs": ("fc1", "fc2"),
    "all between": ("fc1", "bn1", "fc2"),
    "all but fc2's bias": ("conv", "bn0", "fc1", "bn1", "fc2.weight"),
    "all": ("",),
}


@pytest.mark.parametrize("norm1", [nn.BatchNorm2d, _group_norm], ids=["bn1", "group"])
@pytest.mark.parametrize("input_grad", [True, False], ids=["x", "no x"])
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_some_parameters_frozen(names: tuple[str, ...], input_grad: bool, norm1: NormLayer) -> None:
    eager, fused = _pair(conv=True, norm1=norm1)
    for module in (eager, fused):
        for name, parameter in module.named_parameters():
            if any(f"{name}.".startswith(f"{frozen}.".lstrip(".")) for frozen in names):
                parameter.requires_grad_(False)
    if input_grad or names != ("",):
        _assert_same_step(fused, eager, _input(eager), input_grad)
    else:
        assert not fused(_input(fused)).requires_grad


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
def test_only_the_fcs_learn(norm_layer: NormLayer) -> None:
    """The module has no prologue, and its input needs no gradient."""
    eager, fused = _pair(norm_layer)
    _assert_same_step(fused, eager, _input(eager), input_grad=False)


@both_kinds
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
def test_each_gradient_alone(norm_layer: NormLayer, conv: bool) -> None:
    eager, fused = _pair(norm_layer, conv)
    x = _input(eager).requires_grad_()
    outs = fused(x), eager(x)
    dout = _randn(*outs[0].shape)
    named = [dict(module.named_parameters(), x=x) for module in (fused, eager)]
    for name in named[0]:
        ours, expected = (
            torch.autograd.grad(out, tensors[name], dout, retain_graph=True)[0]
            for out, tensors in zip(outs, named, strict=True)
        )
        _assert_close(ours, expected, name)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


@both_kinds
def test_no_gradient_through_the_attention(conv: bool) -> None:
    eager, fused = _pair(_group_norm, conv)
    for module in (eager, fused):
        module.fc1 = nn.Sequential(Detached(), module.fc1)
    _assert_same_step(fused, eager, _input(eager))


@both_kinds
def test_gradient_through_the_attention_only(conv: bool) -> None:
    """The loss depends on values between the FCs, and not on the module's output."""
    eager, fused = _pair(conv=conv)
    x = _input(eager)
    results = []
    for module in (fused, eager):
        hidden: list[Tensor] = []
        module.fc1.register_forward_hook(lambda m, args, out, kept=hidden: kept.append(out))
        leaf = x.clone().requires_grad_()
        module(leaf)
        inputs = [leaf, *([module.conv.weight, *module.bn0.parameters()] if conv else [])]
        results.append(torch.autograd.grad(hidden[0].square().sum(), inputs))
    for ours, expected in zip(*results, strict=True):
        _assert_close(ours, expected)


@both_kinds
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
@pytest.mark.parametrize("loss", ["linear", "square"])
def test_gradients_of_gradients(loss: str, norm_layer: NormLayer, conv: bool) -> None:
    eager, fused = _pair(norm_layer, conv)
    x = _input(eager)
    results = []
    for module in (fused, eager):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *module.parameters()]
        out = module(leaf)
        if loss == "linear":
            out = out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        else:
            out = out.square()
        grads = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs))
    # A bias in front of batch statistics has gradient 0: what is left is rounding of the others.
    atol = 1e-12 * max(float(expected.abs().max()) for expected in results[1])
    for name, ours, expected in zip(["x", *dict(eager.named_parameters())], *results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=atol, msg=name)


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
def test_activation_checkpointing(norm_layer: NormLayer) -> None:
    """Recomputation stops at the last saved tensor, which here comes after the module."""
    eager, fused = _pair(norm_layer, conv=True)
    x = _input(eager)
    results = []
    for module in (fused, eager):
        leaf = x.clone().requires_grad_()
        out = checkpoint(nn.Sequential(module, nn.Sigmoid()), leaf, use_reentrant=False)
        results.append(torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()]))
    for ours, expected in zip(*results, strict=True):
        _assert_close(ours, expected)
    _assert_same_state(fused, eager)


# --- hooks and parametrizations


HOOKS = {
    "forward_pre": lambda child, log: child.register_forward_pre_hook(
        lambda m, args: log.extend(args)
    ),
    "forward": lambda child, log: child.register_forward_hook(
        lambda m, args, out: log.extend((*args, out))
    ),
    "forward that changes": lambda child, log: child.register_forward_hook(
        lambda m, args, out: 2 * out
    ),
    "full_backward_pre": lambda child, log: child.register_full_backward_pre_hook(
        lambda m, grads: log.extend(grads)
    ),
    "full_backward": lambda child, log: child.register_full_backward_hook(
        lambda m, dins, douts: log.extend((*dins, *douts))
    ),
    "full_backward that changes": lambda child, log: child.register_full_backward_hook(
        lambda m, dins, douts: (dins[0] / 2,)
    ),
}


@pytest.mark.parametrize("name", ["conv", "bn0", "fc1", "bn1", "fc2"])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_hooks_on_children(
    register: Callable[[nn.Module, list[Tensor]], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get the same values as in the reference, and their results count."""
    # PyTorch allows no backward hook in front of an in-place operation.
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: torch.relu(x))
    eager, fused = _pair(conv=True)
    logs: tuple[list[Tensor], list[Tensor]] = [], []
    handles = [
        register(module.get_submodule(name), log)
        for module, log in zip((fused, eager), logs, strict=True)
    ]
    _assert_same_step(fused, eager, _input(eager))
    for ours, expected in zip(*logs, strict=True):
        _assert_close(ours, expected)
    for handle in handles:
        handle.remove()
    assert _ops_of_a_step(fused) == Counter(WHOLE)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("add", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_parametrized_fcs(add: Callable[[nn.Module], Any]) -> None:
    eager, fused = _pair(conv=True)
    for module in (eager, fused):
        add(module.fc1)
        add(module.fc2)
    fused.load_state_dict(eager.state_dict())
    for _ in range(2):
        _assert_same_step(fused, eager, _input(eager))
    assert _ops_of_a_step(fused) == Counter(WHOLE)


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


@NORM_NAMES
def test_parametrized_norms(name: str) -> None:
    eager, fused = _pair(conv=True)
    for module in (eager, fused):
        parametrize.register_parametrization(module.get_submodule(name), "weight", Exponential())
    _assert_same_step(fused, eager, _input(eager))
    assert _ops_of_a_step(fused) == Counter(WHOLE)


def test_an_fc_that_computes_its_weight_in_a_hook() -> None:
    eager, fused = _pair(conv=True)
    spectral_norm(eager.fc1)
    fused.fc1 = copy.deepcopy(eager.fc1)
    for _ in range(2):
        _assert_same_step(fused, eager, _input(eager))


FCS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(nn.Conv2d(12, 12, 1, groups=2)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.Unflatten(1, (12, 1, 1))),
    "other groups": lambda: nn.Conv2d(12, 12, 1, groups=3),
    "3x3": lambda: nn.Conv2d(12, 12, 3, padding=1),
    "same padding": lambda: nn.Conv2d(12, 12, 1, groups=2, padding="same"),
    "with dropout": lambda: nn.Sequential(nn.Dropout(0.0), nn.Conv2d(12, 12, 1)),
    "nothing": nn.Identity,
}


@pytest.mark.parametrize("make", FCS.values(), ids=FCS)
def test_any_fc(make: Callable[[], nn.Module]) -> None:
    eager, fused = _pair(conv=True)
    eager.fc1 = make().double()
    fused.fc1 = copy.deepcopy(eager.fc1)
    _assert_same_step(fused, eager, _input(eager))
    assert _ops_of_a_step(fused) == Counter(BN0_PHASES)


# --- layouts, dtypes, copies


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("radix", [1, 2, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_conv_module(memory_format: torch.memory_format, radix: int, training: bool) -> None:
    options = {"stride": 2, "padding": 1, "radix": radix}
    eager, fused = _pair(conv=True, **options)
    for module in (eager, fused):
        module.to(memory_format=memory_format).train(training)
    for _ in range(2):
        x = _randn(4, 24, 9, 7).contiguous(memory_format=memory_format)
        _assert_same_step(fused, eager, x)
    assert fused(x).stride() == eager(x).stride()
    if x.is_cpu:  # cuDNN's convolutions in float64 are contiguous
        assert fused(x).is_contiguous(memory_format=memory_format)


def test_state_dict_goes_both_ways() -> None:
    for eager_class, fused_class, sizes in (
        (rf.SplitAttention, rf.FusedSplitAttention, (12,)),
        (rf.SplitAttentionConv2d, rf.FusedSplitAttentionConv2d, (4, 12, 3)),
    ):
        eager, fused = eager_class(*sizes), fused_class(*sizes)
        assert list(eager.state_dict()) == list(fused.state_dict())
        fused.load_state_dict(eager.state_dict())
        _assert_same_state(fused, eager)
        other = eager_class(*sizes)
        other.load_state_dict(fused_class(*sizes).state_dict())
        fused.load_state_dict(other.state_dict())
        _assert_same_state(fused, other)


@both_kinds
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way: str, norm_layer: NormLayer, conv: bool) -> None:
    _, fused = _pair(norm_layer, conv)
    x = _input(fused)
    fused(x).sum().backward()
    fused.eval()
    if way == "deepcopy":
        twin = copy.deepcopy(fused)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(fused)
    assert not twin.training
    assert torch.equal(twin(x), fused(x))
    with torch.no_grad():
        twin.fc2.weight.add_(torch.randn_like(twin.fc2.weight))
    assert not torch.equal(twin(x), fused(x))


def _assert_as_exact(fused: nn.Module, eager: nn.Module, run: Callable[..., Any]) -> None:
    """In 16 bits ``fused`` errs against float64 by at most 1.5 times what ``eager`` does.

    The median of several draws counts: in a single one, rounding may flip a ReLU in either.
    ``run`` gets a module and x in float64, and returns the same as :func:`_step`.
    """
    exact = copy.deepcopy(eager).double()
    errors: dict[str, list[tuple[float, float]]] = {}
    for _ in range(9):
        x = _input(eager, batch=8)
        found, expected, truth = run(fused, x), run(eager, x), _step(exact, x)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
        usual = square_errors(expected, truth)
        for kind, error in square_errors(found, truth).items():
            errors.setdefault(kind, []).append((error**0.5, usual[kind] ** 0.5))
    for kind, pairs in errors.items():
        ours, theirs = (median(values) for values in zip(*pairs, strict=True))
        assert ours <= 1.5 * theirs + torch.finfo(found["out"].dtype).eps, kind


@both_kinds
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_whole_module_in_another_dtype(
    dtype: torch.dtype, training: bool, norm_layer: NormLayer, conv: bool
) -> None:
    eager, fused = (module.to(dtype).train(training) for module in _pair(norm_layer, conv))
    _assert_as_exact(fused, eager, lambda module, x: _step(module, x.to(dtype)))
    for (name, ours), theirs in zip(
        fused.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        assert ours.dtype == theirs.dtype, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm1", [nn.BatchNorm2d, _group_norm], ids=["bn1", "group"])
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["bn0", "group"])
def test_autocast(norm_layer: NormLayer, norm1: NormLayer, training: bool) -> None:
    """conv gives bfloat16 under autocast; parameters and their gradients stay float32."""
    pair = _pair(norm_layer, conv=True, norm1=norm1)
    eager, fused = (module.float().train(training) for module in pair)

    def run(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        with torch.autocast(x.device.type, torch.bfloat16):
            return _step(module, x.float())

    _assert_as_exact(fused, eager, run)


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
def test_functional_call(norm_layer: NormLayer) -> None:
    _, fused = _pair(norm_layer, conv=True)
    fused.eval()
    x = _input(fused)
    other = {name: torch.randn_like(p) for name, p in fused.named_parameters()}
    out = torch.func.functional_call(fused, other, (x,))
    twin = copy.deepcopy(fused)
    twin.load_state_dict(fused.state_dict() | other)
    assert torch.equal(out, twin(x))
    assert not torch.equal(out, fused(x))


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
def test_on_meta(norm_layer: NormLayer) -> None:
    with torch.device("meta"):
        fused = rf.FusedSplitAttentionConv2d(4, 12, 3, inter_channels=12, norm_layer=norm_layer)
        out = fused(torch.empty(2, 4, 7, 7))
        out.sum().backward()
    assert out.device.type == "meta"
    assert out.shape == (2, 12, 5, 5)


def test_describes_itself() -> None:
    assert "channels=12, radix=3, cardinality=2" in repr(
        rf.FusedSplitAttention(12, radix=3, cardinality=2)
    )
