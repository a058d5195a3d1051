"""Checkpoints: every layout, wrapper and prefix, whole or not at all, and every wrong file."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from test_family import SMALL, Shifted, small
from torch import Tensor, nn

from resnest_fused import models
from resnest_fused.models import CheckpointError
from resnest_fused.models.checkpoints import LAYOUTS

State = dict[str, Tensor]


def randomised(model: nn.Module) -> nn.Module:
    """Every tensor gets values of its own, the counters too."""
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            tensor.fill_(index)
        else:
            tensor.copy_(torch.randn_like(tensor))
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomised(small())


@pytest.fixture(scope="module")
def state(model: nn.Module) -> State:
    return model.state_dict()


def assert_same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert all(found[key].dtype == expected[key].dtype for key in expected)


# Names of each layout, written down one by one, and their official names.
NAMES = {
    "timm": {
        "conv1.6.weight": "conv1.6.weight",
        "layer1.0.conv2.bn0.bias": "layer1.0.conv2.bn0.bias",
    },
    "mm": {
        "backbone.stem.0.conv.weight": "conv1.0.weight",
        "backbone.stem.1.bn.running_var": "conv1.4.running_var",
        "backbone.stem.2.conv.weight": "conv1.6.weight",
        "backbone.stem.2.bn.bias": "bn1.bias",
        "backbone.layer1.0.downsample.0.weight": "layer1.0.downsample.1.weight",
        "backbone.layer1.0.downsample.1.bias": "layer1.0.downsample.2.bias",
        "backbone.layer2.0.downsample.1.weight": "layer2.0.downsample.1.weight",
        "backbone.layer2.0.conv2.fc1.bias": "layer2.0.conv2.fc1.bias",
        "backbone.layer4.0.bn3.weight": "layer4.0.bn3.weight",
        "head.fc.weight": "fc.weight",
    },
    "mmdet": {
        "stem.0.weight": "conv1.0.weight",
        "stem.4.running_mean": "conv1.4.running_mean",
        "stem.7.num_batches_tracked": "bn1.num_batches_tracked",
        "layer1.0.downsample.1.weight": "layer1.0.downsample.1.weight",
        "layer3.0.bn1.bias": "layer3.0.bn1.bias",
    },
    "d2": {
        "backbone.bottom_up.stem.conv1_1.weight": "conv1.0.weight",
        "backbone.bottom_up.stem.conv1_2.norm.bias": "conv1.4.bias",
        "backbone.bottom_up.stem.conv1_3.norm.weight": "bn1.weight",
        "backbone.bottom_up.res2.0.conv1.weight": "layer1.0.conv1.weight",
        "backbone.bottom_up.res2.0.conv1.norm.weight": "layer1.0.bn1.weight",
        "backbone.bottom_up.res5.0.conv2.bn1.bias": "layer4.0.conv2.bn1.bias",
        "backbone.bottom_up.res5.0.conv3.norm.running_var": "layer4.0.bn3.running_var",
        "backbone.bottom_up.res3.0.shortcut.weight": "layer2.0.downsample.1.weight",
        "backbone.bottom_up.res3.0.shortcut.norm.bias": "layer2.0.downsample.2.bias",
    },
    "gluon": {
        "conv1.1.gamma": "conv1.1.weight",
        "layer1.0.conv2.bn.beta": "layer1.0.conv2.bn0.bias",
        "layer1.0.conv2.bn1.gamma": "layer1.0.conv2.bn1.weight",
        "layer1.0.conv2.fc1.bias": "layer1.0.conv2.fc1.bias",
        "fc.weight": "fc.weight",
    },
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_are_bitwise(
    layout: str, suffix: str, model: nn.Module, state: State, tmp_path: Path
) -> None:
    path, back = tmp_path / f"there{suffix}", tmp_path / f"back{suffix}"
    left_out = models.save_checkpoint(model, path, layout)
    heads = {"fc.weight", "fc.bias"} if layout in ("mmdet", "d2") else set()
    counters = {k for k in state if k.endswith("num_batches_tracked") and layout == "gluon"}
    assert set(left_out) == heads | counters
    written = models.read_checkpoint(path)
    kept = {key: value for key, value in state.items() if key not in left_out}
    assert_same(written.state, kept)
    raw = safetensors.torch.load_file(path) if suffix == ".safetensors" else torch.load(path)
    for theirs, official in NAMES.get(layout, {}).items():
        assert torch.equal(raw[theirs], state[official])
    assert not set(raw) & set(state) or layout in ("official", "timm", "mmdet", "gluon")
    # Into a network; the parts that the layout lacks are left as they are.
    twin = small(seed=1)
    models.load_checkpoint(twin, path, leave_out=("fc",) if heads else ())
    assert_same({k: v for k, v in twin.state_dict().items() if k in kept}, kept)
    assert models.convert_checkpoint(path, back, "official") == []
    assert_same(models.read_checkpoint(back).state, kept)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


WRAPPERS: dict[str, Callable[[State], object]] = {
    "itself": lambda s: s,
    "ordered": OrderedDict,
    "model": lambda s: {"model": s, "epoch": 3},
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": s},
    "ema": lambda s: {"ema": s},
    "nested": lambda s: {"state_dict": {"model": s}},
    "averaged": lambda s: {
        "model_ema": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in s.items()}}
    },
    "weights and ema": lambda s: {
        "state_dict_ema": {k: torch.zeros_like(v) for k, v in s.items()},
        "state_dict": s,
    },
}
PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "net.encoder.")


@pytest.mark.parametrize("layout", ["official", "mm", "d2"])
def test_wrappers_and_prefixes(layout: str, state: State, tmp_path: Path) -> None:
    state = {key: value.flatten()[:1].clone() for key, value in state.items()}
    content = LAYOUTS[layout].from_official(state)
    expected = {k: v for k, v in state.items() if layout != "d2" or k[:3] != "fc."}
    path = tmp_path / "file.pth"

    def assert_read(wrap: Callable[[State], object], prefix: str) -> None:
        torch.save(wrap({f"{prefix}{key}": value for key, value in content.items()}), path)
        assert_same(models.read_checkpoint(path).state, expected)

    for wrap in WRAPPERS.values():
        assert_read(wrap, "module.")
    for prefix in ("", *PREFIXES):
        assert_read(WRAPPERS["model"], prefix)
    torch.save({k.replace("0.conv2.", "0.conv2._orig_mod."): v for k, v in content.items()}, path)
    assert_same(models.read_checkpoint(path).state, expected)


@pytest.mark.parametrize("outer", ["", "module.", "model."])
@pytest.mark.parametrize("inner", ["body.", "timm_model."])
def test_mmpretrain_s_classifiers_around_other_backbones(
    outer: str, inner: str, state: State, tmp_path: Path
) -> None:
    """Ours by its registration file, and timm's."""
    content = {
        f"{outer}head.{key}" if key[:3] == "fc." else f"{outer}backbone.{inner}{key}": value
        for key, value in state.items()
    }
    torch.save({"meta": {}, "state_dict": content}, tmp_path / "trained.pth")
    found = models.create("resnest14", tmp_path / "trained.pth", planes=SMALL["planes"])
    assert_same(found.state_dict(), state)


