"""fuse on the modules and models of the official package and of timm; run with ``-m peers``."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from test_fuse import assert_folds, assert_fuses, features, randomise, reason_left_alone, step
from torch import Tensor, nn

from resnest_fused import fuse, unfuse
from resnest_fused.models import registry

pytestmark = pytest.mark.peers

Make = Callable[..., nn.Module]


def official(
    radix: int = 2, cardinality: int = 1, module: str = "resnest.torch.splat", **options: object
) -> nn.Module:
    """The official module from 16 to 16 channels."""
    options = {"norm_layer": nn.BatchNorm2d, "bias": False} | options
    make = importlib.import_module(module).SplAtConv2d
    return randomise(make(16, 16, 3, padding=1, groups=cardinality, radix=radix, **options))


def timm(radix: int = 2, cardinality: int = 1, **options: object) -> nn.Module:
    """timm's module from 16 to 16 channels."""
    make = importlib.import_module("timm.layers.split_attn").SplitAttn
    options = {"norm_layer": nn.BatchNorm2d} | options
    return randomise(make(16, groups=cardinality, radix=radix, **options))


@pytest.fixture(params=[official, timm], ids=["official", "timm"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param


@pytest.fixture
def images() -> Tensor:
    return features(8, 16, 9, 8)


@pytest.fixture
def inputs() -> list[Tensor]:
    return [features(8, 16, 9, 8, seed=seed) for seed in range(4)]


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, None], ids=["bn", "no-norm"])
@pytest.mark.parametrize("cardinality", [1, 2])
@pytest.mark.parametrize("radix", [1, 2, 4])
def test_results_stay(make, radix, cardinality, norm_layer, inputs):
    module = make(radix, cardinality, norm_layer=norm_layer)
    assert_fuses(module, inputs)
    assert_fuses(module.to(memory_format=torch.channels_last), inputs)


def test_class_stays_a_peers(make):
    module = make()
    original = type(module)
    (entry,) = fuse(module).entries
    assert entry.kind == f"{original.__module__}.{original.__name__}"
    assert isinstance(module, original) and type(module) is not original
    assert type(module).__name__ == f"Fused{original.__name__}"
    assert [entry.reason for entry in fuse(module).entries] == ["already fused"]
    unfuse(module)
    assert type(module) is original


def test_deepcopy_and_pickle(make, images):
    module = make().eval()
    original = type(module)
    fuse(module, backend="reference")
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        assert type(twin) is type(module) and twin.backend == "reference"
        assert torch.equal(twin(images), module(images))
        unfuse(twin)
        assert type(twin) is original and not hasattr(twin, "backend")


LOAD = """
import sys, torch
import resnest_fused
assert not {"resnest", "timm"} & set(sys.modules)
module, images, expected = torch.load(sys.argv[1], weights_only=False)
assert resnest_fused.verify(module, images), type(module)
torch.testing.assert_close(module(images), expected)
"""


def test_load_in_another_process(make, images, tmp_path):
    module = make().eval()
    fuse(module)
    torch.save((module, images, module(images)), tmp_path / "module.pt")
    # Not in the checkout, whose package would hide the installed one.
    subprocess.run([sys.executable, "-c", LOAD, "module.pt"], cwd=tmp_path, check=True)


def test_hooks_run(make, images):
    module = make()
    ran = []
    for name in ("conv", "bn0"):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    module.register_forward_hook(lambda *_: ran.append("module"))
    assert fuse(module)
    module(images)
    assert ran == ["conv", "bn0", "module"]


def test_any_conv_and_bn0(make, inputs):
    """For example a rectified convolution, or other norms before the attention."""
    module = make()
    module.conv = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Tanh())
    module.bn0 = nn.GroupNorm(4, 32)
    assert_fuses(randomise(module), inputs)


def patch_forward(module: nn.Module) -> None:
    module.forward = module.forward


@pytest.mark.parametrize("name", ["fc1", "bn1", "fc2", "bn0", "conv", "rsoftmax"])
def test_hooks_on_children_run(make, name, images):
    module, ran = make(), []
    module.get_submodule(name).register_forward_hook(lambda *_: ran.append(name))
    assert fuse(module)
    module(images)
    assert ran == [name]


