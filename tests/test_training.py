"""Training with the extra ``train``: what becomes of pictures, steps, and runs that stop and go on.

Modules that need the extra's packages are imported in the tests, which ``-m long`` runs.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import json
import math
import resource
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from PIL import Image
from runs import assert_same, config, result, tear
from torch import nn

from resnest_fused import models
from resnest_fused.models import images
from resnest_fused.training import stopping

pytestmark = pytest.mark.long
PHOTO = Path(sklearn.datasets.__file__).parent / "images/china.jpg"


def module(name: str) -> Any:
    return importlib.import_module(f"resnest_fused.training.{name}")


def train(out: Path, **options: Any) -> int:
    return int(module("run").train(config(out, **options)))


@pytest.fixture(autouse=True)
def one_core(one_thread: None) -> None:
    """As the numbers of a run depend on the number of threads."""


# --- pictures


def test_targets_of_mixup_are_smoothed_shares() -> None:
    augmentation = module("augmentation")
    torch.manual_seed(3)
    share = float(torch.distributions.Beta(torch.tensor([0.2]), torch.tensor([0.2])).sample())
    torch.manual_seed(3)
    pictures, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 3])
    mixing = augmentation.make_mixing(config(Path("x"), mixup=0.2), 4)
    torch.manual_seed(3)
    mixed, targets = mixing(pictures, labels)
    partner = [2, 0, 1]
    for row in range(3):
        expected = share * pictures[row] + (1 - share) * pictures[partner[row]]
        torch.testing.assert_close(mixed[row], expected)
    # By hand: each label smoothed, 1 - 0.1 + 0.1/4 for it and 0.1/4 for the others, then mixed.
    smoothed = torch.full((3, 4), 0.025)
    for row, label in enumerate([0, 1, 3]):
        smoothed[row, label] = 0.925
    expected = share * smoothed + (1 - share) * smoothed[partner]
    logits = torch.randn(3, 4)
    by_hand = -(expected * logits.log_softmax(1)).sum(1).mean()
    loss = augmentation.make_loss(0.1)
    torch.testing.assert_close(loss(logits, targets), by_hand)
    plain = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss(logits, labels), plain)


def test_lighting_shifts_colours_along_the_axes() -> None:
    lighting = module("augmentation").Lighting(0.1)
    x = torch.full((3, 2, 2), 0.5, dtype=torch.float64)
    shifts = torch.stack([lighting(x) - x for _ in range(4000)])
    assert torch.equal(shifts, shifts[..., :1, :1].expand_as(shifts))
    shifts = shifts[..., 0, 0]
    vectors = torch.tensor(lighting.vectors, dtype=torch.float64)
    along = shifts @ vectors
    spread = 0.1 * torch.tensor([0.2175, 0.0188, 0.0045], dtype=torch.float64)
    # Of 4000 samples; the published vectors are orthonormal to three digits.
    torch.testing.assert_close(along.std(0), spread, rtol=0.1, atol=1e-4)


def test_training_crops_have_the_size_and_the_area() -> None:
    augmentation = module("augmentation")
    options = {"jitter": 0.0, "lighting": 0.0, "flip": 0.0, "mixup": 0.0}
    ramp = np.linspace(0, 255, 320).astype(np.uint8)
    picture = Image.fromarray(np.stack([np.tile(ramp, (240, 1))] * 3, axis=2))
    transform = augmentation.training_transform(
        config(Path("x"), crop=48, least_area=0.08, **options)
    )
    widths = []
    for _ in range(200):
        x = transform(picture)
        assert x.shape == (3, 48, 48) and x.dtype == torch.float32
        row = x[0, 24] * images.STD[0] + images.MEAN[0]
        widths.append(float(row[-1] - row[0]) * 48 / 47)
    # Of all widths: the least area at the aspect 3/4, and the whole width.
    least = math.sqrt(0.08 * 320 * 240 * 3 / 4) / 320
    assert least * 0.95 <= min(widths) <= least * 1.5
    assert 0.8 <= max(widths) <= 1.02


@pytest.mark.parametrize(
    ("size", "ratio", "side"), [(224, 0.0, 210), (320, 0.0, 218), (96, 1.0, 240)]
)
def test_evaluation_sees_the_centre(size: int, ratio: float, side: int) -> None:
    """size/(size+32) of 240 pixels: 210 for 224, 218.18 for 320."""
    across = (np.arange(320) % 256).astype(np.uint8)
    picture = Image.fromarray(np.stack([np.tile(across, (240, 1))] * 3, axis=2))
    seen = module("augmentation").evaluation_transform(size, ratio)(picture)
    left = (320 - side) // 2
    box = (left, (240 - side) // 2, left + side, (240 - side) // 2 + side)
    crop = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    expected = (pixels - images.MEAN[:, None, None]) / images.STD[:, None, None]
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment", "trivialaugment"])
def test_each_policy_makes_pictures(policy: str) -> None:
    transform = module("augmentation").training_transform(config(Path("x"), policy=policy, crop=40))
    x = transform(images.read_image(PHOTO))
    assert x.shape == (3, 40, 40) and x.isfinite().all()


def test_a_sample_depends_on_seed_epoch_and_number_alone() -> None:
    loading, datasets = module("loading"), module("datasets")
    data = datasets.find_data(config(Path("x")))
    transform = module("augmentation").training_transform(config(Path("x")))
    pictures = loading.Pictures(data.train, transform, 0, False)
    first = pictures[(2, 7)][0]
    before = torch.get_rng_state()
    pictures[(2, 8)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(pictures[(2, 7)][0], first)
    assert not torch.equal(pictures[(3, 7)][0], first)
    other = loading.Pictures(data.train, transform, 1, False)
    assert not torch.equal(other[(2, 7)][0], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_an_epoch_is_the_same_after_a_restart(workers: int) -> None:
    loading, datasets = module("loading"), module("datasets")
    data = datasets.find_data(config(Path("x")))
    transform = module("augmentation").training_transform(config(Path("x")))
    chosen = config(Path("x"), batch=100, workers=workers, seed=5)

    def labels(epoch: int, taken: int) -> list[torch.Tensor]:
        found = []
        for rank in range(2):
            world = module("distributed").World(rank, 2, torch.device("cpu"), False)
            batches = loading.training_batches(data.train, transform, chosen, world)
            found += [
                torch.cat([x.flatten(1).sum(1), y]) for x, y, _ in batches.begin(epoch, taken)
            ]
        return found

    whole, rest, other = labels(1, 0), labels(1, 3), labels(2, 0)
    assert len(whole) == 2 * 7 and len(rest) == 2 * 4
    assert all(map(torch.equal, rest, [*whole[3:7], *whole[10:]]))
    assert not torch.equal(whole[0], other[0])


def test_shares_of_an_evaluation_are_disjoint_and_whole() -> None:
    sampler = module("loading").ShareSampler
    shares = [[index for _, index in sampler(11, rank, 3)] for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(11))
    assert [len(sampler(11, rank, 3)) for rank in range(3)] == [4, 4, 3]


# --- folders, and pictures that are damaged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of four pictures, one of which is truncated, and two to evaluate on."""
    generator = np.random.default_rng(0)
    for side, count in (("train", 4), ("val", 2)):
        for label in ("cats", "dogs"):
            (tmp_path / side / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / side / label / f"{number}.png")
    bad = tmp_path / "train/dogs/1.png"
    bad.write_bytes(bad.read_bytes()[:400])
    return tmp_path


