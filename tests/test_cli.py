"""The command line: its screens, exit codes and errors."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sklearn.datasets
import torch
import typer
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import resnest_fused as rf
from resnest_fused import SplitAttentionConv2d, models, modules
from resnest_fused.backends import NAMES, native
from resnest_fused.cli.app import app, main
from resnest_fused.cli.compare import _Backend, _describe_speed
from resnest_fused.cli.convert import _Layout
from resnest_fused.cli.devices import find_device
from resnest_fused.measure.timing import Speedup
from resnest_fused.models import images, registry
from resnest_fused.models.checkpoints import LAYOUTS
from resnest_fused.models.imagenet import class_names

_PHOTOS = Path(sklearn.datasets.__file__).parent / "images"
CHINA, FLOWER = str(_PHOTOS / "china.jpg"), str(_PHOTOS / "flower.jpg")


RANDOM_WEIGHTS = "random weights: the classes mean nothing; give --weights\n"


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, [*arguments])
    # Any other exception would be a traceback on a user's screen.
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def tiny_network(num_classes: int = 1000) -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        SplitAttentionConv2d(8, 8, 3, padding=1),
        SplitAttentionConv2d(8, 32, 3, stride=2, padding=1, cardinality=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    network.add_module("fc", nn.Linear(32, num_classes))
    return network


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets compare run a small network at 48 pixels instead of a ResNeSt-50."""
    put_in_place(monkeypatch, tiny_network, 48)


def put_in_place(
    monkeypatch: pytest.MonkeyPatch, build: Callable[..., nn.Module], size: int
) -> None:
    def builder(*, fused: bool, **options: int) -> nn.Module:
        assert not fused
        return build(**options)

    monkeypatch.setitem(registry.BUILDERS, "resnest50", builder)
    monkeypatch.setattr(registry._Ours, "preprocessing", lambda *_: (size, None))


def break_attention(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]) -> None:
    """Apply ``spoil`` to the output of every fused attention."""
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
    assert "Too few --repeats to tell speed from noise: 1, at least 6." in result.output
    assert result.stderr == ""


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--dtype", "float64"),
        ("--dtype", "bf16", "--channels-last"),
        ("--dtype", "fp16", "--device", "cpu"),
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
    assert re.search(r"backend +reference *\n", result.output) or "reference" not in options
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "float64": "float64"}
    assert dtypes.get([*options, "", ""][1], "float32") in result.output
    assert re.search(rf"device +cpu, {torch.get_num_threads()} threads", result.output)
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
    # Classes are proven once, here before the mistake, so the measured errors must show it.
    assert run("compare", "--repeats", "1").exit_code == 0
    # The same values forward, 1 % more backward.
    break_attention(monkeypatch, lambda out: out + (out - out.detach()) * 0.01)
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
    # Traced as usual, but without minutes of C++ compilation.
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
    assert result.stderr == "resnest-fused: Invalid value for '--compile': no C++ compiler found\n"


@pytest.mark.usefixtures("tiny")
def test_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pth"
    torch.save(tiny_network().state_dict(), path)
    result = run("compare", "--repeats", "1", "--weights", str(path))
    assert result.exit_code == 0, result.output
    assert "tiny.pth" in "".join(result.output.split())
    assert "random: classes" not in result.output


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("train", [False, True])
def test_weights_of_another_number_of_classes(tmp_path: Path, train: bool) -> None:
    """The targets of a training step are of these classes, too."""
    path = tmp_path / "three.pth"
    torch.save(tiny_network(num_classes=3).state_dict(), path)
    arguments = ("--weights", str(path), "--repeats", "1", *(["--train"] if train else []))
    result = run("compare", *arguments)
    assert result.exit_code == 0, result.output
    assert train or re.search(r"picture +[012] [012] [012] +[012] [012] [012] +ok", result.output)


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
        (
            ("--model", "resnest5"),
            "resnest_fused has no model resnest5; did you mean resnest50? Known are resnest14, ",
        ),
        (("--model", "hub:resnest50"), "unknown source 'hub'"),
        (("--model", "official:resnest50"), "package resnest cannot be imported"),
        (("--model", "timm:resnest50d"), "try pip install timm"),
        (("--dtype", "int8"), "'int8' is not one of 'fp32', 'fp64', 'bf16', 'fp16', 'float32'"),
        (("--device", "tpu"), "expected cpu, cuda or cuda:N, got 'tpu'"),
        (("--device", "cuda:9"), "PyTorch sees no GPU, got 'cuda:9'"),
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
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    option = "--batch" if "--batch" in arguments else arguments[0]
    assert_refused(run("compare", *arguments), option, reason)