GROUP_NORMS = {"bn0": lambda: nn.GroupNorm(4, 32), "bn1": lambda: nn.GroupNorm(4, 32)}
WRAPPED_FC = {"fc2": lambda: nn.Sequential(nn.Conv2d(32, 32, 1))}
CHILDREN = {
    "official-group-norms": (official, GROUP_NORMS),
    "official-wrapped-fc": (official, WRAPPED_FC),
    "official-activation": (official, {"relu": nn.SiLU}),
    "timm-group-norms": (timm, GROUP_NORMS),
    "timm-wrapped-fc": (timm, WRAPPED_FC),
    "timm-activations": (timm, {"act0": nn.SiLU, "act1": nn.Tanh}),
    "timm-act1": (timm, {"act1": nn.SiLU}),
    "timm-drop": (timm, {"drop": nn.Hardtanh}),  # any module: nothing random to compare
}


@pytest.mark.parametrize(("make", "children"), CHILDREN.values(), ids=CHILDREN)
def test_any_children(make, children, inputs):
    module = make()
    for name, child in children.items():
        setattr(module, name, child())
    assert_fuses(randomise(module), inputs)


@pytest.mark.parametrize("radix", [1, 2])
def test_folding(make, radix, images):
    module = make(radix, 2)
    assert_folds(module.double(), images.double(), norms=2)


def test_a_replaced_forward_is_left_alone(make):
    module = make()
    patch_forward(module)
    assert reason_left_alone(module) == "its forward was replaced"


def test_a_class_s_forward_replaced_before_fuse(make, monkeypatch):
    module = make()
    monkeypatch.setattr(type(module), "forward", lambda self, x: x)
    assert reason_left_alone(module) == "its forward was replaced"


def test_a_class_s_forward_replaced_after_fuse(make, images, monkeypatch):
    module = make()
    kind = type(module)
    fuse(module)
    expected = module(images)
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * original(self, x))
    torch.testing.assert_close(module(images), 2 * expected)


class Flattening(nn.Module):
    """Some other softmax, over all splits of all channels."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.flatten(1).softmax(dim=1)


def hook_softmax(module: nn.Module) -> None:
    module.rsoftmax.register_forward_hook(lambda _, __, attention: attention.square())


def patch_softmax(module: nn.Module) -> None:
    softmax = module.rsoftmax.forward
    module.rsoftmax.forward = lambda logits: softmax(2 * logits)


def replace_softmax(module: nn.Module) -> None:
    module.rsoftmax = Flattening()


def halve_radix(module: nn.Module) -> None:
    module.rsoftmax.radix //= 2


SOFTMAXES = {
    "hooked": hook_softmax,
    "patched": patch_softmax,
    "replaced": replace_softmax,
    "another radix": halve_radix,
}


@pytest.mark.parametrize("radix", [1, 2, 4])
@pytest.mark.parametrize("cardinality", [1, 2])
@pytest.mark.parametrize("change", SOFTMAXES.values(), ids=SOFTMAXES)
@pytest.mark.parametrize("before_fuse", [True, False])
def test_another_softmax(make, before_fuse, change, cardinality, radix, images):
    """A softmax that was hooked, patched or replaced, before fuse or after, is called."""
    plain = make(radix, cardinality).double()
    fused = copy.deepcopy(plain)
    if not before_fuse:
        assert fuse(fused)
    change(plain)
    change(fused)
    if before_fuse:
        assert fuse(fused)
    for training in (False, True):
        found, expected = (step(each, images, training) for each in (fused, plain))
        for name, truth in expected.items():
            torch.testing.assert_close(found[name], truth, rtol=1e-8, atol=1e-10, msg=name)


def test_a_softmax_s_class_patched_after_fuse(make, images, monkeypatch):
    module = make().double().eval()
    plain = copy.deepcopy(module)
    fuse(module)
    kind = type(module.rsoftmax)
    softmax = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, logits: softmax(self, 2 * logits))
    torch.testing.assert_close(module(images.double()), plain(images.double()))


def test_hooks_of_all_modules_see_every_child(make, images):
    plain = make()
    fused = copy.deepcopy(plain)
    fuse(fused)
    met = []
    for module in (plain, fused):
        met.append([])
        handle = nn.modules.module.register_module_forward_hook(
            lambda child, *_: met[-1].append(type(child).__name__.removeprefix("Fused"))
        )
        module(images)
        handle.remove()
    assert met[0] == met[1] and {"Conv2d", "BatchNorm2d", "ReLU"} < set(met[0])


def test_a_subclass_is_proven(make):
    module = make()
    original = type(module)
    module.__class__ = type("Mine", (original,), {})
    (entry,) = fuse(module).entries
    assert entry.proven
    unfuse(module)
    module.__class__ = type("Doubled", (original,), {"forward": doubled})
    assert reason_left_alone(module).startswith("fused it would compute something else")


def doubled(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * type(self).__bases__[0].forward(self, x)


def as_in_repository(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The official module under the name that it has in the repository, unlike in the package."""
    source = importlib.import_module("resnest.torch.splat").__file__
    spec = importlib.util.spec_from_file_location("resnest.torch.models.splat", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, spec.name, module)
    return module


