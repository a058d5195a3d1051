"""Classes that fuse does not know: true copies are proven and fused, others are left alone.

The quick tests take a split attention of this file's own. Those marked ``peers`` make copies of
the installed packages' sources under other names at run time, and change one line in some.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stand_ins import define, stub_mmcv
from test_fuse import assert_folds, features, randomise, reason_left_alone, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import resnest_fused as rf
from resnest_fused.fusing import proof, recognition


class Gate(nn.Module):
    """An r-softmax."""

    def __init__(self, radix: int, groups: int) -> None:
        super().__init__()
        self.radix, self.groups = radix, groups

    def forward(self, logits: Tensor) -> Tensor:
        if self.radix == 1:
            return logits.sigmoid()
        return logits.unflatten(1, (self.groups, self.radix, -1)).softmax(2).transpose(1, 2)


class Block(nn.Module):
    """A split attention of nobody's, whose norms may have any name."""

    def __init__(
        self, radix: int = 2, groups: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.radix, self.groups = radix, groups
        self.conv = nn.Conv2d(4, 8 * radix, 3, padding=1, groups=groups * radix, bias=False)
        self.norm0_name, self.norm1_name = "before", "between"
        self.before, self.between = norm(8 * radix), norm(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = nn.Conv2d(8, 8, 1, groups=groups)
        self.fc2 = nn.Conv2d(8, 8 * radix, 1, groups=groups)
        self.rsoftmax = Gate(radix, groups)

    @property
    def norm0(self) -> nn.Module:
        return getattr(self, self.norm0_name)

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    def before_gap(self, x: Tensor) -> Tensor:
        return self.relu(self.norm0(self.conv(x)))

    def logits(self, gap: Tensor) -> Tensor:
        return self.fc2(self.relu(self.norm1(self.fc1(gap))))

    def forward(self, x: Tensor) -> Tensor:
        splits = self.before_gap(x).unflatten(1, (self.radix, -1))
        attention = self.rsoftmax(self.logits(splits.sum(1).mean((2, 3), keepdim=True)))
        return (splits * attention.reshape(len(x), self.radix, -1, 1, 1)).sum(1)


def assert_same(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Both, in float64, give the same outputs, gradients and buffers, in eval and in training."""
    for training in (False, True):
        found, expected = (step(module, x, training) for module in (fused, plain))
        assert found.keys() == expected.keys()
        for name, truth in expected.items():
            if truth is None:
                assert found[name] is None, name
            else:
                torch.testing.assert_close(found[name], truth, rtol=1e-9, atol=1e-10, msg=name)


def assert_proven(module: nn.Module, x: Tensor) -> rf.FuseReport:
    """The module is fused after a proof, computes the same, and is itself again after unfuse."""
    module.double()
    plain, kind = copy.deepcopy(module), type(module)
    report = rf.fuse(module)
    assert len(report) == 1 and report.entries[0].proven, report
    assert_same(module, plain, x)
    rf.unfuse(module)
    assert type(module) is kind
    assert_same(module, plain, x)
    return report


@pytest.mark.parametrize(("radix", "groups"), [(1, 1), (2, 2), (4, 1)])
def test_a_true_copy_is_proven_and_fused(radix, groups):
    module = randomise(Block(radix, groups))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    report = rf.fuse(module)
    assert torch.equal(torch.get_rng_state(), state)
    rf.unfuse(module)
    assert_proven(module, features(8, 4, 6, 5))
    rf.fuse(module)
    (entry,) = report.entries
    assert (
        entry.proven and entry.kind == f"{__name__}.Block" and "proven and fused: 1" in str(report)
    )
    assert isinstance(module, Block) and rf.verify(module, features(4, 4, 5, 5).double())


def test_a_proof_takes_one_thread(restore_threads, monkeypatch):
    torch.set_num_threads(2)
    counted, read = [], proof.read
    monkeypatch.setattr(
        proof, "read", lambda *args: counted.append(torch.get_num_threads()) or read(*args)
    )
    proof._proven.clear()
    assert rf.fuse(Block()) and 1 in counted and torch.get_num_threads() == 2


def test_norms_swapped_later_are_read_at_each_call():
    plain = randomise(Block()).double()
    fused = copy.deepcopy(plain)
    assert rf.fuse(fused)
    for module in (plain, fused):
        torch.manual_seed(0)
        module.norm0_name = "gn0"
        module.gn0 = nn.GroupNorm(2, 16).double()
        module.between = nn.BatchNorm2d(8, eps=0.1).double()
    assert_same(fused, plain, features(8, 4, 6, 5))


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, lambda n: nn.GroupNorm(4, n), nn.Identity])
def test_any_norm(norm):
    report = rf.fuse(Block(norm=norm))
    assert report, report
    if norm is not nn.SyncBatchNorm:  # which PyTorch does not run on a CPU
        assert_proven(randomise(Block(norm=norm)), features(8, 4, 6, 5))


def test_a_norm_that_refuses_one_sample():
    """With one number a group, as PyTorch does."""
    assert rf.fuse(Block(norm=lambda n: nn.GroupNorm(8, n)))


def test_copies_and_pickles_of_a_fused_module():
    module = randomise(Block(2, 2)).eval()
    rf.fuse(module, backend="reference")
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    x = features(2, 4, 5, 5)
    for twin in (copy.copy(module), copy.deepcopy(module), torch.load(stream, weights_only=False)):
        assert type(twin) is type(module) and twin.backend == "reference"
        assert torch.equal(twin(x), module(x))
        rf.unfuse(twin)
        assert type(twin) is Block
        torch.testing.assert_close(twin(x), module(x))


def test_folding():
    assert_folds(randomise(Block(2, 2)).double(), features(2, 4, 5, 5).double(), norms=2)


def test_hooks_run_once_and_not_in_the_proof():
    module, ran = randomise(Block()), []
    for name in ("conv", "before", "fc1", "between", "rsoftmax", "fc2"):
        child = module.get_submodule(name)
        child.register_forward_hook(lambda *_, name=name: ran.append(name))
    module.register_forward_hook(lambda *_: ran.append("module"))
    proof._proven.clear()
    assert rf.fuse(module) and not ran
    module(features(2, 4, 5, 5))
    assert ran == ["conv", "before", "fc1", "between", "fc2", "rsoftmax", "module"]


def test_one_proof_for_a_class_and_configuration(monkeypatch):
    calls = []
    difference = proof.difference
    monkeypatch.setattr(proof, "difference", lambda *args: calls.append(1) or difference(*args))
    proof._proven.clear()
    model = nn.ModuleList([Block(), Block(), Block(2, 2), Block(), Block(2, 2)])
    model[1].conv = nn.Conv2d(4, 16, 1, stride=2)
    assert len(rf.fuse(model)) == 5 and len(calls) == 2
    model = nn.ModuleList([Block(), Block(norm=lambda n: nn.BatchNorm2d(n, eps=1e-3))])
    assert len(rf.fuse(model)) == 2 and len(calls) == 3


def test_a_module_on_the_meta_device():
    with torch.device("meta"):
        module = Block()
    assert rf.fuse(module)
    module.to_empty(device="cpu")
    randomise(module)
    assert rf.verify(module, features(4, 4, 5, 5))


class Pooled(Block):
    """Has children that only the whole forward runs: a pooling, and a softmax of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.rsoftmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        splits = self.before_gap(x).unflatten(1, (self.radix, -1))
        logits = self.logits(self.pool(splits.sum(1)))
        return (splits * self.rsoftmax(logits.unflatten(1, (self.radix, -1)))).sum(1)


class Named(Block):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features)


def test_a_tensor_of_another_name():
    module, x = Named().eval(), features(2, 4, 5, 5)
    expected = module(x)
    assert rf.fuse(module)
    for found in (module(x), module(features=x)):
        torch.testing.assert_close(found, expected)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features=x), module(x))
    with pytest.raises(TypeError, match="missing a required argument: 'features'"):
        module()