def test_a_damaged_picture_is_counted_and_named(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = folder / "run"
    options = {"data": str(folder), "batch": 4, "epochs": 2, "log_every": 1}
    assert train(out, **options) == 0
    bad = "train/dogs/1.png"
    assert (out / "bad_files.txt").read_text().startswith(f"{bad}: cannot be decoded")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["bad_pictures"] for row in rows if row["kind"] == "epoch"] == [1, 1]
    assert capfd.readouterr().err.count(f"resnest-fused: {bad}: cannot be decoded") == 1
    for workers in (0, 1):
        out = folder / f"strict{workers}"
        assert train(out, **options, strict_data=True, workers=workers) == 1
        told = capfd.readouterr().err
        assert f"resnest-fused: {bad}: cannot be decoded" in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val").rename(root / "test"), "expected the folders train and val"),
        (
            lambda root: (root / "val/cats").rename(root / "val/birds"),
            "other classes, such as 'birds'",
        ),
    ],
)
def test_incomplete_data_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], spoil: Any, message: str
) -> None:
    spoil(folder)
    assert train(folder / "run", data=str(folder), batch=2) == 2
    assert message in capsys.readouterr().err


def write_shards(folder: Path, name: str, count: int, each: int, *bad: int) -> str:
    """Shards whose pictures have the colour of their label; some may be damaged, or garbage."""
    import io

    import webdataset

    for shard in range(count):
        with webdataset.TarWriter(str(folder / f"{name}-{shard}.tar")) as writer:
            for place in range(each):
                number = shard * each + place
                buffer = io.BytesIO()
                Image.new("RGB", (36, 36), (25 * (number % 10), 0, number % 256)).save(
                    buffer, "png"
                )
                content = buffer.getvalue()[: 60 if number in bad else None]
                if number in bad[1:]:
                    content = b"garbage"
                key = f"{number:04d}"
                writer.write({"__key__": key, "png": content, "cls": str(number % 10)})
    return str(folder / f"{name}-{{0..{count - 1}}}.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_every_picture_and_go_on(workers: int, tmp_path: Path) -> None:
    loading, distributed = module("loading"), module("distributed")
    urls = write_shards(tmp_path, "train", 8, 10, 33, 38, 39)
    chosen = config(
        tmp_path / "run", data=f"webdataset:{urls}", val=urls, samples=160, classes=10,
        batch=10, workers=workers,
    )  # fmt: skip
    data = module("datasets").find_data(chosen)
    transform = module("augmentation").evaluation_transform(8, 1.0)

    def rows(make: Any, *arguments: int) -> list[list[Any]]:
        found = []
        for rank in range(2):
            world = distributed.World(rank, 2, torch.device("cpu"), False)
            batches = make(world)
            batches = batches.begin(*arguments) if arguments else batches
            found.append([(x.flatten().tolist(), y.tolist(), bad) for x, y, bad in batches])
        return found

    def training(world: Any) -> Any:
        return loading.training_batches(data.train, transform, chosen, world)

    whole, rest, other = (rows(training, *place) for place in ((1, 0), (1, 5), (2, 0)))
    assert [len(batches) for batches in whole] == [8, 8]
    assert rest == [batches[5:] for batches in whole] and other != whole
    once = rows(lambda world: loading.evaluation_batches(data.val, transform, chosen, world))
    labels = sorted(label for batches in once for _, many, _ in batches for label in many)
    assert labels == sorted(number % 10 for number in range(80) if number not in (33, 38, 39))
    said = "\n".join(c for batches in once for _, _, many in batches for c in many if c)
    for complaint, words in zip(
        said.splitlines(),
        ("0033: cannot be decoded", "0038: not an image", "0039: not an image"),
        strict=True,
    ):
        assert f"train-3.tar: {words}" in complaint
    with pytest.raises(module("config").ConfigError, match="expected a shard for each of 20"):
        training(distributed.World(0, 20 // max(workers, 1), torch.device("cpu"), False))


def test_a_run_on_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_urls, val = write_shards(tmp_path, "train", 4, 20), write_shards(tmp_path, "val", 1, 20)
    options = {"data": f"webdataset:{train_urls}", "val": val, "classes": 10, "batch": 20}
    assert train(tmp_path / "run", **options, samples=80, epochs=1) == 0
    assert result(tmp_path / "run")["state"]["step"] == 4
    assert train(tmp_path / "other", **options, epochs=1) == 2
    assert "samples: shards do not tell it" in capsys.readouterr().err
    assert train(tmp_path / "few", **{**options, "classes": 9}, samples=80, epochs=1) == 2
    assert "classes: expected labels below 9, got 9" in capsys.readouterr().err


def test_a_torn_shard_is_counted_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    urls, val = write_shards(tmp_path, "train", 2, 20), write_shards(tmp_path, "val", 1, 20)
    options = {"data": f"webdataset:{urls}", "val": val, "classes": 10, "batch": 20}
    options |= {"samples": 40, "epochs": 2}
    torn = tmp_path / "train-1.tar"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2 + 100])
    assert train(tmp_path / "run", **options) == 0
    (named,) = (tmp_path / "run/bad_files.txt").read_text().splitlines()
    assert named.startswith("train-1.tar: cannot be read (")
    assert capfd.readouterr().err.count(f"resnest-fused: {named}") == 1
    assert train(tmp_path / "strict", **options, strict_data=True) == 1
    assert f"resnest-fused: {named}; no checkpoint" in capfd.readouterr().err
    for path in (torn, tmp_path / "train-0.tar"):
        path.write_bytes(b"garbage" * 1000)
    assert train(tmp_path / "none", **options) == 1
    assert "no picture can be decoded; the first: train-" in capfd.readouterr().err


# --- steps


def trainer(tmp_path: Path, **options: Any) -> Any:
    distributed, loop = module("distributed"), module("loop")
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    chosen = config(tmp_path, **options)
    data = module("datasets").find_data(chosen)
    world = distributed.World(0, 1, torch.device("cpu"), False)
    return loop.Trainer(chosen, data, world)


PLAIN: dict[str, Any] = {
    **{"dropout": 0.0, "drop_block": 0.0, "drop_path": 0.0, "mixup": 0.0, "ema": 0.0},
    **{"warmup": 0, "momentum": 0.0},
}


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path) -> None:
    """In float64, with norms that do not mix samples, to rounding."""
    whole, parts = (
        trainer(tmp_path, **PLAIN, batch=batch, accumulate=count)
        for batch, count in ((96, 1), (32, 3))
    )
    for each in (whole, parts):
        each.network.double().eval()
        pictures = torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
        labels = torch.arange(96) % 10
        batches = zip(
            pictures.split(each.config.batch), labels.split(each.config.batch), strict=True
        )
        each._take_step(iter([(x, y, [""]) for x, y in batches]))
    assert whole.peak == parts.peak
    assert float(whole._new_losses[0]) == pytest.approx(float(parts._new_losses[0]), rel=1e-12)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_step_is_nesterov_s_with_decay_of_weights_only(tmp_path: Path) -> None:
    """Two steps against the formulas in float64, with clipping and the moving average."""
    options = {**PLAIN, "momentum": 0.9, "clip": 0.05, "ema": 0.75, "weight_decay": 0.01}
    each = trainer(tmp_path, **options, batch=32, fuse=False)
    network = each.network.double().eval()
    each.ema.double()
    names = [name for name, _ in network.named_parameters()]
    values = {name: p.detach().clone() for name, p in network.named_parameters()}
    averages: dict[str, torch.Tensor] = {}
    speeds = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(2):
        x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(step)).double()
        y = torch.arange(32) % 10
        targets = 0.9 * F.one_hot(y, 10).double() + 0.01
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        logits = torch.func.functional_call(network, {**dict(network.named_buffers()), **leaves}, x)
        loss = -(targets * logits.log_softmax(1)).sum(1).mean()
        gradients = dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert norm > 0.05
        rate = each.peak * (1 + math.cos(math.pi * step / each.total)) / 2
        with torch.no_grad():
            for name, value in values.items():
                decay = 0.01 if value.dim() > 1 else 0.0
                g = gradients[name] * 0.05 / (norm + 1e-6) + decay * value
                speeds[name] = 0.9 * speeds[name] + g
                values[name] = (value - rate * (g + 0.9 * speeds[name])).detach()
                before = averages.get(name)
                averages[name] = (
                    values[name] if before is None else 0.75 * before + 0.25 * values[name]
                )
        each._take_step(iter([(x, y, [""])]))
        assert float(each._new_losses[-1]) == pytest.approx(float(loss.detach()), rel=1e-10)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), values[name], rtol=1e-8, atol=1e-10)
    for name, parameter in each.ema.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), averages[name], rtol=1e-8, atol=1e-10)