def test_official_repository(monkeypatch, inputs):
    as_in_repository(monkeypatch)
    module = official(module="resnest.torch.models.splat")
    assert_fuses(module, inputs)
    fuse(module)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    assert type(torch.load(stream, weights_only=False)) is type(module)


MODELS = {
    "official-resnest50": ("resnest.torch", "resnest50", 16),
    "official-resnest50_fast_1s4x24d": ("resnest.torch", "resnest50_fast_1s4x24d", 16),
    "official-resnest50_fast_4s2x40d": ("resnest.torch", "resnest50_fast_4s2x40d", 16),
    "timm-resnest14d": ("timm.models.resnest", "resnest14d", 4),
    "timm-resnest50d": ("timm.models.resnest", "resnest50d", 16),
    "timm-resnest50d_4s2x40d": ("timm.models.resnest", "resnest50d_4s2x40d", 16),
}


def build(name: str) -> nn.Module:
    """The model with random weights, and running statistics near those of its features."""
    module, function, _ = MODELS[name]
    model = randomise(getattr(importlib.import_module(module), function)())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    for norm in norms:
        norm.momentum = 0.1
        # Four samples may be alike in one feature, so small variances are raised.
        norm.running_var += norm.running_var.mean() * torch.rand_like(norm.running_var)
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_model_in_eval(name):
    model, images = build(name).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(images)
        report = fuse(model)
        found = model(images)
        unfuse(model)
        restored = model(images)
    assert len(report) == MODELS[name][2] and not report.left_alone
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(found.topk(5).indices, expected.topk(5).indices)
    assert torch.equal(restored, expected)


@pytest.mark.parametrize(("name", "norms"), [("official-resnest50", 71), ("timm-resnest14d", 23)])
def test_folding_a_model(name, norms):
    model = build(name).double()
    assert_folds(model, torch.randn(2, 3, 64, 64).double(), norms)


@pytest.mark.parametrize("name", ["official-resnest50", "timm-resnest14d"])
def test_model_in_training(name):
    """In float64, where no rounding is large enough to turn a ReLU on or off."""
    model, images = build(name).double(), torch.randn(4, 3, 64, 64)
    plain = copy.deepcopy(model)
    fuse(model)
    found, expected = step(model, images, True), step(plain, images, True)
    for key, value in expected.items():
        # bn1 removes the gradient of fc1's bias; the weight's gradient gives the scale.
        scale = expected[key.replace("fc1.bias", "fc1.weight")].abs().max()
        assert (found[key] - value).abs().max() <= 1e-10 * scale, key


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("official:resnest50", 224),
        ("official:resnest50_fast_1s1x64d", 224),
        ("timm:resnest14d", 224),
    ],
)
def test_networks_are_built_by_name(name, size):
    network = registry.create(name)
    assert registry.preprocessing(name, network).size == size and fuse(network)
    origin, _, _ = name.partition(":")
    with pytest.raises(ValueError, match="has no model vgg16_x"):
        registry.create(f"{origin}:vgg16_x")