def assert_refused(result: Result, option: str, reason: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith(f"resnest-fused: Invalid value for '{option}': ")
    assert reason in line


def test_a_network_without_split_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, lambda: nn.Conv2d(3, 4, 1), 8)
    assert_refused(run("compare"), "--model", "no split attention that can be fused")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes resnest50 a small network with 1000 classes; returns a checkpoint of it."""
    options = {"planes": (8, 16, 32, 64), "num_classes": 1000}

    def builder(**given: object) -> nn.Module:
        return models.resnest14(**options | given)

    monkeypatch.setitem(registry.BUILDERS, "resnest50", builder)
    torch.manual_seed(3)
    models.save_checkpoint(builder(), tmp_path / "narrow.safetensors", "mm")
    return tmp_path / "narrow.safetensors"


def test_predict(narrow: Path) -> None:
    result = run("predict", CHINA, FLOWER, "--weights", str(narrow), "--top", "3")
    assert result.exit_code == 0 and result.stderr == ""
    rows = re.findall(r"^ *(\d+) +(\S.*?) +(\d+\.\d) %$", result.stdout, re.MULTILINE)
    assert len(rows) == 6 and CHINA in result.stdout.splitlines()
    names = class_names()
    assert all(names[int(number)] == name for number, name, _ in rows)
    model = models.create("resnest50", narrow).eval()
    with torch.inference_mode():
        x = images.preprocess(images.read_image(CHINA))[None]
        odds, best = model(x).softmax(1).topk(3)
    assert [int(number) for number, _, _ in rows[:3]] == best[0].tolist()
    found = json.loads(run("predict", CHINA, "--weights", str(narrow), "--format", "json").stdout)
    assert [guess["number"] for guess in found[0]["classes"][:3]] == best[0].tolist()
    shown = [guess["probability"] for guess in found[0]["classes"][:3]]
    assert shown == pytest.approx(odds[0].tolist(), rel=1e-4)


def test_predict_a_folder(narrow: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.JPG", "more/c.webp")):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(folder / name)
    for name in ("notes.txt", "film.mpg", "data.h5"):
        (folder / name).write_text("no picture")
    arguments = ("predict", str(folder), "--weights", str(narrow), "--top", "1")
    result = run(*arguments, "--format", "csv", "--batch", "2")
    header, *rows = csv.reader(result.stdout.splitlines())
    assert header == ["photo", "rank", "number", "name", "probability"]
    assert [Path(row[0]).name for row in rows] == ["a.JPG", "b.png", "c.webp"]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {i}" for i in range(1000)))
    result = run(*arguments, "--format", "csv", "--classes", str(names))
    assert [row[3] for row in csv.reader(result.stdout.splitlines()[1:])] == [
        f"thing {row[2]}" for row in rows
    ]


def test_predict_goes_on_after_a_photo_that_it_cannot_read(narrow: Path, tmp_path: Path) -> None:
    """It is named and counted, and the exit code tells."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("a.png", "c.jpg", "d.jpg")):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(folder / name)
    (folder / "b.png").write_text("no picture")
    (folder / "d.jpg").write_bytes((folder / "d.jpg").read_bytes()[:400])
    for batch in ("1", "8"):
        arguments = ("predict", str(folder), "--weights", str(narrow), "--batch", batch)
        for form, named in (("csv", 5), ("json", 1)):
            result = run(*arguments, "--format", form)
            assert result.exit_code == 1
            assert [result.stdout.count(f"{n}.") for n in "abcd"] == [named, 0, named, 0]
            first, second, last = result.stderr.splitlines()
            assert first == f"resnest-fused: {folder}/b.png: not an image that Pillow can read"
            assert second.startswith(f"resnest-fused: {folder}/d.jpg: cannot be decoded (")
            assert last == "resnest-fused: 2 of 4 photos could not be read"
    result = run("predict", str(folder / "b.png"), "--weights", str(narrow))
    assert (result.exit_code, result.stdout) == (1, "")


