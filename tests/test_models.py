"""The models: official layout and numbers, and checkpoints that load whole or not at all."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused import FusedSplitAttentionConv2d, SplitAttentionConv2d, models
from resnest_fused.models import CheckpointError, registry
from resnest_fused.models.resnest import Bottleneck

# From the official resnest50: the first keys, a block with a shortcut, and the last keys.
_STEM = ["conv1.0.weight", "conv1.1.weight", "conv1.1.bias", "conv1.1.running_mean"]
_BLOCK = [
    "conv1.weight",
    *(f"bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    "bn1.num_batches_tracked",
    "conv2.conv.weight",
]


def build(fused: bool = False, seed: int = 0) -> models.ResNeSt:
    torch.manual_seed(seed)
    return models.resnest50(fused=fused)


@pytest.fixture(scope="module")
def reference() -> models.ResNeSt:
    return build()


@pytest.fixture(scope="module")
def checkpoint(reference: models.ResNeSt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnest50.pth"
    torch.save(reference.state_dict(), path)
    return path


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_layout(reference: models.ResNeSt) -> None:
    state = reference.state_dict()
    keys = list(state)
    assert keys[:4] == _STEM
    assert keys[-2:] == ["fc.weight", "fc.bias"]
    start = keys.index("layer2.0.conv1.weight")
    assert keys[start : start + len(_BLOCK)] == [f"layer2.0.{name}" for name in _BLOCK]
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["conv1.6.weight"] == (64, 32, 3, 3)
    assert shapes["layer1.0.downsample.1.weight"] == (256, 64, 1, 1)
    assert shapes["layer4.2.conv2.conv.weight"] == (1024, 256, 3, 3)
    assert shapes["layer4.2.conv2.fc1.weight"] == (256, 512, 1, 1)
    assert shapes["layer1.0.conv2.fc2.weight"] == (128, 32, 1, 1)
    assert sum(p.numel() for p in reference.parameters()) == 27_483_240
    assert [len(getattr(reference, f"layer{n}")) for n in (1, 2, 3, 4)] == [3, 4, 6, 3]


def test_fused_changes_the_attention_only(reference: models.ResNeSt) -> None:
    fused = build(fused=True)
    assert_same_state(reference, fused)

    def kinds(model: nn.Module) -> list[type]:
        return [type(m) for m in model.modules() if isinstance(m, SplitAttentionConv2d)]

    assert kinds(fused) == 16 * [FusedSplitAttentionConv2d]
    assert kinds(reference) == 16 * [SplitAttentionConv2d]
    rf.unfuse(fused)
    assert kinds(fused) == 16 * [SplitAttentionConv2d]
    assert len(rf.fuse(fused).entries) == 16 and kinds(fused) == 16 * [FusedSplitAttentionConv2d]


@pytest.mark.parametrize("size", [64, 75])
def test_fused_equals_reference_in_eval(size: int) -> None:
    reference, fused = build().double().eval(), build(fused=True).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-10 * expected.abs().max())


def test_any_size_and_number_of_classes() -> None:
    model = models.create("resnest50", num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 33, 70)).shape == (1, 7)


@pytest.mark.parametrize(
    ("stride", "size", "expected"), [(1, 7, 7), (2, 7, 4), (2, 8, 4), (2, 1, 1)]
)
def test_bottleneck_output_size(stride: int, size: int, expected: int) -> None:
    downsample = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    block = Bottleneck(64, 16, nn.BatchNorm2d, stride, downsample).eval()
    assert block(torch.randn(2, 64, size, size)).shape == (2, 64, expected, expected)


def test_norm_layer() -> None:
    def group_norm(features: int) -> nn.Module:
        return nn.GroupNorm(8, features)

    model = models.resnest50(norm_layer=group_norm)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    plain = models.resnest50(norm_layer=group_norm, fused=False)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pooling_behind_the_attention(memory_format: torch.memory_format) -> None:
    block = Bottleneck(8, 8, nn.BatchNorm2d, stride=2)
    x = torch.randn(2, 8, 9, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
    x.requires_grad_()
    dout = torch.randn(2, 8, 5, 3, dtype=torch.float64)
    expected = nn.functional.avg_pool2d(x, 3, 2, padding=1)
    out = block.avd_layer(x)
    assert torch.equal(out, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(y, x, dout) for y in (out, expected))
    assert torch.equal(grad, expected_grad) and grad.stride() == expected_grad.stride()
    if x.is_cuda and memory_format == torch.channels_last:
        return  # PyTorch 2.11's own avg_pool2d has a wrong second derivative there
    assert torch.autograd.gradgradcheck(block.avd_layer, (x,))


def test_names() -> None:
    known = f"Known are {', '.join(models.list_models())}, official:NAME and timm:NAME"
    with pytest.raises(ValueError) as caught:
        models.create("resnest5")
    assert str(caught.value) == (
        f"resnest_fused has no model resnest5; did you mean resnest50? {known}"
    )
    with pytest.raises(ValueError) as caught:
        models.create("abacus")
    assert str(caught.value) == f"resnest_fused has no model abacus. {known}"
    with pytest.raises(ValueError, match=r"unknown source 'hub' in 'hub:resnest50'; known are"):
        models.create("hub:resnest50")


class StandInForTimm(ModuleType):
    """The parts of timm that the registry uses; its model is ours."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.__version__ = "1.2.3"
        self.data = SimpleNamespace(
            resolve_model_data_config=lambda model: {"input_size": (3, 96, 96)},
            create_transform=lambda input_size: f"to {input_size}",
        )

    def list_models(self) -> list[str]:
        return ["resnet50", "resnest14d", "resnest50d", "resnest50d_1s4x24d"]

    def is_model(self, name: str) -> bool:
        return name.partition(".")[0] in self.list_models()

    def create_model(self, name: str, **options: object) -> nn.Module:
        assert self.is_model(name)
        return models.resnest50(fused=False, **options)