class OneNorm(Block):
    """Its two norms are one, whose statistics are moved twice."""

    def __init__(self) -> None:
        super().__init__(radix=1)
        self.before = self.between


def test_one_norm_in_two_places():
    assert_proven(randomise(OneNorm()), features(8, 4, 6, 5))
    assert_folds(randomise(OneNorm()).double(), features(2, 4, 5, 5).double(), norms=2)
    module = OneNorm().eval()
    rf.fuse(module, fold=True)
    rf.unfuse(module)
    assert module.before is module.between


def test_children_that_no_part_of_the_op_calls():
    module = randomise(Pooled()).double().eval()
    plain, x = copy.deepcopy(module), features(2, 4, 5, 5).double()
    assert rf.fuse(module)
    torch.testing.assert_close(module(x), plain(x))
    ran = []
    module.pool.register_forward_hook(lambda *_: ran.append("pool"))
    torch.testing.assert_close(module(x), plain(x))
    assert ran == ["pool"]
    plain.rsoftmax, module.rsoftmax = nn.Softmin(dim=1), nn.Softmin(dim=1)
    torch.testing.assert_close(module(x), plain(x))


class Dead(Block):
    def logits(self, gap: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(gap)))


class DeadBefore(Block):
    def before_gap(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Late(Block):
    """Its convolution is not in front of what it is taken to be in front of."""

    def before_gap(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(self.norm0(x)))


class Detached(Block):
    def logits(self, gap: Tensor) -> Tensor:
        return super().logits(gap.detach())


class Offset(Block):
    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Clamped(Block):
    """Like a ReLU6 but for where it ends."""

    def logits(self, gap: Tensor) -> Tensor:
        return self.fc2(self.relu(self.norm1(self.fc1(gap))).clamp(max=30))


class OfOne(Block):
    """As where squeeze() takes the batch away, too."""

    def logits(self, gap: Tensor) -> Tensor:
        logits = super().logits(gap)
        return logits.flip(1) if len(gap) == 1 else logits


class OfLargeMaps(Block):
    def before_gap(self, x: Tensor) -> Tensor:
        splits = super().before_gap(x)
        return splits * 0.5 if x.shape[-1] > 14 else splits


class WithoutGradients(Block):
    def logits(self, gap: Tensor) -> Tensor:
        return super().logits(gap if torch.is_grad_enabled() else 2 * gap)


class TrainedWithoutGradients(Block):
    def logits(self, gap: Tensor) -> Tensor:
        doubled = self.training and not torch.is_grad_enabled()
        return super().logits(2 * gap if doubled else gap)


class OfWideMaps(Block):
    def before_gap(self, x: Tensor) -> Tensor:
        splits = super().before_gap(x)
        return splits * 0.5 if splits.size(-1) >= 640 else splits


class OfManyPixels(Block):
    def before_gap(self, x: Tensor) -> Tensor:
        (_, _, height, width), splits = x.shape, super().before_gap(x)
        return splits * 0.5 if height * width > 1e6 else splits


class OfElevenWhenTrained(Block):
    def logits(self, gap: Tensor) -> Tensor:
        logits = super().logits(gap)
        return logits.flip(1) if self.training and gap.shape[:1] == (11,) else logits


class OfEvenMaps(Block):
    def before_gap(self, x: Tensor) -> Tensor:
        return super().before_gap(x) * (1 + x.shape[2] // 100 % 2)


class OfHugeNumbers(Block):
    def before_gap(self, x: Tensor) -> Tensor:
        return super().before_gap(x if x.max() < 1e9 else x / 2)


class OfLongBatches(Block):
    def logits(self, gap: Tensor) -> Tensor:
        logits = super().logits(gap)
        return logits if len(gap) < 64 else 2 * logits


class Keeping(Block):
    """Keeps its attention in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def logits(self, gap: Tensor) -> Tensor:
        self.kept.append(super().logits(gap))
        return self.kept[-1]


class Refusing(Block):
    """No class may derive from it."""

    def __init_subclass__(cls) -> None:
        raise RuntimeError("this class is final")


def _lazy() -> Block:
    module = Block()
    module.extra = nn.LazyLinear(3)
    return module


class WithItsAttention(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x


class ByItsOwnMode(Block):
    """Its norm is called as a function, in the mode of the module."""

    def before_gap(self, x: Tensor) -> Tensor:
        x, n = self.conv(x), self.before
        if self.training:
            n.num_batches_tracked.add_(1)
        parts = n.running_mean, n.running_var, n.weight, n.bias
        return self.relu(F.batch_norm(x, *parts, self.training, n.momentum, n.eps))


MUTANTS = {
    Dead: "off by",
    Clamped: "in eval: outputs, in float64 off by",
    OfOne: "in eval: outputs, in float64 off by",
    OfLargeMaps: "in eval: outputs, in float64 off by",
    WithoutGradients: "in eval: outputs, in float64 off by",
    TrainedWithoutGradients: "in training: ",
    OfWideMaps: "asks whether a size of its input is at least 640, and may decide by that",
    OfManyPixels: "asks whether a size of its input is more than 1000000.0, ",
    OfElevenWhenTrained: "asks whether a size of its input is equal to 11, ",
    OfEvenMaps: "asks whether a size of its input is a multiple of 2, ",
    OfHugeNumbers: "asks for values of its input, ",
    OfLongBatches: "asks whether a size of its input is less than 64, ",
    Keeping: "its forward sets kept, which the op would not",
    Refusing: "its class refuses a subclass: RuntimeError: this class is final",
    _lazy: "it has lazy parameters; call the model once before",
    WithItsAttention: "its forward returns a tuple, expected a tensor",
    ByItsOwnMode: "in training with norms in eval: ",
    DeadBefore: "off by",
    Late: "off by",
    Detached: "parameter gradients",
    Offset: r"its forward takes (x",
}


@pytest.mark.parametrize(
    ("kind", "reason"), MUTANTS.items(), ids=lambda kind: getattr(kind, "__name__", kind)
)
def test_what_computes_something_else_is_left_alone(kind, reason):
    assert reason in reason_left_alone(kind())


class Asking(Block):
    """Asks what any size answers alike, and what depends on its features."""

    def before_gap(self, x: Tensor) -> Tensor:
        splits = super().before_gap(x)
        if splits.shape[2:] != x.shape[2:] or x.shape[1] % 4 or x.numel() == 0:
            raise ValueError(f"expected features in fours, got {tuple(x.shape)}")
        return splits


def test_harmless_questions():
    assert_proven(randomise(Asking()), features(8, 4, 6, 5))


class Cooled(Block):
    """Divides its logits by a temperature, which a training may lower."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self._is_ready = False

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    @is_ready.setter
    def is_ready(self, value: bool) -> None:
        self._is_ready = value

    def logits(self, gap: Tensor) -> Tensor:
        return super().logits(gap) / self.temperature


@pytest.mark.parametrize("compiled", [False, True])
def test_an_attribute_that_is_set_later_counts(compiled):
    module, x = randomise(Cooled()).double().eval(), features(4, 4, 6, 5).double()
    plain = copy.deepcopy(module)
    assert rf.fuse(module)
    called = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    module.temperature = 1.0  # as before
    module.note, module.is_ready = "new", True  # as MMEngine's init_weights does
    module.train().eval().register_full_backward_hook(lambda *_: None)
    assert "runs unfused" not in str(rf.fuse(module))
    torch.testing.assert_close(called(x), plain(x))
    module.temperature = plain.temperature = 3.0
    torch.testing.assert_close(called(x), plain(x))
    assert "temperature was set, so it runs unfused" in str(rf.fuse(module))
    rf.unfuse(module)
    assert not vars(module).keys() & {"_changed_attribute", "backend", "_unfused_class"}
    assert "it would compute something else" in str(rf.fuse(module))


def test_a_module_that_was_compiled():
    module = randomise(Block()).eval()
    plain, x = copy.deepcopy(module), features(2, 4, 5, 5)
    module.compile(backend="eager")
    assert rf.fuse(module).entries[0].proven
    torch.testing.assert_close(module(x), plain(x))


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_a_model_with_a_scripted_module():
    scripted = torch.jit.trace(Block().eval(), features(1, 4, 3, 3))
    assert len(rf.fuse(nn.ModuleList([scripted, Block()]))) == 1


def test_no_proof_on_fake_tensors():
    with FakeTensorMode():
        report = rf.fuse(nn.Sequential(Block(norm=partial(nn.BatchNorm2d, eps=0.2))))
    assert not report and "it cannot be tried out: DataDependent" in str(report)


def test_a_method_that_is_replaced_between_two_proofs(monkeypatch):
    assert rf.fuse(Asking())
    logits = Block.logits
    monkeypatch.setattr(Block, "logits", lambda self, gap: 1.01 * logits(self, gap))
    assert "off by" in reason_left_alone(Asking())


class Unused(Block):
    """Its norms are nothing, and it calls only one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0, self.bn1 = nn.Identity(), nn.Identity()

    def before_gap(self, x: Tensor) -> Tensor:
        return self.relu(self.bn0(self.conv(x)))

    def logits(self, gap: Tensor) -> Tensor:
        return self.fc2(self.relu(self.fc1(gap)))


class Used(Unused):
    def logits(self, gap: Tensor) -> Tensor:
        return self.fc2(self.relu(self.bn1(self.fc1(gap))))


def test_a_norm_that_takes_the_place_of_nothing_later():
    assert "off by" in reason_left_alone(Unused())
    plain = randomise(Used()).double()
    fused = copy.deepcopy(plain)
    assert rf.fuse(fused)
    for module in (plain, fused):
        module.bn0, module.bn1 = nn.BatchNorm2d(16).double(), nn.BatchNorm2d(8).double()
    assert_same(fused, plain, features(8, 4, 6, 5))


def test_no_proof_while_hooks_for_all_modules_are_registered():
    """Then everything is called, and the proof would prove nothing."""
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "hooks for all modules are registered" in reason_left_alone(Dead())
    finally:
        handle.remove()
    assert "off by" in reason_left_alone(Dead())


def test_verify_proves_too(monkeypatch):
    """With a fresh norm, in eval, a dead one is not seen on the model's own inputs."""
    module, x = Block().eval(), features(2, 4, 5, 5)
    assert rf.fuse(module)
    layout = type(module)._layout
    monkeypatch.setattr(type(module), "_layout", layout._replace(bn0=None))
    with torch.no_grad():
        (entry,) = rf.verify(module, x).entries
    assert "bn" not in str(entry.failed) and not entry.passed
    assert "compute something else, in eval: " in entry.disproof and entry.disproof in str(entry)


def test_a_copy_that_cannot_run_alone_is_left_alone():
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("no licence")

    assert reason_left_alone(Broken()) == (
        "it cannot be tried out: the unfused module raised OSError in float64: no licence"
    )


def test_a_part_of_a_module_left_alone_is_looked_at():
    class Twice(Block):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Sequential(nn.Conv2d(4, 4, 1), Block(), nn.Conv2d(8, 16, 1))

        def logits(self, gap: Tensor) -> Tensor:
            return 2 * super().logits(gap)

    report = rf.fuse(Twice())
    assert [(entry.name, entry.fused) for entry in report.entries] == [
        ("", False),
        ("conv.1", True),
    ]


def test_the_compiler_sees_no_break():
    for module, x in ((Pooled(), features(2, 4, 5, 5)), (AnyMap(3), torch.randn(2, 4, 3, 2, 2))):
        rf.fuse(module.eval())
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))