def test_names_of_files_may_hold_any_bytes(
    narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", name)
    photos = ["predict", os.fsdecode(name), "--weights", str(narrow), "--top", "1"]
    found = {}
    for form in ("csv", "json", "table"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", write_through=True))
        monkeypatch.setattr(sys, "argv", ["resnest-fused", *photos, "--format", form])
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
        found[form] = written.getvalue()
    assert name in found["table"].splitlines()
    # For programs in UTF-8, which the name is not.
    shown = f"{tmp_path}/caf\\xe9.png"
    assert next(csv.reader(found["csv"].decode().splitlines()[1:]))[0] == shown
    assert json.loads(found["json"])[0]["photo"] == shown


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_predict_refuses_weights_that_give_no_numbers(
    form: str, narrow: Path, tmp_path: Path
) -> None:
    state = models.read_checkpoint(narrow).state
    torch.save(state | {"fc.bias": torch.full((1000,), torch.nan)}, tmp_path / "nan.pth")
    result = run("predict", CHINA, "--weights", str(tmp_path / "nan.pth"), "--format", form)
    assert_refused(result, "--weights", "probabilities are not finite")
    assert result.stdout == ""
    torch.save({"student": {}, "params_ema": state}, tmp_path / "two.pth")
    weights = ("--weights", str(tmp_path / "two.pth"), "--format", form)
    assert_refused(run("predict", CHINA, *weights), "--weights", "entry= takes one of 'params_ema'")
    assert run("predict", CHINA, *weights, "--entry", "params_ema").exit_code == 0
    models.convert_checkpoint(narrow, tmp_path / "body.pth", "d2")
    result = run("predict", CHINA, "--weights", str(tmp_path / "body.pth"), "--format", form)
    assert_refused(result, "--weights", "a backbone's, without a classifier to predict by")


@pytest.mark.usefixtures("narrow")
def test_predict_with_random_weights_says_so(tmp_path: Path) -> None:
    result = run("predict", CHINA)
    assert result.exit_code == 0 and "random weights: the classes mean nothing" in result.stderr
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.txt").write_text("a\nb")
    (tmp_path / "none.txt").touch()
    for option, arguments, reason in (
        ("PHOTO", (str(tmp_path / "absent.jpg"),), "not a file that exists"),
        ("PHOTO", (str(tmp_path / "empty"),), "a folder without pictures"),
        ("--model", (CHINA, "--model", "vgg"), "has no model vgg"),
        ("--weights", (CHINA, "--weights", CHINA), "truncated, damaged, or not a checkpoint"),
        ("--weights", (CHINA, "--weights", "http://x/y.pth"), "only with its sha256"),
        (
            "--classes",
            (CHINA, "--classes", str(tmp_path / "two.txt")),
            "expected 1000 names, got 2",
        ),
        ("--classes", (CHINA, "--classes", str(tmp_path / "none.txt")), "1000 names, got 0"),
        # Before the photos, none of which can be read.
        ("--classes", (__file__, "--classes", str(tmp_path / "no.txt")), "cannot be read"),
        ("--device", (CHINA, "--device", "tpu"), "expected cpu, cuda or cuda:N"),
        ("--sha256", (CHINA, "--sha256", "0" * 8), "expected --weights beside it"),
        ("--entry", (CHINA, "--entry", "ema"), "expected --weights beside it"),
    ):
        assert_refused(run("predict", *arguments), option, reason)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("models",),
        ("models", "--json"),
        ("info",),
        ("predict", CHINA, "--format", "csv"),
        ("predict", CHINA, "--format", "json", "--top", "900"),
        ("compare", "--repeats", "1"),
    ],
    ids=" ".join,
)
def test_output_that_cannot_be_written(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk is one sentence, and a pipe whose reader has seen enough is none."""
    reader, writer = os.pipe()
    os.close(reader)
    for file, told in (("/dev/full", True), (writer, False)):
        with open(file, "wb") as buffer:
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer))
            monkeypatch.setattr(sys, "argv", ["resnest-fused", *arguments])
            with pytest.raises(SystemExit, match=r"^2$"):
                main()
        sentence = "resnest-fused: what it prints cannot be written (No space left on device)\n"
        said = capsys.readouterr().err.replace(RANDOM_WEIGHTS, "")
        assert said == (sentence if told else "")


def test_output_that_cannot_be_written_at_the_end_of_a_process(tmp_path: Path) -> None:
    """Python writes what is left at its own end, after the command's."""
    program = tmp_path / "resnest-fused"
    program.write_text("from resnest_fused.cli import main\nmain()\n")
    with open("/dev/full", "w") as full:
        result = in_a_new_process("--version", module=(str(program),), stdout=full)
    assert result.returncode == 2 and result.stderr.count("\n") == 1


@pytest.mark.parametrize("columns", ["80", "40"])
def test_models(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a narrow screen, too, no name and no number is broken."""
    monkeypatch.setenv("COLUMNS", columns)
    result = run("models")
    assert result.exit_code == 0 and max(map(len, result.output.splitlines())) <= 80
    assert re.search(
        r"^resnest50 +27.5 M +5.37 +224 +81.03 +official *$", result.output, re.MULTILINE
    )
    assert re.search(r"^resnest152 +65.3 M +18.17 +256 +- +- *$", result.output, re.MULTILINE)
    assert "as published by the official repository" in " ".join(result.output.split())
    listed = json.loads(run("models", "--json").stdout)
    assert [variant["name"] for variant in listed] == models.list_models()


def test_convert(narrow: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    result = run("convert", str(narrow), str(out), "--to", "d2")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "MMPretrain's layout, under backbone., " in said
    assert "left out fc.bias, fc.weight: the layout has none" in said
    original, found = (models.read_checkpoint(path).state for path in (narrow, out))
    assert all(torch.equal(value, original[key]) for key, value in found.items())
    (tmp_path / "text.pth").write_text("no checkpoint")
    for arguments, reason in (
        (("text.pth", "new.pth"), "truncated, damaged, or not a checkpoint"),
        (("absent.pth", "new.pth"), "not a file that exists"),
        (("out.pth", "no/new.pth"), "cannot be written"),
        (("out.pth", "new.pth", "--sha256", "0" * 8), "expected the sha256 00000000, got"),
        (("out.pth", "new.pth", "--prefix", "body."), "nothing in it begins with 'body.'"),
        (("out.pth", "new.pth", "--entry", "ema"), "no state_dict under 'ema'"),
    ):
        files = [str(tmp_path / name) for name in arguments[:2]]
        blamed = "OUT" if "written" in reason else "IN"
        assert_refused(run("convert", *files, "--to", "mm", *arguments[2:]), blamed, reason)
    stride = ("--to", "mm", "--output-stride")
    assert_refused(
        run("convert", str(out), str(tmp_path / "new.pth"), *stride, "4"),
        "--output-stride",
        "expected 8, 16 or 32, got 4",
    )
    assert not (tmp_path / "new.pth").exists()
    assert run("convert", str(out), str(tmp_path / "dilated.pth"), *stride, "8").exit_code == 0
    names = torch.load(tmp_path / "dilated.pth")
    for stage, index in ((1, 0), (2, 1), (3, 0), (4, 0)):
        assert f"backbone.layer{stage}.0.downsample.{index}.weight" in names
    assert run("convert", str(out), str(out), "--to", "keras").exit_code == 2
    assert tuple(layout.value for layout in _Layout) == tuple(sorted(LAYOUTS, key=_order))


def _order(layout: str) -> int:
    return ("official", "timm", "mm", "mmdet", "d2", "gluon").index(layout)


@pytest.mark.parametrize("arguments", [("no-such-command",), ("compare", "--no-such-option")])
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
    output = run("info").output
    assert re.search(r"native +no +it was left out", output)
    assert re.search(r"native kernels +cannot run: it was left out", output)
    refused = run("compare", "--backend", "native")
    assert_refused(refused, "--backend", "native cannot run: it was left out")


def test_info_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RESNEST_FUSED_")]:
        monkeypatch.delenv(name)
    result = run("info", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["resnest_fused"]["version"] == rf.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["backends"] == [status._asdict() for status in rf.backends()]
    assert facts["native"]["unavailable"] is native.unavailable() is None
    assert facts["native"]["compiler"] == native.build_info()["compiler"]
    assert facts["environment"] == [
        {
            "name": "TRITON_INTERPRET",
            "value": "1",
            "effect": "Triton's slow interpreter, on CPU tensors: 1 is on, 0 off",
            "wrong": False,
        }
    ]


def in_a_new_process(
    *arguments: str,
    module: tuple[str, ...] = ("-m", "resnest_fused"),
    stdout: Any = subprocess.PIPE,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """The command line; the package reads its variables when it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RESNEST_FUSED_")}
    path = os.pathsep.join([str(Path(rf.__file__).parents[1]), *sys.path])
    return subprocess.run(
        [sys.executable, *module, *arguments],
        env={**inherited, "PYTHONPATH": path, "COLUMNS": "200", **variables},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("variables", "rows"),
    [
        (
            {
                "RESNEST_FUSED_BACKEND": "reference",
                "RESNEST_FUSED_CPU_CAPABILITY": "baseline",
                "RESNEST_FUSED_CUDA_TUNING": os.devnull,
                "RESNEST_FUSED_AUTOTUNE": "1",
                "RESNEST_FUSED_SKIP_NATIVE": "1",
            },
            (
                "RESNEST_FUSED_BACKEND reference calls whose backend is auto run on reference",
                "RESNEST_FUSED_CPU_CAPABILITY baseline the CPU kernels use baseline instructions",
                "RESNEST_FUSED_CUDA_TUNING /dev/null launches of CUDA kernels are planned with the "
                "values in /dev/null",
                "RESNEST_FUSED_AUTOTUNE 1 timing of Triton's block sizes at first calls: 1 is on, "
                "0 off",
                "RESNEST_FUSED_SKIP_NATIVE 1 read by pip install; without effect now",
            ),
        ),
        (
            {
                "RESNEST_FUSED_BACKEND": "triton",
                "RESNEST_FUSED_CPU_CAPABILITY": "mmx",
                "RESNEST_FUSED_AUTOTUNE": "yes",
                "RESNEST_FUSED_BACKENDS": "native",
                "RESNEST_FUSED_CUDA": "",
                "TRITON_INTERPRET": "",
            },
            (
                "native kernels cannot run: RESNEST_FUSED_CPU_CAPABILITY: expected baseline, avx2 "
                "or avx512, got 'mmx'",
                "RESNEST_FUSED_BACKEND triton WRONG: triton cannot run: RESNEST_FUSED_AUTOTUNE: "
                "expected 0 or 1, got 'yes'",
                "RESNEST_FUSED_CPU_CAPABILITY mmx WRONG: expected baseline, avx2 or avx512, got "
                "'mmx'",
                "RESNEST_FUSED_AUTOTUNE yes WRONG: expected 0 or 1, got 'yes'",
                "RESNEST_FUSED_BACKENDS native WRONG: no such variable; did you mean "
                "RESNEST_FUSED_BACKEND?",
            ),
        ),
        (
            {"RESNEST_FUSED_BACKEND": "abacus"},
            (
                "RESNEST_FUSED_BACKEND abacus WRONG: expected one of auto, native, triton, "
                "reference, got 'abacus'",
            ),
        ),
    ],
    ids=["right", "wrong", "no backend"],
)
def test_info_shows_what_variables_do(variables: dict[str, str], rows: tuple[str, ...]) -> None:
    result = in_a_new_process("info", **variables)
    assert result.returncode == 0, result.stderr
    said = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert [row for row in rows if row not in said] == [], result.stdout
    assert not any(line.startswith("RESNEST_FUSED_CUDA ") for line in said)


@pytest.mark.usefixtures("tiny")
def test_compare_shows_what_variables_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with rf.use_backend("reference"):  # as the variable does on import
        result = run("compare", "--repeats", "1")
        assert re.search(r"backend +reference, as no fused one can run; see info", result.output)
        monkeypatch.setenv("RESNEST_FUSED_BACKEND", "reference")
        result = run("compare", "--repeats", "1")
    assert re.search(r"backend +reference *\n", result.output)
    assert re.search(r"RESNEST_FUSED_BACKEND +reference: calls whose backend is", result.output)


def test_compare_names_wrong_variables() -> None:
    result = in_a_new_process("compare", RESNEST_FUSED_BACKEND="abacus")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "resnest-fused: Invalid value: RESNEST_FUSED_BACKEND: expected one of auto, native, "
        "triton, reference, got 'abacus'\n"
    )


@pytest.mark.parametrize(
    "arguments", [(), ("info",), ("compare",), ("models",), ("predict",), ("convert",)]
)
def test_help(arguments: tuple[str, ...]) -> None:
    assert tuple(backend.value for backend in _Backend) == NAMES
    result = run(*arguments, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    for absent in ("<bool>", "BOOLEAN", "…"):
        assert absent not in result.output
    if not arguments:
        bare = run()
        assert (bare.exit_code, bare.stdout.split()) == (0, result.stdout.split())


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"resnest-fused {rf.__version__}\n")
    assert in_a_new_process("--version").stdout == result.stdout


LOADED = """
import runpy, sys
try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
finally:
    print("torch" in sys.modules, hasattr(sys.modules["resnest_fused"], "fuse"), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("name", "arguments", "loaded"),
    [
        ("resnest-fused", ("--help",), False),
        ("resnest-fused", ("compare", "--help"), False),
        ("resnest-fused", ("--version",), False),
        ("resnest-fused", ("compare", "--no-such-option"), False),
        ("resnest-fused", ("info",), True),
        ("other-program", ("--help",), True),
    ],
)
def test_torch_is_imported_when_a_command_runs(
    name: str, arguments: tuple[str, ...], loaded: bool, tmp_path: Path
) -> None:
    """In every other program torch is imported together with the package."""
    program = tmp_path / name
    program.write_text("from resnest_fused.cli import main\nmain()\n")
    result = in_a_new_process(str(program), *arguments, module=("-c", LOADED))
    assert result.stderr.splitlines()[-1] == f"{loaded} {loaded}", result.stderr


def test_the_gpu_is_the_default_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert find_device(None) == find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(typer.BadParameter, match="PyTorch sees 2 GPUs, got 'cuda:2'"):
        find_device("cuda:2")


@pytest.mark.parametrize(
    ("ratios", "rounds", "expected"),
    [
        ([1.05, 1.06, 1.08, 1.10, 1.11] * 2, 10, "It is 1.08x as fast: 1.06x to 1.10x (20-80 %"),
        ([0.93] * 10, 10, "It is 0.93x as fast: 0.93x to 0.93x (20-80 % of 10 rounds)."),
        ([1.2, 1.3, 1.5, 2.1, 2.2] * 2, 10, "It is faster, but unevenly: 1.28x to 2.12x (20-80 %"),
        ([0.5, 0.9] * 5, 10, "It is slower, but unevenly: 0.50x to 0.90x"),
        ([0.95, 1.07] * 5, 10, "The speed-up cannot be told from noise: 0.95x to 1.07x"),
        ([1.5] * 5, 5, "Too few --repeats to tell speed from noise: 5, at least 6."),
    ],
)
def test_speed_is_told_with_its_spread(ratios: list[float], rounds: int, expected: str) -> None:
    said = _describe_speed(Speedup.of(ratios, [1.0] * len(ratios)), rounds)
    assert said.startswith(expected)


def test_no_module_hides_behind_a_function() -> None:
    """A function with the name of a module in its package would hide it."""
    for package in (rf.cli, rf.measure, models, models.checkpoints):
        folder = Path(package.__file__).parent
        for name in {path.stem for path in folder.glob("*.py")} - {"__init__"}:
            assert not callable(getattr(package, name, None)), f"{package.__name__}.{name}"


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
    assert_refused(refused, "--model", "has no model resnet50; did you mean resnest50?")


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