@pytest.fixture
def stand_in_for_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", StandInForTimm())


@pytest.mark.usefixtures("stand_in_for_timm")
def test_names_of_timm(checkpoint: Path, reference: nn.Module) -> None:
    model = models.create("timm:resnest50d.in1k", checkpoint)
    assert_same_state(model, reference)
    assert registry.preprocessing("timm:resnest50d", model) == (96, "to (3, 96, 96)")
    with pytest.raises(ValueError) as caught:
        models.create("timm:resnest50")
    assert str(caught.value) == "timm 1.2.3 has no model resnest50; did you mean resnest50d?"
    with pytest.raises(ValueError, match=r"^timm 1.2.3 has no model abacus$"):
        models.create("timm:abacus")


@pytest.mark.usefixtures("stand_in_for_timm")
@pytest.mark.parametrize("name", ["resnest50", "timm:resnest50d"])
def test_a_checkpoint_with_another_number_of_classes(name: str, tmp_path: Path) -> None:
    path = tmp_path / "seven.pth"
    state = models.resnest50(num_classes=7).state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    model = models.create(name, path)
    assert model.fc.out_features == 7
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    message = r"1?[0-9] of another shape \(fc.weight \(7, 2048\) for \(10, 2048\)"
    with pytest.raises(CheckpointError, match=message):
        models.create(name, path, num_classes=10)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("entry", [None, "state_dict", "model"])
def test_weights(
    entry: str | None, prefix: str, checkpoint: Path, reference: nn.Module, tmp_path: Path
) -> None:
    state = {f"{prefix}{key}": value for key, value in reference.state_dict().items()}
    path = tmp_path / "weights.pth"
    torch.save(state if entry is None else {entry: state, "epoch": 270}, path)
    assert_same_state(models.create("resnest50", path, fused=False), reference)
    assert_same_state(models.create("resnest50", str(path)), reference)