def test_one_of_several_state_dicts_is_asked_for(state: State, tmp_path: Path) -> None:
    path = tmp_path / "both.pth"
    torch.save({"state_dict": state, "ema": {k: v + 1 for k, v in state.items()}}, path)
    found = models.read_checkpoint(path, entry="ema")
    assert_same(found.state, {k: v + 1 for k, v in state.items()})
    with pytest.raises(CheckpointError, match=r"under 'best'; it has 'state_dict', 'ema'$"):
        models.read_checkpoint(path, entry="best")
    torch.save({"student": state, "params_ema": state, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"; entry= takes one of 'student', 'params_ema'$"):
        models.read_checkpoint(path)
    assert_same(models.read_checkpoint(path, entry="params_ema").state, state)
    torch.save({"model": {"name": "resnest"}, "ema_weights": state}, path)
    with pytest.raises(CheckpointError, match=r"under 'name'; entry= takes one of 'ema_weights'$"):
        models.read_checkpoint(path)
    torch.save({"model": {"body": state, "head": state}}, path)
    with pytest.raises(CheckpointError, match=r"got (dict|OrderedDict) under 'body'$"):
        models.read_checkpoint(path)


def test_a_part_of_a_detector(state: State, tmp_path: Path) -> None:
    path = tmp_path / "detector.pth"
    body = {f"backbone.{k}": v for k, v in LAYOUTS["mmdet"].from_official(state).items()}
    torch.save({"state_dict": body | {"neck.weight": torch.ones(1)}}, path)
    options = {"planes": SMALL["planes"]}
    with pytest.raises(CheckpointError) as caught:
        models.backbone("resnest14", path, **options)
    end = "1 unexpected (neck.weight); prefix='backbone.' takes what stands under it alone"
    assert str(caught.value).endswith(end)
    part = models.read_checkpoint(path, prefix="backbone.")
    assert part.layout.name == "mmdet"
    found = models.backbone("resnest14", part, **options).state_dict()
    assert_same(found, {key: value for key, value in state.items() if key[:3] != "fc."})
    with pytest.raises(CheckpointError, match=r"nothing in it begins with 'body.'"):
        models.read_checkpoint(path, prefix="body.")


def test_a_head_of_another_size_is_left_out_by_name(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "ten.pth"
    models.save_checkpoint(model, path)
    narrow = {"planes": SMALL["planes"], "num_classes": 3}
    with pytest.raises(CheckpointError, match=r"2 of another .*; leave_out=\('fc',\) keeps the"):
        models.create("resnest14", path, **narrow)
    other = models.create("resnest14", path, leave_out=("fc",), **narrow)
    assert other.fc.out_features == 3
    assert torch.equal(other.layer4[0].bn3.weight, model.layer4[0].bn3.weight)
    with pytest.raises(CheckpointError, match=r"^leave_out: the model has no 'head'$"):
        models.load_checkpoint(model, path, leave_out=("head",))
    with pytest.raises(CheckpointError, match=r"^leave_out: expected several names, got 'fc'$"):
        models.create("resnest14", path, leave_out="fc", **narrow)


def test_a_network_without_memory_takes_no_weights(model: nn.Module, tmp_path: Path) -> None:
    models.save_checkpoint(model, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"^the model is on the device meta, where it has no"):
        models.load_checkpoint(small().to("meta"), tmp_path / "file.pth")


def test_frozen_norms_have_no_counters(state: State, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "frozen.pth"
    bare = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(bare, path)
    twin = small(seed=1)
    models.load_checkpoint(twin, path)
    assert_same({k: v for k, v in twin.state_dict().items() if k in bare}, bare)
    torch.save(state, path)
    frozen = small(norm_layer=lambda features: nn.GroupNorm(4, features))
    with pytest.raises(CheckpointError, match=r"\d+ unexpected \(conv1.1.running_mean, "):
        models.load_checkpoint(frozen, path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_urls(server: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / "resnest.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    url = f"{server}/resnest.pth"
    with pytest.raises(CheckpointError, match=r"a URL is downloaded only with its sha256$"):
        models.create("resnest14", url, **SMALL)
    with pytest.raises(CheckpointError, match=f"expected the sha256 {'0' * 64}, got {digest}$"):
        models.read_checkpoint(url, sha256="0" * 64)
    assert not list((tmp_path / "hub/checkpoints").iterdir())
    for name, given in ((url, digest), (url.replace("http", "HTTP"), digest[:8].upper())):
        found = models.create("resnest14", name, sha256=given, **SMALL)
        assert_same(found.state_dict(), state)
    path.unlink()  # what was downloaded once is not downloaded again, and is verified again
    assert_same(models.read_checkpoint(url, sha256=digest).state, state)
    (kept,) = (tmp_path / "hub/checkpoints").iterdir()
    kept.write_bytes(b"other")
    with pytest.raises(CheckpointError, match="expected the sha256"):
        models.read_checkpoint(url, sha256=digest)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(HTTP Error 404"):
        models.read_checkpoint(url, sha256=digest)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="expected the sha256 00000000, got "):
        models.read_checkpoint(path, sha256="00000000")


def without(*keys: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


# What is in the file, and what is said of it. A file of bytes is written as it is.
WRONG: dict[str, tuple[object, str]] = {
    "empty": (b"", "truncated, damaged, or not a checkpoint"),
    "text": (b"weights", "truncated, damaged, or not a checkpoint"),
    "a web page": (b"<!DOCTYPE html><html>", "truncated, damaged, or not a checkpoint"),
    "half": ("half", "truncated, damaged, or not a checkpoint"),
    "a zip of something else": (b"PK\x03\x04" + bytes(40), "truncated, damaged, or not a"),
    "a list": (lambda s: list(s.values()), "expected a state_dict, got list"),
    "nothing": (lambda s: {}, "got dict without entries"),
    "an empty entry": (lambda s: {"state_dict": {}}, "got dict without entries"),
    "no tensors": (lambda s: {"epoch": 3}, "tensors by name, got int under 'epoch'"),
    "a number among them": (lambda s: s | {"step": 7}, "got int under 'step'"),
    "numbers as names": (lambda s: dict(enumerate(s.values())), "got a torch.float32, .* under 0"),
    "sparse": (
        lambda s: s | {"fc.bias": torch.eye(2).to_sparse()},
        "torch.sparse_coo tensor on cpu",
    ),
    "complex": (lambda s: s | {"fc.bias": torch.ones(10) * 1j}, "a torch.complex64"),
    "objects": (lambda s: {"state_dict": s, "a": SimpleNamespace()}, "holds types.SimpleNamespace"),
    "a whole model": (lambda s: nn.Linear(1, 1), "holds torch.nn.modules.linear.Linear"),
    "a count of averages alone": (lambda s: {"n_averaged": torch.tensor(3)}, r"\d+ missing "),
    "another network": (lambda s: nn.Linear(1, 1).state_dict(), r"\d+ missing .*; 2 unexpected"),
    "a missing tensor": (without("layer1.0.bn3.bias"), r": 1 missing \(layer1.0.bn3.bias\)$"),
    "a missing counter": (without("bn1.num_batches_tracked"), "1 missing .bn1.num_batches_tracked"),
    "no classifier": (without("fc.weight", "fc.bias"), r"2 missing .*; leave_out=\('fc',\) keeps"),
    "one more": (lambda s: s | {"fc2.bias": torch.ones(1)}, r": 1 unexpected \(fc2.bias\)$"),
    "one without a module": (
        lambda s: s | {"scale": torch.ones(1)},
        r": 1 unexpected \(scale\)$",
    ),
    "integers": (
        lambda s: s | {"bn1.bias": torch.ones(64, dtype=torch.int8)},
        r": 1 not of floating point \(bn1.bias torch.int8\)$",
    ),
    "everything twice": (
        lambda s: s | {f"net.{k}": v for k, v in s.items()},
        r"\d+ unexpected \(net.conv1.0.weight, ",
    ),
    "some twice": (
        lambda s: {f"net.{k}": v for k, v in s.items()} | {"fc.bias": s["fc.bias"]},
        r"has some tensors twice, with and without 'net.' in front$",
    ),
    "another shape": (
        lambda s: s | {"bn1.bias": torch.ones(9)},
        r": 1 of another shape \(bn1.bias \(9,\) for \(64,\)\)$",
    ),
    "a transposed kernel": (
        lambda s: s | {"conv1.0.weight": s["conv1.0.weight"].permute(2, 3, 1, 0)},
        r"1 of another shape \(conv1.0.weight \(3, 3, 3, 32\) for \(32, 3, 3, 3\)\)$",
    ),
    "another depth": (
        lambda s: s | {k.replace("layer1.0", "layer1.1"): v for k, v in s.items()},
        r"\d+ unexpected \(layer1.1.conv1.weight, .*; its stages have \(2, 1, 1, 1\) blocks",
    ),
    "safetensors, half": ("half.safetensors", "truncated, damaged, or not safetensors"),
    "safetensors, text": (b"weights", "truncated, damaged, or not safetensors"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_clear_sentence(name: str, state: State, tmp_path: Path) -> None:
    content, message = WRONG[name]
    path = tmp_path / ("file.safetensors" if "safetensors" in name else "file.pth")
    if content == "half.safetensors":
        safetensors.torch.save_file(state, path)
    elif content == "half":
        torch.save(state, path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content(state), path)  # type: ignore[operator]
    if isinstance(content, str):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    model = small(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        models.load_checkpoint(model, path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert_same(model.state_dict(), before)


def test_a_flipped_bit_is_noticed(state: State, tmp_path: Path) -> None:
    """By the checksums in the file, which ``torch.load`` ignores; a file may be without."""
    path = tmp_path / "file.pth"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    place = content.index(state["layer1.0.conv2.conv.weight"].numpy().tobytes())
    content[place + 5] ^= 16
    path.write_bytes(content)
    torch.load(path)
    with pytest.raises(CheckpointError, match=r"file.pth: damaged \(Bad CRC-32 for file '.*/data/"):
        models.read_checkpoint(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(models.read_checkpoint(path).state, state)


def test_pickled_networks_and_arrays_are_named_in_short_and_what_helps_works(
    tmp_path: Path,
) -> None:
    network, path, kept = small(), tmp_path / "file.pth", tmp_path / "kept.pth"
    state = network.state_dict()
    arrays = {key: value.numpy() for key, value in state.items()}
    for content in (network, {"model": network}, arrays, {"state_dict": arrays, "epoch": 1}):
        torch.save(content, path)
        with pytest.raises(
            CheckpointError, match=r"holds .*, which torch\.load.* refuses"
        ) as caught:
            models.read_checkpoint(path)
        message = str(caught.value)
        assert len(message) < 400 + 3 * len(str(path)) and "safe_globals" not in message
        (advice,) = re.findall(r"keep its weights alone with (torch\.save\(.*\))$", message)
        exec(advice, {"torch": torch, "NEW_FILE": kept})
        assert_same(models.read_checkpoint(kept).state, state)


def test_of_a_storage_only_the_tensor_is_written(tmp_path: Path) -> None:
    rows = torch.randn(1000, 64)
    network = small()
    network.bn1.weight.data = network.bn1.bias.data = rows[7]
    for name in ("file.pth", "file.safetensors"):
        models.save_checkpoint(network, tmp_path / name)
        found = models.read_checkpoint(tmp_path / name).state
        assert torch.equal(found["bn1.weight"], rows[7]) and torch.equal(found["bn1.bias"], rows[7])
    stored = torch.load(tmp_path / "file.pth")["bn1.weight"].untyped_storage()
    assert stored.nbytes() == 64 * 4


def test_files_that_the_system_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("", "a" * 300, "a\0b", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="not a file that exists"):
            models.read_checkpoint(tmp_path / name)
    for source in ({}, b"file.pth", None):
        with pytest.raises(
            CheckpointError, match=r"^expected a file or a URL, got (dict|bytes|None)"
        ):
            models.read_checkpoint(source)
    (tmp_path / "others.pth").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(CheckpointError, match=r"others\.pth: may not be read"):
        models.read_checkpoint(tmp_path / "others.pth")


def test_safetensors_are_recognised_under_any_name(state: State, tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "weights.pth")
    assert_same(models.read_checkpoint(tmp_path / "weights.pth").state, state)


def test_wrong_files_to_write(model: nn.Module, state: State, tmp_path: Path) -> None:
    path = tmp_path / "kept.pth"
    path.write_text("before")
    with pytest.raises(
        CheckpointError, match="expected one of mm, mmdet, d2, gluon, official, tim"
    ):
        models.save_checkpoint(model, path, "tensorflow")
    with pytest.raises(CheckpointError, match=r"Linear: not the weights of a ResNeSt: 2 unknown"):
        models.save_checkpoint(nn.Linear(1, 1), path)
    torch.save({key: state[key] for key in ("fc.weight", "fc.bias")}, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=r"not the weights of a ResNeSt: no blocks"):
        models.convert_checkpoint(tmp_path / "head.pth", path, "mm")
    assert path.read_text() == "before"
    nowhere = ("no/such/file.pth", "no/such/file.safetensors", "x" * 300)
    for absent in (tmp_path / name for name in nowhere):
        with pytest.raises(CheckpointError, match="cannot be written"):
            models.save_checkpoint(model, absent)
    with pytest.raises(
        CheckpointError, match=r"sha256: expected 8 to 64 hexadecimal digits, got 'x'"
    ):
        models.read_checkpoint(path, sha256="x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head.pth", "kept.pth"]


def test_a_pipe_is_not_replaced_and_a_link_keeps_naming_its_file(
    model: nn.Module, tmp_path: Path
) -> None:
    pipe, link, file = (tmp_path / name for name in ("pipe", "link", "file"))
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="not a file, but a folder, a device or a pipe"):
        models.save_checkpoint(model, pipe)
    assert pipe.is_fifo()
    file.write_bytes(b"before")
    link.symlink_to(file)
    models.save_checkpoint(model, link)
    assert link.is_symlink() and set(models.read_checkpoint(file).state) == set(model.state_dict())


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("style", ["official", "timm", "mm"])
def test_shortcuts_without_a_pooling_are_numbered_from_0_in_mm(
    style: str, stride: int, tmp_path: Path
) -> None:
    """In MMPretrain a stage has a pooling if it has a stride; the others' layouts do not change."""
    model = randomised(small(output_stride=stride, dilation_style=style))
    path, converted = tmp_path / "mm.pth", tmp_path / "converted.pth"
    models.save_checkpoint(model, path, "mm")
    convs = {8: (0, 1, 0, 0), 16: (0, 1, 1, 0), 32: (0, 1, 1, 1)}[stride]
    written = torch.load(path)
    for stage, index in enumerate(convs, 1):
        prefix = f"backbone.layer{stage}.0.downsample."
        modules = {key.removeprefix(prefix)[0] for key in written if key.startswith(prefix)}
        assert modules == {str(index), str(index + 1)}
    assert_same(models.read_checkpoint(path).state, model.state_dict())
    models.save_checkpoint(model, tmp_path / "official.pth")
    models.convert_checkpoint(tmp_path / "official.pth", converted, "mm", output_stride=stride)
    assert_same(torch.load(converted), written)
    with pytest.raises(ValueError, match=r"^output_stride: expected one of 8, 16, 32, got 4$"):
        models.convert_checkpoint(path, converted, "mm", output_stride=4)


def wrapped_in_parts(model: nn.Module) -> nn.Module:
    model.layer2 = torch.compile(model.layer2)
    return model


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, wrapped_in_parts])
@pytest.mark.parametrize("layout", ["timm", "mm"])
def test_wrapped_networks_are_saved_and_loaded(
    layout: str, wrap: Callable[[nn.Module], nn.Module], state: State, tmp_path: Path
) -> None:
    """Compiled ones, whole or in parts, and those in DataParallel, by the network's own names."""
    wrapped, twin = (wrap(small(seed=seed)) for seed in (1, 2))
    torch.save(state, tmp_path / "plain.pth")
    models.load_checkpoint(wrapped, tmp_path / "plain.pth")
    models.save_checkpoint(wrapped, tmp_path / "saved.pth", layout)
    assert_same(models.read_checkpoint(tmp_path / "saved.pth").state, state)
    models.load_checkpoint(twin, tmp_path / "saved.pth")
    assert_same(twin.state_dict(), wrapped.state_dict())


@pytest.mark.parametrize(
    ("layout", "radix"), [*((layout, 2) for layout in LAYOUTS), ("official", 0), ("mm", 0)]
)
def test_what_a_conv_layer_made_keeps_its_names(layout: str, radix: int, tmp_path: Path) -> None:
    convs = [nn.Conv2d, nn.Conv2d, nn.Conv2d, Shifted, Shifted]
    model = small(conv_layer=convs, radix=radix)
    path = tmp_path / "file.pth"
    lost = models.save_checkpoint(model, path, layout)
    kept = {key: value for key, value in model.state_dict().items() if key not in lost}
    assert any("offset" in key for key in kept)
    assert_same(models.read_checkpoint(path).state, kept)
    everywhere = small(conv_layer=Shifted)
    models.save_checkpoint(everywhere, path, "mm")
    names = torch.load(path)
    assert "backbone.stem.2.conv.inner.weight" in names
    assert "backbone.layer1.0.conv2.conv.offset.bias" in names


@pytest.mark.parametrize("layout", ["mm", "mmdet", "d2"])
def test_a_network_that_a_layout_has_no_names_for_is_not_written(
    layout: str, tmp_path: Path
) -> None:
    network = models.create("resnest14", deep_stem=False)
    with pytest.raises(CheckpointError, match=f"the layout '{layout}' is not for this network"):
        models.save_checkpoint(network, tmp_path / "file.pth", layout)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_same_weights_are_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    """So that their hash tells them."""
    model = models.create("resnest14", num_classes=3)
    for name in ("a", "b"):
        models.save_checkpoint(model, tmp_path / f"{name}{suffix}", "official")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
