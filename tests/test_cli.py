"""The command line: its screens, exit codes and errors, and the measurements behind them."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from resnest_fused import (
    SplitAttentionConv2d,
    agreement,
    compare,
    fuse,
    images,
    models,
    modules,
    sources,
)
from resnest_fused.backends import NAMES, native
from resnest_fused.cli import _Backend, app

_PHOTOS = Path(sklearn.datasets.__file__).parent / "images"
CHINA, FLOWER = str(_PHOTOS / "china.jpg"), str(_PHOTOS / "flower.jpg")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, [*arguments])
    # Anything else than an exit code is a traceback on a user's screen.
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def tiny_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        SplitAttentionConv2d(8, 8, 3, padding=1),
        SplitAttentionConv2d(8, 32, 3, stride=2, padding=1, cardinality=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 1000),
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets compare run on a small network on 48 pixels, whatever model is asked for."""
    monkeypatch.setattr(sources, "_build", lambda name: sources._ours(tiny_network(), 48))


def break_attention(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> None:
    """Put ``spoil`` behind every fused attention."""
    fused_attention = modules.fused_attention

    def spoiled(*arguments: object, **named: object) -> Tensor:
        return spoil(fused_attention(*arguments, **named))  # type: ignore[arg-type]

    monkeypatch.setattr(modules, "fused_attention", spoiled)


def read_errors(output: str) -> dict[str, float]:
    """The fused error by quantity and dtype, from the table of agreement."""
    row = r"^(\w[\w ]+?) {2,}(\w+) +\S+ +(\S+) +\S+ +(?:ok|DIFFERS)"
    rows = re.findall(row, output, re.MULTILINE)
    return {f"{name}, {dtype}": float(error) for name, dtype, error in rows if "e" in error}


def test_photo_through_resnest50() -> None:
    result = run("compare", "--image", CHINA, "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert read_errors(result.output)["logits, float32"] <= 1e-5
    assert "16 modules (SplitAttentionConv2d)" in result.output
    assert "china.jpg: (1, 3, 224, 224), float32, contiguous" in result.output
    assert "random: classes mean nothing" in result.output
    assert "the same for 1 of 1" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "…" not in result.output
    assert result.stderr == ""


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--dtype", "float64"),
        ("--dtype", "bfloat16", "--channels-last"),
        ("--dtype", "float16"),
        ("--channels-last", "--batch", "5", "--image", CHINA, "--image", FLOWER),
        ("--backend", "reference", "--image", FLOWER),
    ],
)
def test_variants(options: tuple[str, ...], train: bool) -> None:
    result = run("compare", "--repeats", "2", *options, *(["--train"] if train else []))
    assert result.exit_code == 0, result.output
    assert "agrees with the reference" in result.output
    assert ("saved MiB" in result.output) == train
    assert ("(5, 3, 48, 48)" in result.output) == ("5" in options)
    assert ("channels_last" in result.output) == ("--channels-last" in options)
    assert ("backend  reference" in result.output) or "reference" not in options
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda out: out * 1.01, id="scaled"),
        pytest.param(lambda out: out.roll(1, 1), id="channels shifted"),
        pytest.param(lambda out: out * float("nan"), id="NaN"),
        pytest.param(lambda out: out.unflatten(1, (2, -1)).flip(1).flatten(1, 2), id="groups"),
    ],
)
def test_disagreement(
    spoil: Callable[[Tensor], Tensor], train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_attention(monkeypatch, spoil)
    result = run("compare", "--repeats", "1", *(["--train"] if train else []))
    assert result.exit_code == 1, result.output
    assert "does NOT agree" in result.output
    assert "DIFFERS" in result.output


@pytest.mark.usefixtures("tiny")
def test_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same values forward, 1 % more backward.
    break_attention(monkeypatch, lambda out: out * 1.01 - out.detach() * 0.01)
    assert run("compare", "--repeats", "1").exit_code == 0
    result = run("compare", "--repeats", "1", "--train")
    assert result.exit_code == 1, result.output
    errors = read_errors(result.output)
    assert (
        errors["module outputs, float64"] < 1e-8 < 5e-3 < errors["module input gradients, float64"]
    )
    assert errors["module parameter gradients, float64"] > 5e-3
    assert "DIFFERS: 2, resnest_fused.reference.SplitAttentionConv2d" in result.output
    assert "DIFFERS: 3, resnest_fused.reference.SplitAttentionConv2d" in result.output


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("train", [False, True])
def test_compile(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced as ever, but without the minutes of C++ compilation.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    result = run("compare", "--repeats", "2", "--compile", *(["--train"] if train else []))
    assert result.exit_code == 0, result.output
    assert "compiled reference" in result.output
    assert "compiled fused" in result.output


@pytest.mark.usefixtures("tiny")
def test_compile_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C++ compiler found\nmore on that")

    monkeypatch.setattr(torch, "compile", lambda network: fail)
    monkeypatch.setattr(fail, "training", False, raising=False)
    result = run("compare", "--repeats", "1", "--compile")
    assert result.exit_code == 2
    assert result.stderr == ("resnest-fused: Invalid value for --compile: no C++ compiler found\n")


@pytest.mark.usefixtures("tiny")
def test_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pth"
    torch.save(tiny_network().state_dict(), path)
    result = run("compare", "--repeats", "1", "--weights", str(path))
    assert result.exit_code == 0, result.output
    assert "tiny.pth" in result.output.replace("\n", "")
    assert "random: classes" not in result.output


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "text.jpg").write_text("not a picture")
    photo = Path(CHINA).read_bytes()
    (tmp_path / "half.jpg").write_bytes(photo[: len(photo) // 2])
    torch.save(models.resnest50().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    return tmp_path


def test_bad_files(files: Path) -> None:
    for option, name, reason in (
        ("--image", "absent.jpg", "not a file that exists"),
        ("--image", "", "not a file that exists"),
        ("--image", "text.jpg", "not an image that Pillow can read"),
        ("--image", "half.jpg", "cannot be decoded"),
        ("--weights", "absent.pth", "not a file that exists"),
        ("--weights", "half.pth", "truncated, damaged, or not a checkpoint"),
        ("--weights", "text.jpg", "truncated, damaged, or not a checkpoint"),
        ("--weights", "other.pth", "not a checkpoint of this ResNeSt: 4"),
    ):
        assert_refused(run("compare", option, str(files / name)), option, reason)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--model", "resnest5"), "unknown model 'resnest5'; known are resnest50, official:NAME"),
        (("--model", "hub:resnest50"), "unknown source 'hub'"),
        (("--model", "official:resnest50"), "package resnest cannot be imported"),
        (("--model", "timm:resnest50d"), "try pip install timm"),
        (("--dtype", "int8"), "int8"),
        (("--batch", "0"), "1"),
        (("--batch", "many"), "valid integer"),
        (("--repeats", "0"), "1"),
        (("--backend", "abacus"), "abacus"),
        (("--train", "--batch", "2"), "--train needs at least 4, got 2"),
        (("--batch", "1", "--image", CHINA, "--image", FLOWER), "must hold all 2 images, got 1"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("resnest.torch", "timm"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    option = "--batch" if "--batch" in arguments else arguments[0]
    assert_refused(run("compare", *arguments), option, reason)


def assert_refused(result: Result, option: str, reason: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("resnest-fused: ")
    assert option in line
    assert reason in line


def test_a_network_without_split_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_build", lambda name: sources._ours(nn.Conv2d(3, 4, 1), 8))
    assert_refused(run("compare"), "--model", "no split attention that can be fused")


@pytest.mark.parametrize("arguments", [("no-such-command",), ("compare", "--no-such-option"), ()])
def test_unknown_command_line(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_info() -> None:
    result = run("info")
    assert result.exit_code == 0, result.output
    for expected in ("resnest_fused", "Python", torch.__version__, "native", "reference"):
        assert expected in result.output
    if native.unavailable() is None:
        assert native.build_info()["compiler"] in result.output


def test_info_lists_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(name="Old GPU", major=7, minor=0)
    gpus = [old, SimpleNamespace(name="New GPU", major=9, minor=0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    monkeypatch.setattr(native, "gpu_unavailable", lambda index: None if index else "it is old")
    monkeypatch.setattr(native, "cuda_status", lambda: "built by nvcc 13.0.88 for 9.0")
    output = run("info").output
    assert re.search(r"CUDA kernels +built by nvcc 13.0.88 for 9.0\b", output)
    assert re.search(r"GPU 0 +Old GPU, 7.0: no CUDA kernels for it\b", output)
    assert re.search(r"GPU 1 +New GPU, 9.0: CUDA kernels run on it\b", output)


def test_info_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "it was left out")
    assert re.search(r"native +no +it was left out", run("info").output)
    refused = run("compare", "--backend", "native")
    assert_refused(refused, "--backend", "native cannot run: it was left out")


def test_help() -> None:
    assert tuple(backend.value for backend in _Backend) == NAMES
    for arguments in ((), ("info",), ("compare",)):
        result = run(*arguments, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.output


def test_preprocess() -> None:
    # A grey frame around a square whose halves are black and white.
    picture = Image.new("RGB", (400, 256), (128, 128, 128))
    picture.paste((0, 0, 0), (88, 16, 200, 240))
    picture.paste((255, 255, 255), (200, 16, 312, 240))
    x = images.preprocess(picture)
    assert x.shape == (3, 224, 224)
    assert x.is_contiguous()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x[:, 0, 0], -mean / std)
    torch.testing.assert_close(x[:, -1, -1], (1 - mean) / std)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (40, 30)).save(path)
    assert images.preprocess(images.read_image(path), 32).shape == (3, 32, 32)


def test_random_input_is_seeded_and_varied() -> None:
    x = images.random_images(4, 32, seed=3)
    assert torch.equal(x, images.random_images(4, 32, seed=3))
    assert not torch.equal(x, images.random_images(4, 32, seed=4))
    crops = images.random_crops(x[:2], 6, seed=0)
    assert crops.shape == (6, 3, 32, 32)
    assert torch.equal(crops, images.random_crops(x[:2], 6, seed=0))
    assert torch.pdist(crops.flatten(1)).min() > 1


def test_randomized_norms_make_attention_count() -> None:
    """Rounding stays far below the allowed error, a small mistake in attention far above it."""
    torch.manual_seed(0)
    model = models.resnest50(fused=False)
    for module in model.modules():  # as timm starts: without attention's influence
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    sources.randomize_norms(model, 64, seed=0)
    x = images.random_images(2, 64, seed=1)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        logits = model(x)
        model.layer3[1].conv2.fc2.weight.mul_(1.01)
        wrong = model(x)
    assert agreement.relative_error(logits, exact) < 2e-6
    assert agreement.relative_error(wrong, exact) > 1e-4


def test_relative_error() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert agreement.relative_error(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])) == 0.25
    assert agreement.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert agreement.relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert agreement.relative_error(torch.zeros(0), torch.zeros(0)) == 0
    for pair in ((nan, nan), (nan, torch.ones(2)), (torch.ones(2), nan)):
        error = agreement.relative_error(*pair)
        assert error != error
        assert not agreement.Check("", "", torch.float32, None, error, 1.0).passed


def test_check_in_a_16_bit_dtype() -> None:
    exact = torch.tensor([1.0, 0.5])
    reference = torch.tensor([1.0, 0.51], dtype=torch.bfloat16)
    own = (reference[1].float() - 0.5).item()
    allowed = 1.5 * own + torch.finfo(torch.bfloat16).eps
    found = compare.check("x", reference, exact.bfloat16(), exact, 0)
    assert found == agreement.Check("x", "", torch.bfloat16, own, 0.0, pytest.approx(allowed))
    assert not compare.check("x", reference, exact.bfloat16() * 1.1, exact, 0).passed


@pytest.mark.parametrize(
    ("second", "gap", "passed"), [(0.999, 0.002, True), (0.999, 0.0005, False), (0.5, 0.1, False)]
)
def test_top_five(second: float, gap: float, passed: bool) -> None:
    logits = torch.tensor([1.0, second, -1, -2, -3, -4])
    swapped = logits[[1, 0, 2, 3, 4, 5]]
    top = compare._top_five(logits, swapped, torch.tensor(gap))
    assert (top.reference, top.fused) == ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4])
    assert top.passed == passed


def test_networks_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    reference = tiny_network()
    fused = copy.deepcopy(reference)
    fuse(fused)
    before = copy.deepcopy(reference.state_dict())
    x = images.random_images(4, 32, 0)
    compare.check_train(reference, fused, x, torch.arange(4))
    compare.check_modules(fused, x)
    for network in (reference, fused):
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())


def test_timing_is_interleaved() -> None:
    order: list[str] = []
    ticks: list[None] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = compare.time_interleaved(calls, 3, lambda: ticks.append(None))
    assert "".join(order) == "abababab"
    assert len(ticks) == len(order)
    assert all(0 <= t.low <= t.median <= t.high for t in timings.values())
    assert compare._timing([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert compare._timing([2.0]) == (2.0, 2.0, 2.0)


def test_peak_memory() -> None:
    x = torch.ones(1000)

    def call() -> Tensor:
        a = x + 1  # 4000 bytes live
        b = a * 2  # 8000
        del a
        c = b.view(10, 100).add_(1)  # in place and a view: still 4000
        return c + x[:1]  # 8000

    assert compare.peak_memory(call) == 8000
    assert compare.peak_memory(lambda: x.add_(1)) == 0


def test_saved_for_backward() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5, bias=False), nn.Sigmoid())
    x, target = torch.randn(3, 4), torch.arange(3)
    # Sigmoid keeps its output; cross entropy the log-softmax, the target and its total weight.
    expected = 2 * 3 * 5 * 4 + 3 * 8 + 4
    assert compare.saved_for_backward(model, x, target) == expected


@pytest.mark.peers
@pytest.mark.parametrize("options", [("--image", CHINA, "--image", FLOWER), ("--train",)])
def test_official_resnest50(options: tuple[str, ...]) -> None:
    result = run("compare", "--model", "official:resnest50", "--repeats", "1", *options)
    assert result.exit_code == 0, result.output
    assert "16 modules (SplAtConv2d)" in result.output
    if "--train" not in options:
        assert read_errors(result.output)["logits, float32"] <= 1e-5
        assert "the same for 2 of 2" in result.output


@pytest.mark.peers
def test_official_package_has_no_such_model() -> None:
    refused = run("compare", "--model", "official:resnet50")
    assert_refused(refused, "--model", "has no model 'resnet50'")


@pytest.mark.peers
@pytest.mark.parametrize("options", [("--image", CHINA), ("--train",)])
def test_timm_resnest50d(options: tuple[str, ...]) -> None:
    result = run("compare", "--model", "timm:resnest50d", "--repeats", "1", *options)
    assert result.exit_code == 0, result.output
    assert "16 modules (SplitAttn)" in result.output


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "reason"), [("nothing", "has no model"), ("resnet18", "no split attention")]
)
def test_timm_has_no_such_model(name: str, reason: str) -> None:
    assert_refused(run("compare", "--model", f"timm:{name}"), "--model", reason)