def _without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, "fc.bias"), r"1 missing \(fc.bias\); leave_out=\('fc',\) keeps"),
        (lambda s: s | {"head.weight": torch.ones(1)}, r"1 unexpected \(head.weight\)$"),
        (
            lambda s: s | {"fc.weight": torch.ones(10, 2048)},
            r"1 of another shape \(fc.weight \(10, 2048\) for \(1000, 2048\)\); leave_out=",
        ),
        (
            lambda s: {key.replace("layer", "stage"): value for key, value in s.items()},
            r"(\d+) missing \(layer1.0.conv1.weight, layer1.0.bn1.weight, .*\); \1 unexpected",
        ),
    ],
)
def test_weights_that_do_not_fit(
    change: object, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(change(torch.load(checkpoint)), path)  # type: ignore[operator]
    model, untouched = build(seed=1), build(seed=1)
    with pytest.raises(CheckpointError, match=f"other.pth: not a checkpoint of this .*{message}"):
        models.load_checkpoint(model, path)
    assert_same_state(model, untouched)


class Opaque:
    """What torch.load(weights_only=True) must refuse."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, damaged"),
        (b"no checkpoint at all", "truncated, damaged"),
        ("half", "truncated, damaged"),
        (Opaque(), "holds .*Opaque, which torch.load"),
        ([1, 2], "expected a state_dict, got list"),
        ({}, "got dict without entries"),
        (
            {"state_dict": {"epoch": 3}},
            "expected dense real tensors by name, got int under 'epoch'",
        ),
        (None, "expected a state_dict, got NoneType"),
        (
            nn.Linear(2, 2),
            r"holds torch.nn.modules.linear.Linear, which .* keep its weights alone with ",
        ),
    ],
)
def test_files_that_are_no_checkpoints(
    content: object, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "file.pth"
    if content == "half":
        content = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        models.create("resnest50", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:TypedStorage:UserWarning")
def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "quantized.pth"
    weight = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    torch.save({"fc.weight": weight}, path)
    with pytest.raises(CheckpointError, match=r"expected dense real tensors .* a torch.qint8"):
        models.create("resnest50", path)


@pytest.mark.parametrize("entry", ["state_dict", "model"])
def test_a_training_script_s_objects_are_named_and_what_helps_works(
    entry: str, reference: models.ResNeSt, tmp_path: Path
) -> None:
    """The official and torchvision's scripts save their arguments, and mmengine its history."""
    state, path = reference.state_dict(), tmp_path / "trained.pth"
    arguments, history = argparse.Namespace(lr=0.1, arch="resnest50"), Opaque()
    torch.save({entry: state, "args": arguments, "history": [history]}, path)
    with pytest.raises(CheckpointError) as caught:
        models.create("resnest50", path)
    names = f"argparse.Namespace, {Opaque.__module__}.Opaque"
    message = str(caught.value)
    held = f"holds {names} under 'args', 'history'"
    assert message.startswith(f"{path}: {held}, which torch.load(weights_only=True) refuses")
    assert message.endswith(f" within torch.serialization.safe_globals([{names}])")
    assert "damaged" not in message and "\n" not in message

    with torch.serialization.safe_globals([argparse.Namespace, Opaque]):
        model = models.create("resnest50", path)
    assert_same_state(model, reference)
    stripped = tmp_path / "stripped.pth"
    (advice,) = re.findall(r"keep its weights alone with (torch\.save\(.*\)), or load", message)
    exec(advice, {"torch": torch, "NEW_FILE": stripped})
    assert_same_state(models.create("resnest50", stripped), reference)

    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        models.create("resnest50", path)


@pytest.mark.parametrize("name", ["absent.pth", ""])
def test_weights_without_a_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a file that exists"):
        models.create("resnest50", tmp_path / name)


@pytest.mark.peers
class TestOfficial:
    """Against the official package's resnest50."""

    @staticmethod
    def official(seed: int = 0) -> nn.Module:
        from resnest.torch import resnest50

        torch.manual_seed(seed)
        return resnest50()

    def test_one_seed_gives_the_same_weights(self, reference: models.ResNeSt) -> None:
        assert_same_state(self.official(), reference)

    def test_loads_both_ways(self, reference: models.ResNeSt, tmp_path: Path) -> None:
        official = self.official(seed=5)
        torch.save(official.state_dict(), tmp_path / "official.pth")
        for name in ("resnest50", "official:resnest50"):
            assert_same_state(models.create(name, tmp_path / "official.pth"), official)
        official.load_state_dict(reference.state_dict(), strict=True)
        assert_same_state(official, reference)

    def test_by_name(self, tmp_path: Path) -> None:
        model = models.create("official:resnest50", num_classes=7)
        assert type(model) is type(self.official())
        torch.save(model.state_dict(), tmp_path / "seven.pth")
        again = models.create("official:resnest50", tmp_path / "seven.pth")
        assert_same_state(again, model)
        assert registry.preprocessing("official:resnest50", model).size == 224
        assert registry.preprocessing("official:resnest269", model).size == 416
        with pytest.raises(ValueError, match=r"^the official package has no model resnest5"):
            models.create("official:resnest5")

    @pytest.mark.parametrize("training", [False, True])
    def test_equal_to_the_bit(self, training: bool) -> None:
        official, ours = self.official().train(training), build().train(training)
        x = torch.randn(3, 3, 70, 64)
        logits, expected = ours(x), official(x)
        assert torch.equal(logits, expected)
        logits.logsumexp(1).sum().backward()
        expected.logsumexp(1).sum().backward()
        for (name, p), q in zip(ours.named_parameters(), official.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        assert_same_state(ours, official)


@pytest.mark.peers
def test_timm_loads_it(reference: models.ResNeSt) -> None:
    import timm

    theirs = timm.create_model("resnest50d")
    theirs.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs.eval()(x), reference.eval()(x))