def test_fp16_may_leave_the_first_step_out(tmp_path: Path) -> None:
    """Without a word, and with the learning rates of the recipe in the steps that follow."""
    each = trainer(tmp_path, **PLAIN, amp="fp16", batch=200)
    each.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    batch = torch.randn(8, 3, 32, 32), torch.arange(8), [""]
    weight = each.network.fc.weight
    before = weight.detach().clone()
    rates = [each.peak * (1 + math.cos(math.pi * step / each.total)) / 2 for step in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        each._take_step(iter([batch]))
        assert torch.equal(weight, before) and each.step == 1
        each.scaler.update(1.0)
        assert each.optimizer.param_groups[0]["lr"] == pytest.approx(rates[1])
        each._take_step(iter([batch]))
    assert not torch.equal(weight, before)
    assert each.optimizer.param_groups[0]["lr"] == pytest.approx(rates[2])


def test_drop_block_grows_from_0_to_its_rate(tmp_path: Path) -> None:
    from resnest_fused.models.drop import DropBlock2d

    each = trainer(tmp_path, drop_block=0.1)
    blocks = [m for m in each.network.modules() if isinstance(m, DropBlock2d)]
    where = {n.split(".")[0] for n, m in each.network.named_modules() if isinstance(m, DropBlock2d)}
    assert where == {"layer3", "layer4"} and {block.block_size for block in blocks} == {3}
    for step, rate in ((0, 0.0), (10, 0.05), (20, 0.1)):
        each.step = step
        each._set_drop_block()
        assert each.total == 21
        assert all(float(block.rate) == pytest.approx(rate) for block in blocks)


@pytest.mark.parametrize(
    "options",
    [
        {"amp": "bf16", "channels_last": True},
        {"amp": "fp16", "clip": 1.0},
        {"checkpointing": True, "accumulate": 2, "batch": 100},
        {"fuse": False, "cutmix": 1.0},
        {"backend": "reference", "frozen_stages": 1, "lr_of": {"fc": 10}},
    ],
    ids=lambda options: "-".join(options),
)
def test_each_option_trains(tmp_path: Path, options: dict[str, Any]) -> None:
    assert train(tmp_path / "run", **{"epochs": 2, **options}) == 0
    rows = result(tmp_path / "run")["rows"]
    assert all(math.isfinite(row["val_loss"]) for row in rows if row["kind"] == "epoch")


def test_a_signal_ends_nothing_that_a_compiled_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As signals wait while the compiler works, in the processes that it starts for ever.

    Everything of torch.compile runs but its code generator, which takes minutes.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    blocked = []

    def generate(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        blocked.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return make_boxed_func(graph.forward)

    compiled = functools.partialmethod(
        nn.Module.compile, backend=aot_autograd(fw_compiler=generate)
    )
    monkeypatch.setattr(nn.Module, "compile", compiled)
    assert train(tmp_path / "run", compile=True, epochs=1, ema=0.0) == 0
    assert math.isfinite(result(tmp_path / "run")["rows"][-1]["val_loss"])
    signals = set(stopping.SIGNALS)
    assert len(blocked) >= 3  # forward, backward and evaluation
    assert all(signals <= each for each in blocked)
    assert not signals & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_another_head_on_trained_weights(tmp_path: Path) -> None:
    assert train(tmp_path / "run", epochs=1) == 0
    best = tmp_path / "run/checkpoints/best.pt"
    each = trainer(tmp_path, weights=str(best), classes=12, frozen_stages=1)
    trained = torch.load(best, weights_only=True)["model"]
    now = each.network.state_dict()
    assert now["fc.weight"].shape[0] == 12
    assert all(
        torch.equal(now[name], value) for name, value in trained.items() if "fc." not in name[:3]
    )
    same = models.create("resnest14", best, planes=[8, 8, 16, 16], stem_width=4)
    assert torch.equal(same.state_dict()["fc.weight"], trained["fc.weight"])
    average = models.read_checkpoint(best, entry="ema")
    assert set(average.state) == set(trained)


# --- runs that stop and go on


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(out) == 0
    torch.set_num_threads(threads)
    return result(out)


def signal_at(monkeypatch: pytest.MonkeyPatch, number: int, *steps: int) -> None:
    """Signal this process when it has taken one of these steps."""
    reporter = module("reporting").Reporter
    advance = reporter.advance
    left = set(steps)

    def and_signal(self: Any, step: int) -> None:
        advance(self, step)
        if step in left:
            left.remove(step)
            signal.raise_signal(number)

    monkeypatch.setattr(reporter, "advance", and_signal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_bits(
    number: int, tmp_path: Path, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within an epoch, at an epoch's end, and after it."""
    signal_at(monkeypatch, number, 3, 7, 8, 20)
    out = tmp_path / "run"
    handler = signal.getsignal(number)
    assert [train(out) for _ in range(5)] == [75] * 4 + [0]
    assert signal.getsignal(number) is handler
    assert_same(result(out), unbroken)
    assert len(list((out / "checkpoints").glob("*"))) == 4  # the last three and the best
    assert train(out) == 0  # nothing is left to do
    assert_same(result(out), unbroken)


def test_a_run_with_loading_processes_is_the_same(
    tmp_path: Path, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 10)
    out = tmp_path / "run"
    assert [train(out, workers=2), train(out, workers=1)] == [75, 0]
    assert_same(result(out), unbroken)


def test_the_progress_line_and_tensorboard_show_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    monkeypatch.setenv("COLUMNS", "160")
    signal_at(monkeypatch, signal.SIGTERM, 10)
    out = tmp_path / "run"
    assert [train(out, log_every=1), train(out, log_every=1)] == [75, 0]
    told = capfd.readouterr().err
    for words in ("/21", "loss ", "LR ", " images/s", "data wait ", "evaluating", "top-1 %"):
        assert words in told
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    rows = result(out)["rows"]
    for kind, name in (
        ("train", "loss"),
        ("train", "lr"),
        ("epoch", "top1"),
        ("epoch", "val_loss"),
    ):
        shown = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
        kept = [(row["step"], row[name]) for row in rows if row["kind"] == kind]
        assert [step for step, _ in shown] == [step for step, _ in kept]
        assert [value for _, value in shown] == pytest.approx(
            [value for _, value in kept], rel=1e-6
        )


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train(out, epochs=1) == 2
        assert f"another process is training in {out}" in capfd.readouterr().err
        assert not list((out / "checkpoints").iterdir())
    assert train(out, epochs=1) == 0


@pytest.mark.parametrize("how", ["flipped", "half"])
def test_a_torn_checkpoint_falls_back_to_the_one_before(
    how: str, tmp_path: Path, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    signal_at(monkeypatch, signal.SIGTERM, 10, 12)
    out = tmp_path / "run"
    assert [train(out), train(out)] == [75, 75]
    newest = out / "checkpoints/step-00000012.pt"
    tear(newest, how)
    capfd.readouterr()
    assert train(out) == 0
    told = capfd.readouterr().err
    assert f"{newest}: " in told and "going back to the one before" in told
    assert "going on after step 10 of 21" in told
    assert newest.with_suffix(".damaged").is_file()
    assert_same(result(out), unbroken)


def test_without_a_whole_checkpoint_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    signal_at(monkeypatch, signal.SIGTERM, 2)
    assert train(tmp_path / "run") == 75
    tear(tmp_path / "run/checkpoints/step-00000002.pt", "half")
    assert train(tmp_path / "run") == 1
    assert "none of 1 checkpoints is whole" in capfd.readouterr().err


def test_options_outlast_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on writes them anew; without them it could not."""
    out = tmp_path / "run"
    assert train(out, epochs=1) == 0
    before = (out / "config.yaml").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        assert train(out, epochs=1) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"File too large: '{out}/config.yaml'; the last checkpoint is {out}/check" in told
    assert (out / "config.yaml").read_bytes() == before
    assert not list(out.rglob("*.tmp"))
    assert train(out, epochs=1) == 0


def test_nan_stops_the_run_and_names_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loop = module("loop")
    next_batch = loop.Trainer._next_batch

    def poisoned(self: Any, batches: Any) -> Any:
        pictures, labels = next_batch(self, batches)
        return (pictures * float("nan") if self.step == 10 else pictures), labels

    monkeypatch.setattr(loop.Trainer, "_next_batch", poisoned)
    assert train(tmp_path / "run") == 1
    told = capfd.readouterr().err
    assert "the loss is nan in step 11, epoch 2" in told
    assert "step-00000007.pt" in told
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step-00000007.pt", "best.pt"}


def test_weights_that_are_nan_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A gradient that is NaN in the last step of an epoch, whose loss is none."""
    loop = module("loop")
    next_batch = loop.Trainer._next_batch

    def poisoned(self: Any, batches: Any) -> Any:
        if self.step == 13:
            self.network.fc.weight.register_hook(lambda gradient: gradient * float("nan"))
        return next_batch(self, batches)

    monkeypatch.setattr(loop.Trainer, "_next_batch", poisoned)
    assert train(tmp_path / "run") == 1
    assert "weights are NaN or infinite after step 14; " in capfd.readouterr().err
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step-00000007.pt", "best.pt"}


def test_a_folder_with_another_run_is_not_touched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, epochs=1) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert train(out, epochs=1, lr=0.3) == 2
    assert "has a run with lr 0.4, not 0.3" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(out, epochs=2) == 0
    known = (out / "metrics.jsonl").read_bytes(), (out / "checkpoints/best.pt").read_bytes()
    assert train(out, epochs=2) == 0
    assert known == (
        (out / "metrics.jsonl").read_bytes(),
        (out / "checkpoints/best.pt").read_bytes(),
    )


def test_the_best_is_known_without_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be lost; a later and worse checkpoint must not become the best one then."""
    loop = module("loop")
    scores, evaluate = iter([50.0, 40.0]), loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a: evaluate(*a)._replace(top1=next(scores)))
    signal_at(monkeypatch, signal.SIGTERM, 8)
    out = tmp_path / "run"
    assert train(out, epochs=2) == 75
    best = (out / "checkpoints/best.pt").read_bytes()
    (out / "metrics.jsonl").unlink()
    assert train(out, epochs=2) == 0
    assert (out / "checkpoints/best.pt").read_bytes() == best


def add_class(root: Path) -> None:
    for side in ("train", "val"):
        (root / side / "birds").mkdir()
        (root / side / "birds/0.png").write_bytes((root / "train/cats/0.png").read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_class, "the run has other classes than these data, such as 'birds'"),
        (
            lambda root: (root / "train/cats/0.png").unlink(),
            "the run has 8 pictures in train, these data 7",
        ),
        (
            lambda root: (root / "val/cats/0.png").rename(root / "val/cats/9.png"),
            "in val the files have other names than those of the run",
        ),
    ],
)
def test_other_data_under_a_run_are_noticed(
    folder: Path, capfd: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    out = folder / "run"
    options = {"data": str(folder), "batch": 4, "epochs": 1}
    assert train(out, **options) == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    change(folder)
    capfd.readouterr()
    assert train(out, **options, keep=2) == 2
    assert capfd.readouterr().err == f"resnest-fused: data: {message}\n"
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_a_run_goes_on_when_it_and_its_data_were_moved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"batch": 4, "epochs": 2, "log_every": 1}
    assert train(folder / "whole", data=str(folder), **options) == 0
    signal_at(monkeypatch, signal.SIGTERM, 1)
    assert train(folder / "run", data=str(folder), **options) == 75
    moved = folder / "moved"
    moved.mkdir()
    for name in ("train", "val", "run"):
        (folder / name).rename(moved / name)
    assert train(moved / "run", data=str(moved), **options) == 0
    assert_same(result(moved / "run"), result(folder / "whole"))


# --- the commands


def run_command(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from resnest_fused.cli.app import app

    result = CliRunner().invoke(app, [*arguments])
    # Any other exception would be a traceback on a user's screen.
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_options_of_the_command_count_over_the_file_and_the_file_over_the_preset(
    tmp_path: Path,
) -> None:
    file = tmp_path / "options.yaml"
    out = str(tmp_path / "run")
    file.write_text(
        f"epochs: 2\nwarmup: 1\nbatch: 400\nout: {out}\noptions: {{planes: [8, 8, 8, 8]}}\n"
    )
    options = ["--epochs", "1", "--options", "stem_width=4", "--options", "planes=[8,8,8,16]"]
    options += ["--lr-of", "fc=25e-1", "--no-fuse", "--device", "cpu"]
    done = run_command("train", "--preset", "digits", "--config", str(file), *options)
    assert done.exit_code == 0, done.stderr
    kept = module("config").read_config(tmp_path / "run/config.yaml")
    assert (kept.epochs, kept.batch, kept.lr, kept.fuse) == (1, 400, 0.4, False)
    assert kept.options == {"stem_width": 4, "planes": [8, 8, 8, 16]}
    assert kept.lr_of == {"fc": 2.5}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("config.yaml", "checkpoints", "metrics.jsonl", "tensorboard", "curves.png", "curves.svg"),
        ".lock",
    }
    assert "top-1 %" in done.stderr
    assert Image.open(tmp_path / "run/curves.png").size[0] > 1000


def test_numbers_with_exponents_are_numbers_in_files(tmp_path: Path) -> None:
    """As in YAML 1.2, and text that looks like one stays text."""
    chosen = module("config")
    file = tmp_path / "options.yaml"
    file.write_text("lr: 1e-1\nweight_decay: 5E-5\nclip: 2e+0\n")
    found = chosen.read_config(file)
    assert (found.lr, found.weight_decay, found.clip) == (0.1, 5e-5, 2.0)
    whole = chosen.make_config(options={"lr": 1e-7, "out": "1e5", "val": "-2", "root": "0x1"})
    file.write_text(chosen.as_yaml(whole))
    assert chosen.read_config(file) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "data: nowhere: expected the folders train and val in it"),
        ([], "data: expected a folder, torchvision:NAME, webdataset:URLS, digits or synthetic"),
        (["--data", "torchvision:MNOST"], "data: torchvision has no dataset 'MNOST'"),
        (
            ["--preset", "digits", "--batch", "2000"],
            "batch: a step takes 2000 samples, more than an epoch has",
        ),
        (["--preset", "digits", "--model", "resnet50"], "model: expected one of resnest14, "),
        (["--preset", "digits", "--options", "radix=-1"], "options: radix: expected an integer"),
        (["--preset", "digits", "--options", "radix"], "expected a name, = and a value"),
        (
            ["--preset", "digits", "--backend", "cuda"],
            "resnest-fused: backend: expected one of auto, native, triton, reference, got 'cuda'",
        ),
        (
            ["--preset", "digits", "--options", "num_classes=3"],
            "options: num_classes is set by the option classes",
        ),
        (["--preset", "digits", "--options", "fused=false"], "fused is set by the option fuse"),
        (["--preset", "digits", "--options", "planes=[1"], "expected a value in YAML's form"),
        (["--preset", "digits", "--jitter", "inf"], "jitter: expected a number from 0 to 1, got"),
        (["--preset", "digits", "--lr-of", "fc=-1"], "lr_of: fc: expected a number from 0 on"),
        (["--preset", "digits", "--epochs", "2"], "warmup: expected an integer from 0 to the num"),
        (["--preset", "digits", "--weights", "none.pth"], "none.pth: not a file that exists"),
        (["--smoothing", "2"], "smoothing: expected a number from 0 to below 1, got 2.0"),
        (["--config", "none.yaml"], "config: none.yaml cannot be read"),
        (["--preset", "digits", "--fsdp"], "fsdp: expected several processes"),
        (["--synthetic", "cifar", "--fsdp"], "fsdp: a step cannot be timed apart"),
        (["--preset", "digits", "--batch", "1"], "batch: batch normalisation needs 2 samples"),
        (["--data", "synthetic", "--classes", "1"], "classes: expected 2 or more, got 1"),
        (["--data", "torchvision:Kinetics"], "data: Kinetics.__init__() missing 1 required"),
        (
            [
                "--data",
                "webdataset:none-{0..1}.tar",
                "--val",
                "v.tar",
                "--classes",
                "3",
                "--samples",
                "9",
            ],
            "data: none-0.tar: not a file that exists",
        ),
        (["--preset", "digits", "--plot-with", "none"], "plot_with: none: expected a run's folder"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = run_command("train", "--device", "cpu", *arguments)
    assert done.exit_code == 2
    told = done.stderr + capfd.readouterr().err
    assert message in told and len(told.splitlines()) == 1, told
    assert not (tmp_path / "runs").exists()


def test_evaluate_scores_a_run_and_any_checkpoint(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "run"
    assert train(out, epochs=2) == 0
    best = out / "checkpoints/best.pt"
    rows = [row for row in result(out)["rows"] if row["kind"] == "epoch"]
    options = ["--device", "cpu", "--json", "--out", str(tmp_path / "scores")]
    done = run_command("evaluate", str(best), *options)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    expected = max(rows, key=lambda row: row["top1"])
    for name in ("loss", "top1", "top5", "calibration_error"):
        same = "val_loss" if name == "loss" else name
        assert found[name] == pytest.approx(expected[same], rel=1e-4), name
    confusion = np.array(found["confusion"])
    assert found["pictures"] == confusion.sum() == 359
    assert found["top1"] == pytest.approx(100 * confusion.trace() / 359)
    assert found["by_class"]["3"] == pytest.approx(100 * confusion[3, 3] / confusion[3].sum())
    assert {p.name for p in (tmp_path / "scores").iterdir()} == {
        *("scores.json", "confusion.png", "confusion.svg")
    }
    # The same weights without the run's options, on a folder of classes.
    plain = tmp_path / "plain.safetensors"
    models.convert_checkpoint(models.read_checkpoint(best, entry="ema"), plain, "official")
    (tmp_path / "many").mkdir()
    for number in range(10):
        (tmp_path / "many" / str(number)).symlink_to(folder / "val/cats")
    text = run_command("evaluate", str(plain), "--data", "digits", "--device", "cpu")
    assert text.exit_code == 2 and "WEIGHTS" in text.stderr  # it is no resnest50


def test_evaluate_counts_by_hand(tmp_path: Path) -> None:
    """Scores of fixed logits against numbers worked out by hand, in two batches."""
    evaluate = module("evaluation").evaluate
    odds = torch.tensor(
        [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.5, 0.4, 0.1]]
    )
    labels = torch.tensor([0, 1, 1, 2, 2])
    network = nn.Flatten()
    data = odds.log()[..., None, None]
    batches = [(data[:2], labels[:2], []), (data[2:], labels[2:], [])]
    scores = evaluate(network, batches, 3, torch.device("cpu"))
    assert scores.top1 == pytest.approx(60) and scores.top5 == pytest.approx(100)
    assert scores.loss == pytest.approx(-np.log([0.7, 0.3, 0.8, 0.6, 0.1]).mean(), rel=1e-5)
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert scores.by_class().tolist() == [100, 50, 50]
    # The confidences 0.7, 0.6, 0.8, 0.6 and 0.5 fall into four of 15 bins: 0.6 twice, half right.
    by_hand = (0.3 + 2 * 0.1 + 0.2 + 0.5) / 5
    assert scores.calibration_error == pytest.approx(100 * by_hand, rel=1e-4)
    assert network.training


def test_a_missing_checkpoint_is_named_before_the_data() -> None:
    done = run_command("evaluate", "none.pt")
    assert done.exit_code == 2 and "none.pt: not a file that exists" in done.stderr


def test_a_damaged_run_is_not_evaluated(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(out, epochs=1) == 0
    tear(out / "checkpoints/best.pt", "flipped")
    done = run_command("evaluate", str(out / "checkpoints/best.pt"), "--device", "cpu")
    assert done.exit_code == 2 and "damaged" in done.stderr


def test_a_dry_run_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(config: Any, shape: str) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module("dryrun"), "measure", interrupt)
    # As in a terminal: who runs the tests in the background may have had it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_command("train", "--synthetic", "cifar", "--device", "cpu").exit_code == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_bursts_of_a_loader_count_in_the_mean() -> None:
    """Three batches are ahead; the others come by fours, after 40 ms."""

    def batches() -> Iterator[None]:
        yield from (None,) * 3
        for _ in range(3):
            time.sleep(0.04)
            yield from (None,) * 4

    dryrun, loaded = module("dryrun"), batches()
    world = module("distributed").World(0, 1, torch.device("cpu"), False)
    dryrun._drain(loaded, 3)
    assert dryrun._pace(world, lambda: next(loaded), 12) >= 0.01


def test_a_dry_run_times_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--batch", "4", "--model", "resnest14", "--options", "planes=[8,8,16,16]"]
    done = run_command(
        "train", "--synthetic", "cifar", "--device", "cpu", "--workers", "0", *options
    )
    assert done.exit_code == 0, done.stderr
    for part in ("loading", "step", "all together", "cifar-shaped"):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())