# --- registered classes, and attention around any MLP


class Foreign(nn.Module):
    """Its parts have names that nobody else gives them, and its activations are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = 2
        self.body = nn.ModuleDict({"conv": nn.Conv2d(4, 16, 1), "norm": nn.BatchNorm2d(16)})
        self.squeeze, self.squeezed = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.expand = nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        splits = F.elu(self.body["norm"](self.body["conv"](x))).chunk(2, 1)
        gap = (splits[0] + splits[1]).mean((2, 3))
        logits = self.expand(F.relu(self.squeezed(self.squeeze(gap))))
        weights = logits.unflatten(1, (2, 8)).softmax(1)[..., None, None]
        return splits[0] * weights[:, 0] + splits[1] * weights[:, 1]


NAMES: dict[str, Any] = {
    "conv": "body.conv",
    "bn0": "body.norm",
    "act0": F.elu,
    "fc1": "squeeze",
    "bn1": "squeezed",
    "fc2": "expand",
    "radix": "splits",
}


@pytest.fixture
def registered(monkeypatch):
    """The classes that are registered; those of a test are forgotten."""
    monkeypatch.setattr(recognition, "_registered", {})
    return recognition._registered


def test_register(registered):
    assert not rf.fuse(Foreign()).entries
    rf.register(Foreign, **NAMES)
    assert_proven(Foreign(), features(8, 4, 5, 4))
    assert_folds(randomise(Foreign()).double(), features(4, 4, 5, 4).double(), norms=1)
    module = Foreign()
    rf.fuse(module)
    torch.save(module, stream := io.BytesIO())
    stream.seek(0)
    assert rf.verify(torch.load(stream, weights_only=False), features(4, 4, 5, 4))


def test_a_wrong_registration(registered):
    rf.register(Foreign, **NAMES | {"act0": F.relu})
    assert "off by" in reason_left_alone(Foreign())
    rf.register(Foreign, **NAMES | {"bn1": "norm"})
    assert reason_left_alone(Foreign()).startswith("not as registered: 'Foreign' object has no")
    wrong = {
        "radix": [("splits.", ValueError), (0, ValueError), (2.0, TypeError), (True, TypeError)],
        "cardinality": [(None, TypeError)],
        "fc1": [(None, TypeError), ("", ValueError)],
        "bn0": [(F.relu, TypeError)],
        "act1": [(3, TypeError)],
    }
    for name, values in wrong.items():
        for value, error in values:
            with pytest.raises(error, match=f"{name}: expected "):
                rf.register(Foreign, **NAMES | {name: value})
    with pytest.raises(TypeError, match=r"kind: expected a subclass of torch\.nn\.Module, got "):
        rf.register(Foreign(), **NAMES)
    assert registered[Foreign].bn1 == ("norm",)  # as before


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attend_around_any_mlp(backend):
    fc1, fc2 = nn.Conv2d(4, 6, 1).double(), nn.Conv2d(6, 8, 1).double()
    x = features(3, 8, 5, 4).double().requires_grad_()

    def mlp(gap: Tensor) -> Tensor:
        return fc2(F.silu(fc1(gap)))

    splits = x.unflatten(1, (2, 4))
    logits = mlp(splits.sum(1).mean((2, 3), keepdim=True)).unflatten(1, (2, 4))
    for softmax in (None, lambda logits: logits.tanh()):
        weights = logits.softmax(1) if softmax is None else logits.tanh()
        expected = (splits * weights).sum(1)
        found = rf.attend(x, mlp, softmax, radix=2, backend=backend)
        tensors = [x, *fc1.parameters(), *fc2.parameters()]
        pairs = [
            torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
            for out in (found, expected)
        ]
        for a, b in zip((found, *pairs[0]), (expected, *pairs[1]), strict=True):
            torch.testing.assert_close(a, b)


def test_attend_refuses_by_name():
    x = torch.randn(2, 8, 3, 3)
    with pytest.raises(TypeError, match="mlp: expected a function, got Tensor"):
        rf.attend(x, x, radix=2)
    with pytest.raises(TypeError, match="logits: expected a tensor, got NoneType"):
        rf.attend(x, lambda gap: None, radix=2)
    with pytest.raises(TypeError, match="attention: expected a tensor, got int"):
        rf.attend(x, lambda gap: torch.cat((gap, gap), 1), lambda logits: 3, radix=2)
    with pytest.raises(
        ValueError, match=r"logits: expected shape \(2, 8, 1, 1\), got \(2, 4, 1, 1\)"
    ):
        rf.attend(x, lambda gap: gap, radix=2)


# --- maps of one and three dimensions


class AnyMap(nn.Module):
    """Split attention over maps of any dimensions; the FCs are linear for one dimension."""

    def __init__(self, dimensions: int, norm: Any = None, act: Any = nn.ReLU) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = norm or (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.radix, self.linear = 2, dimensions == 1
        self.conv, self.bn0, self.relu = conv(4, 16, 3, padding=1), norm(16), act()
        fc = (lambda i, o: nn.Linear(i, o)) if self.linear else (lambda i, o: conv(i, o, 1))
        self.fc1, self.bn1, self.fc2 = fc(8, 6), norm(6), fc(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        splits = self.relu(self.bn0(self.conv(x))).unflatten(1, (2, 8))
        size = splits.dim() - 3
        gap = splits.sum(1).flatten(2).mean(2)
        gap = gap if self.linear else gap.reshape(*gap.shape, *[1] * size)
        logits = self.fc2(self.relu(self.bn1(self.fc1(gap))))
        attention = logits.reshape(-1, 2, 8, *[1] * size).softmax(1)
        return (splits * attention).sum(1)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize(("dimensions", "size"), [(1, (7,)), (2, (4, 3)), (3, (3, 2, 4))])
def test_maps_of_other_dimensions(dimensions, size, act):
    module = AnyMap(dimensions, act=act)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    assert_proven(module, torch.randn(6, 4, *size))


# --- copies of the packages' classes


OFFICIAL, TIMM, OPENMMLAB = (
    "resnest.torch.splat",
    "timm.layers.split_attn",
    "mmpretrain.models.backbones.resnest",
)
CLASSES = {OFFICIAL: "SplAtConv2d", TIMM: "SplitAttn", OPENMMLAB: "SplitAttentionConv2d"}


def source_of(module: str) -> str:
    """The source of one file of a package, which need not be imported for that."""
    package, _, path = module.partition(".")
    root = importlib.util.find_spec(package).submodule_search_locations[0]
    with open(f"{root}/{path.replace('.', '/')}.py") as file:
        source = file.read()
    if module == TIMM:
        return source.replace("from .", "from timm.layers.")
    if module == OPENMMLAB:
        stub_mmcv()
        # The class and its softmax alone: the rest of the file needs the whole package.
        body = source[source.index("class RSoftmax") : source.index("class Bottleneck")]
        head = "import torch, torch.nn as nn, torch.nn.functional as F\n"
        return f"{head}from mmcv.cnn import build_conv_layer, build_norm_layer\n{body}"
    return source


def pasted(module: str, *changes: tuple[str, str]) -> ModuleType:
    """A copy of the package's file under another name, with some text replaced."""
    source = source_of(module)
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return define("pasted_split_attention", source)


