"""fuse on split attention's ancestors: squeeze-and-excitation, alone and in blocks, and SK.

Squeeze-and-excitation is split attention of radix 1, and selective kernels (SK) are one whose
splits come from paths of their own. The modules here are nobody's; test_packages.py has peers'.
"""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_any_class import assert_proven, assert_same, registered
from test_fuse import assert_folds, features, randomise, reason_left_alone
from torch import Tensor, nn

import resnest_fused as rf

__all__ = ["registered"]  # a fixture


class Excitation(nn.Module):
    """Squeeze-and-excitation with 1x1 convolutions."""

    def __init__(self, act: Any = nn.ReLU, gate: Any = nn.Sigmoid, norm: Any = nn.Identity) -> None:
        super().__init__()
        self.fc1, self.bn, self.act = nn.Conv2d(8, 4, 1), norm(4), act()
        self.fc2, self.gate = nn.Conv2d(4, 8, 1), gate()

    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def _attention(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.act(self.bn(self.fc1(self.squeeze(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self._attention(x)


class Sequence(nn.Module):
    """The same over maps of any dimensions, with linear layers in a Sequential."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.avg_pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[
            dimensions - 1
        ](1)
        self.fc = nn.Sequential(
            nn.Linear(8, 3, bias=False), nn.ReLU(), nn.Linear(3, 8, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        attention = self.fc(self.avg_pool(x).flatten(1))
        return x * attention.reshape(*x.shape[:2], *[1] * (x.dim() - 2))


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_squeeze_and_excitation(norm):
    assert_proven(randomise(Excitation(norm=norm)), features(6, 8, 5, 4))


@pytest.mark.parametrize("size", [(7,), (4, 3), (3, 2, 4)])
def test_linear_layers_and_maps_of_other_dimensions(size):
    assert_proven(randomise(Sequence(len(size))), torch.randn(6, 8, *size))


def test_folding():
    module = randomise(Excitation(norm=nn.BatchNorm2d)).double()
    assert_folds(module, features(2, 8, 5, 5).double(), norms=1)


def test_what_is_between_its_layers_later():
    """Another activation and another gate than when it was fused."""
    plain = randomise(Excitation()).double()
    fused, x = copy.deepcopy(plain), features(6, 8, 5, 4)
    assert rf.fuse(fused)
    for module in (plain, fused):
        module.act = nn.SiLU()
    assert_same(fused, plain, x)
    for module in (plain, fused):
        module.gate = nn.Tanh()
    assert_same(fused, plain, x)


class MaxToo(Excitation):
    def squeeze(self, x: Tensor) -> Tensor:
        return super().squeeze(x) + x.amax((2, 3), keepdim=True)


class Scaled(Excitation):
    def squeeze(self, x: Tensor) -> Tensor:
        return 1.001 * super().squeeze(x)


class Residual(Excitation):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Detached(Excitation):
    def squeeze(self, x: Tensor) -> Tensor:
        return super().squeeze(x.detach())


class Doubled(nn.Sigmoid):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


ANOTHER = {
    "off by": [MaxToo, Scaled, Residual, Detached, lambda: Excitation(gate=Doubled)],
    "its gate is Hardsigmoid, expected a sigmoid or a softmax": [
        lambda: Excitation(gate=nn.Hardsigmoid)
    ],
    "its activation is SiLU: the op would be slower on small maps": [
        lambda: Excitation(act=nn.SiLU)
    ],
}


@pytest.mark.parametrize(
    ("reason", "make"), [(reason, make) for reason, all in ANOTHER.items() for make in all]
)
def test_what_is_left_alone(reason, make):
    assert reason in reason_left_alone(make())


def test_another_activation_as_registered(registered):
    names = {"fc1": "fc1", "bn1": "bn", "act1": "act", "fc2": "fc2", "radix": 1}
    rf.register(Excitation, **names)
    assert_proven(randomise(Excitation(act=nn.SiLU)), features(6, 8, 5, 4))
    rf.register(Sequence, fc1="fc.0", act1="fc.1", fc2="fc.2", radix=1)
    assert_proven(randomise(Sequence(2)), features(6, 8, 5, 4))


class Mlp(nn.Module):
    """Two layers, with a gate that is another layer or without one."""

    def __init__(self, gate: bool, kernel_size: int = 1) -> None:
        super().__init__()
        self.fc1, self.act = nn.Conv2d(8, 4, kernel_size), nn.ReLU()
        self.fc2 = nn.Conv2d(4, 8, kernel_size)
        if gate:
            self.gate = nn.Sigmoid() if kernel_size > 1 else nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def test_what_is_no_squeeze_and_excitation_is_not_reported():
    model = nn.ModuleList([Mlp(False), Mlp(True), Mlp(True, 3), nn.Conv2d(3, 3, 1)])
    assert not rf.fuse(model).entries


# --- selective kernels


class Squeeze(nn.Module):
    """Makes the attention of the paths, and not more."""

    def __init__(self, paths: int) -> None:
        super().__init__()
        self.paths = paths
        self.fc_reduce, self.bn, self.act = (
            nn.Conv2d(8, 6, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
        )
        self.fc_select = nn.Conv2d(6, 8 * paths, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.fc_select(self.act(self.bn(self.fc_reduce(x.sum(1).mean((2, 3), True)))))
        return logits.unflatten(1, (self.paths, 8)).softmax(1)


class Selective(nn.Module):
    """SK over paths that divide the input's channels, or have all of them."""

    def __init__(self, paths: int = 2, split_input: bool = False, stride: int = 1) -> None:
        super().__init__()
        self.split_input = split_input
        self.width = 4 if split_input else 4 * paths
        self.paths = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(self.width, 8, 3, stride, padding=1 + i, dilation=1 + i),
                nn.BatchNorm2d(8),
                nn.ReLU(),
            )
            for i in range(paths)
        )
        self.attn = Squeeze(paths)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.width, 1) if self.split_input else [x] * len(self.paths)
        splits = torch.stack([path(part) for path, part in zip(self.paths, parts, strict=True)], 1)
        return (splits * self.attn(splits)).sum(1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("split_input", [False, True])
@pytest.mark.parametrize("paths", [2, 3])
def test_selective_kernels(paths, split_input, stride):
    module = randomise(Selective(paths, split_input, stride))
    assert_proven(module, features(6, 4 * paths, 7, 6))


def test_selective_kernels_fold():
    assert_folds(randomise(Selective()).double(), features(2, 8, 6, 5).double(), norms=3)


def test_hooks_on_paths_and_on_what_the_op_replaces():
    module, ran = randomise(Selective()), []
    assert rf.fuse(module)
    for name in ("paths.0", "paths.1.1", "attn.bn", "attn"):
        child = module.get_submodule(name)
        child.register_forward_hook(lambda *_, name=name: ran.append(name))
        module(features(2, 8, 5, 5))
    first, second = "paths.0", "paths.1.1"
    assert ran == [first, first, second, first, second, "attn.bn", first, second, "attn.bn", "attn"]


class Crossed(Selective):
    def forward(self, x: Tensor) -> Tensor:
        splits = torch.stack([path(x) for path in self.paths][::-1], 1)
        return (splits * self.attn(splits)).sum(1)


def test_paths_in_another_order_are_left_alone():
    assert "off by" in reason_left_alone(Crossed())


# --- squeeze-and-excitation in a block, whose norm and ReLU in front the op takes, too


class Block(nn.Module):
    """A bottleneck; the norm and ReLU are part of ``conv2``."""

    def __init__(self, stride: int = 1, act: Any = nn.ReLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 1)
        conv = nn.Conv2d(8, 8, 3, stride, padding=1, groups=2)
        self.conv2 = nn.Sequential(conv, nn.BatchNorm2d(8), act())
        self.drop, self.blur = nn.Identity(), None
        self.se = Excitation()
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.shortcut = nn.Conv2d(6, 6, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.drop(self.conv2(self.conv1(x)))
        x = x if self.blur is None else self.blur(x)
        return F.relu(shortcut + self.conv3(self.se(x)))


class Divided(Block):
    """A method of its own calls one of the two children."""

    def front(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(self.front(x)))


def chain() -> nn.Module:
    """The same in a Sequential, without the shortcut."""
    names = ("conv1", "conv2", "se", "conv3")
    return nn.Sequential(OrderedDict(zip(names, map(Block().get_submodule, names), strict=True)))


def entry_of(module: nn.Module) -> tuple[str, bool]:
    (entry,) = (entry for entry in rf.fuse(module).entries if entry.fused)
    return entry.name, entry.proven


@pytest.mark.parametrize("make", [Block, lambda: Block(2), chain, Divided])
def test_a_block(make):
    assert_proven(randomise(make()), features(6, 6, 7, 6))
    assert entry_of(make()) == ("", True)


def test_a_block_s_norm_is_in_the_op(monkeypatch):
    module, met = randomise(Block()).double(), []
    rf.fuse(module)
    attention = rf.modules.split_attention
    monkeypatch.setattr(
        rf.modules, "split_attention", lambda *a, **k: met.append(k["bn0"]) or attention(*a, **k)
    )
    module(features(2, 6, 5, 5).double())
    assert [bn0 is not None for bn0 in met] == [True]


def test_a_block_folds():
    assert_folds(randomise(Block()).double(), features(2, 6, 5, 5).double(), norms=1)


def test_copies_and_pickles_of_a_block():
    module = randomise(Block()).eval()
    rf.fuse(module)
    torch.save(module, stream := io.BytesIO())
    stream.seek(0)
    x = features(2, 6, 5, 5)
    for twin in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        assert type(twin) is type(module) and torch.equal(twin(x), module(x))
        assert rf.verify(twin, x)


@pytest.mark.parametrize("kind", [Block, Divided])
def test_a_block_under_the_compiler(kind):
    module, x = randomise(kind()).eval(), features(2, 6, 5, 5)
    rf.fuse(module)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    "name", ["conv2", "conv2.0", "conv2.1", "conv2.2", "se", "se.bn", "se.gate"]
)
def test_hooks_inside_a_block_run_and_replace(name):
    """Whatever a hook returns counts, so the children run in their order."""
    plain = randomise(Block()).double()
    fused, x = copy.deepcopy(plain), features(6, 6, 5, 5)
    rf.fuse(fused)
    for module in (plain, fused):
        module.get_submodule(name).register_forward_hook(lambda _, __, out: out * 1.5)
    assert_same(fused, plain, x)


CHANGES = {
    "another norm": lambda block: setattr(block.conv2, "1", nn.GroupNorm(2, 8).double()),
    "another front": lambda block: setattr(block, "conv2", nn.Conv2d(8, 8, 1).double()),
    "no front": lambda block: setattr(block, "conv2", nn.Identity()),
    "no attention": lambda block: setattr(block, "se", nn.Identity()),
    "one layer more": lambda block: block.conv2.append(nn.Tanh()),
    "a drop": lambda block: setattr(block, "drop", nn.Hardtanh()),
    "a blur": lambda block: setattr(block, "blur", nn.AvgPool2d(3, 1, 1)),
    "another activation": lambda block: setattr(block.conv2, "2", nn.SiLU()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_block_that_changes_later(change):
    plain = randomise(Block()).double()
    fused = copy.deepcopy(plain)
    assert rf.fuse(fused)
    for module in (plain, fused):
        torch.manual_seed(0)
        change(module)
    assert_same(fused, plain, features(6, 6, 5, 5))


class Twice(Block):
    """What goes into the attention is needed elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv2(self.conv1(x))
        return self.conv3(self.se(z) + z)


class Pooled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.se(F.avg_pool2d(self.conv2(self.conv1(x)), 3, 1, 1)))


class Derived(Block):
    """Its forward needs the block itself, of which only the children can be exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


class Listed(Block):
    """Finds its children where they cannot be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv1, self.conv2, self.se, self.conv3]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [Twice, Pooled, Derived, Listed])
def test_a_block_of_another_order_keeps_its_norm(kind):
    """Then the squeeze-and-excitation alone is fused."""
    module = randomise(kind()).double()
    plain = copy.deepcopy(module)
    report = rf.fuse(module)
    assert [(entry.name, entry.fused) for entry in report.entries] == [("", False), ("se", True)]
    expected = {Listed: "does not call the parts", Derived: "super"}.get(kind, "off by")
    assert expected in report.entries[0].reason
    assert_same(module, plain, features(6, 6, 5, 5))


class Counting(Block):
    """Its forward sets an attribute of the block."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv3(self.se(self.conv2(self.conv1(x))))


def test_what_a_block_sets_is_set():
    module = randomise(Counting())
    assert entry_of(module) == ("", True)
    module(features(2, 6, 5, 5))
    module(features(2, 6, 5, 5))
    assert module.calls == 2


def test_another_forward_of_a_class_that_the_op_replaces(monkeypatch):
    """Until it is fused once more, the unfused forward calls it."""
    plain, x = randomise(Block()).double(), features(6, 6, 5, 5)
    fused = copy.deepcopy(plain)
    rf.fuse(fused)
    forward = Excitation.forward
    monkeypatch.setattr(Excitation, "forward", lambda self, x: 2 * forward(self, x))
    assert_same(fused, plain, x)
    monkeypatch.setattr(Block, "forward", lambda self, x: self.conv3(self.se(self.conv2(x))))
    plain, x = randomise(Block()).double(), features(6, 8, 5, 5)
    monkeypatch.setattr(Excitation, "forward", lambda self, x: x * self._attention(x))
    fused = copy.deepcopy(plain)
    assert rf.fuse(fused)
    assert_same(fused, plain, x)
    called: list[int] = []
    attention = rf.modules.split_attention
    monkeypatch.setattr(
        rf.modules, "split_attention", lambda *a, **k: called.append(1) or attention(*a, **k)
    )
    fused(x.double())
    assert called


def test_another_activation_in_front():
    (entry,) = rf.fuse(Block(act=nn.SiLU)).entries
    assert entry.name == "se" and entry.fused