def build(module: str, file: ModuleType, radix: int = 2, groups: int = 2) -> nn.Module:
    options: dict[str, Any] = {"radix": radix, "groups": groups, "padding": 1}
    if module != OPENMMLAB:
        options["norm_layer"] = nn.BatchNorm2d
    return randomise(getattr(file, CLASSES[module])(8, 8, 3, **options))


@pytest.mark.peers
@pytest.mark.parametrize("module", CLASSES)
def test_pasted_copies(module):
    file = pasted(module)
    for radix, groups in ((1, 1), (2, 1), (2, 2), (4, 2)):
        assert_proven(build(module, file, radix, groups), features(8, 8, 6, 5))
    report = rf.fuse(build(module, file))
    assert "proven and fused: 1 pasted_split_attention." in str(report)
    assert_folds(build(module, file).double(), features(2, 8, 5, 5).double(), norms=2)


NORM = "F.batch_norm(%s, n.running_mean, n.running_var, n.weight, n.bias, %s)"


def norm_by(name: str, value: str, rest: str) -> tuple[str, str]:
    """The call of a norm instead of which PyTorch's function is called."""
    old = f"{value} = self.{name}({value})"
    return old, f"n = self.{name}; {value} = {NORM % (value, rest)}"


COUNT = "(n.num_batches_tracked.add_(1) if self.training else None); "
# One line each of the official file, by what becomes of it.
OF_OFFICIAL = {
    "bn0 dead": ("x = self.bn0(x)", "pass"),
    "bn1 dead": ("gap = self.bn1(gap)", "pass"),
    "bn0 twice": ("x = self.bn0(x)", "x = self.bn0(self.bn0(x))"),
    "bn0 after the relu": ("x = self.bn0(x)", "x = self.bn0(F.relu(x))"),
    "bn0 with another eps": norm_by("bn0", "x", "self.training, 0.1, 2e-5"),
    "bn1 with another eps": norm_by("bn1", "gap", "self.training, 0.1, 2e-5"),
    "bn1 always by running statistics": norm_by("bn1", "gap", "False"),
    "bn0 always by the batch": norm_by("bn0", "x", "True"),
    "bn1 with another momentum": norm_by("bn1", "gap", "self.training, 0.2"),
    "bn1 does not count": norm_by("bn1", "gap", "self.training"),
    "bn0 without shift": ("x = self.bn0(x)", "x = self.bn0(x) - self.bn0.bias.view(-1, 1, 1)"),
    "no relu in front": ("        x = self.relu(x)\n", ""),
    "no relu between": ("        gap = self.relu(gap)\n", ""),
    "silu in front": ("x = self.relu(x)", "x = F.silu(x)"),
    "silu between": ("gap = self.relu(gap)", "gap = F.silu(gap)"),
    "leaky relu in front": ("x = self.relu(x)", "x = F.leaky_relu(x, 1e-3)"),
    "leaky relu between": ("gap = self.relu(gap)", "gap = F.leaky_relu(gap, 1e-3)"),
    "relu6 between": ("gap = self.relu(gap)", "gap = F.hardtanh(gap, 0, 1)"),
    "gelu in front": ("x = self.relu(x)", "x = F.gelu(x)"),
    "max pooling": ("F.adaptive_avg_pool2d(gap, 1)", "F.adaptive_max_pool2d(gap, 1)"),
    "scaled gap": ("gap = self.fc1(gap)", "gap = self.fc1(1.001 * gap)"),
    "gap of the mean over radix": ("gap = sum(splited) ", "gap = sum(splited) / self.radix"),
    "gap of one split": ("gap = sum(splited) ", "gap = splited[0]"),
    "gap of 49 pixels": ("F.adaptive_avg_pool2d(gap, 1)", "gap.sum((2, 3), keepdim=True) / 49"),
    "gap of the batch": ("gap = self.fc1(gap)", "gap = self.fc1(gap.mean(0, True).expand_as(gap))"),
    "gap detached": ("gap = self.fc1(gap)", "gap = self.fc1(gap.detach())"),
    "attention detached": ("atten = self.fc2(gap)", "atten = self.fc2(gap).detach()"),
    "softmax over cardinality": ("F.softmax(x, dim=1)", "F.softmax(x, dim=2)"),
    "softmax over channels": ("F.softmax(x, dim=1)", "F.softmax(x, dim=3)"),
    "softmax over the batch": ("F.softmax(x, dim=1)", "F.softmax(x, dim=0)"),
    "sharper softmax": ("F.softmax(x, dim=1)", "F.softmax(1.001 * x, dim=1)"),
    "sigmoid": ("F.softmax(x, dim=1)", "torch.sigmoid(x)"),
    "softmin": ("F.softmax(x, dim=1)", "F.softmin(x, dim=1)"),
    "cardinality not transposed": (".transpose(1, 2)\n", "\n"),
    "radix and cardinality swapped": (
        "x.view(batch, self.cardinality, self.radix, -1)",
        "x.view(batch, self.radix, self.cardinality, -1)",
    ),
    "a last relu": ("return out.contiguous()", "return F.relu(out - 0.01)"),
    "scaled output": ("return out.contiguous()", "return 1.00001 * out"),
    "rounded output": ("return out.contiguous()", "return out.float().to(out)"),
    "splits the other way round": ("zip(attens, splited)", "zip(attens[::-1], splited)"),
    "no bias of fc1": ("gap = self.fc1(gap)", "gap = self.fc1(gap) - self.fc1.bias.view(-1, 1, 1)"),
    "no bias of fc2": (
        "atten = self.fc2(gap)",
        "atten = self.fc2(gap) - self.fc2.bias.view(-1, 1, 1)",
    ),
    "relu before conv": ("x = self.conv(x)", "x = self.conv(F.relu(x))"),
    "residual": ("x = self.conv(x)", "x = self.conv(x) + 0.01 * self.conv(x).mean()"),
    "dropout": ("gap = self.fc1(gap)", "gap = self.fc1(F.dropout(gap, 0.1, self.training))"),
    "in training alone": (
        "gap = self.fc1(gap)",
        "gap = self.fc1(gap) * (1 + 0.01 * self.training)",
    ),
    "an argument more": (
        "def forward(self, x):\n        x = self",
        "def forward(self, x, o=None):\n        x = self",
    ),
}
OF_TIMM = {
    "bn0 dead": ("x = self.bn0(x)", "pass"),
    "bn1 dead": ("x_gap = self.bn1(x_gap)", "pass"),
    "no relu in front": ("        x = self.act0(x)\n", ""),
    "no relu between": ("        x_gap = self.act1(x_gap)\n", ""),
    "relu between in front": ("x = self.act0(x)", "x = F.silu(x)"),
    "max pooling": ("x_gap.mean((2, 3), keepdim=True)", "x_gap.amax((2, 3), keepdim=True)"),
    "softmax over the wrong axis": ("F.softmax(x, dim=1)", "F.softmax(x, dim=2)"),
    "mean over radix": ("x_gap = x.sum(dim=1)", "x_gap = x.mean(dim=1)"),
}
OF_OPENMMLAB = {
    "bn0 dead": ("x = self.norm0(x)", "pass"),
    "bn1 dead": ("gap = self.norm1(gap)", "pass"),
    "no relu in front": ("        x = self.relu(x)\n", ""),
    "no relu between": ("        gap = self.relu(gap)\n", ""),
    "max pooling": ("F.adaptive_avg_pool2d(gap, 1)", "F.adaptive_max_pool2d(gap, 1)"),
    "softmax over the wrong axis": ("F.softmax(x, dim=1)", "F.softmax(x, dim=2)"),
    "scaled gap": ("gap = self.fc1(gap)", "gap = self.fc1(1.001 * gap)"),
}
OF_PEERS = [
    (module, name, change)
    for module, changes in ((OFFICIAL, OF_OFFICIAL), (TIMM, OF_TIMM), (OPENMMLAB, OF_OPENMMLAB))
    for name, change in changes.items()
]


@pytest.mark.peers
@pytest.mark.parametrize("module", CLASSES)
def test_copies_with_one_line_changed_are_left_alone(module):
    """The norms are as built: only the proof's random ones show which of them are dead."""
    for peer, name, change in OF_PEERS:
        if peer == module:
            mutant = build(module, pasted(module, change), radix=4)
            report = rf.fuse(mutant)
            assert not report and len(report.left_alone) == 1, name
            reason = report.left_alone[0].reason
            assert ("off by" in reason) != (name == "an argument more"), (name, reason)


class Buffered(nn.Module):
    """Squeeze-and-excitation with a buffer that counts, or one that changes its input."""

    def __init__(self, in_place: bool, keeps: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.act, self.gate = nn.ReLU(), nn.Sigmoid()
        self.in_place, self.keeps = in_place, keeps
        self.register_buffer("k", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))
        if self.keeps:
            self.last = gate
            return x * gate
        return x.mul_(gate) if self.in_place else x * gate * self.k


@pytest.mark.parametrize("in_place", [False, True])
def test_a_buffer_that_counts_and_a_change_in_place_are_left_alone(in_place: bool) -> None:
    """A checkpoint may bring another value, and the caller may read its tensor again."""
    model = nn.Sequential(Buffered(in_place))
    report = rf.fuse(model)
    assert type(model[0]) is Buffered
    assert ("in place" if in_place else "fused it would compute something else") in str(report)


def test_a_registered_radix_that_is_no_attribute() -> None:
    class Reading(Buffered):
        """Registered with a name that its modules lack."""

    rf.register(Reading, fc1="fc1", fc2="fc2", radix="splits")
    report = rf.fuse(nn.Sequential(Reading(in_place=False)))
    assert "not as registered: 'Reading' object has no attribute 'splits'" in str(report)


def test_a_forward_that_keeps_its_attention_is_left_alone() -> None:
    model = nn.Sequential(Buffered(in_place=False, keeps=True))
    assert "its forward sets last, which the op would not" in str(rf.fuse(model))
    assert type(model[0]) is Buffered
