"""Training over two processes under torchrun: in shards or copies, on data that do not divide.

``-m long`` runs them, with the extra ``train``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same, command, config, result, start

from resnest_fused import models

pytestmark = pytest.mark.long
OPTIONS: dict[str, Any] = {"epochs": 2, "batch": 100, "accumulate": 2, "clip": 0.5, "timeout": 20}


def finish(out: Path, **options: Any) -> str:
    """Train to the end; what was told."""
    log = out.with_suffix(".log")
    process = start(command(out, 2, **options), log)
    assert process.wait(timeout=120) == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "run"
    finish(out, **OPTIONS, fsdp=True)
    return out


def test_shards_train_as_copies_do(sharded: Path, tmp_path: Path) -> None:
    """To rounding, as the norm of the gradient is summed in another order."""
    finish(tmp_path / "run", **OPTIONS)
    copies, shards = result(tmp_path / "run"), result(sharded)
    for name in ("model", "ema"):
        assert shards["state"][name].keys() == copies["state"][name].keys()
        for key, value in copies["state"][name].items():
            torch.testing.assert_close(
                shards["state"][name][key], value, rtol=1e-4, atol=1e-6, msg=f"{name} {key}"
            )
    for found, expected in zip(shards["rows"], copies["rows"], strict=True):
        assert found.pop("kind") == expected.pop("kind")
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_of_shards_is_an_ordinary_one(sharded: Path) -> None:
    best = sharded / "checkpoints/best.pt"
    network = models.create("resnest14", best, planes=[8, 8, 16, 16], stem_width=4)
    saved = torch.load(best, weights_only=True)["model"]
    assert all(torch.equal(value, saved[key]) for key, value in network.state_dict().items())


def test_a_stopped_run_of_shards_goes_on_to_the_same_bits(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Enough time for the signal: a checkpoint in each step.
    arguments = command(out, 2, **OPTIONS, fsdp=True, save_every=1)
    process = start(arguments, tmp_path / "log")
    deadline = time.monotonic() + 60
    while not list((out / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 1
    told = (tmp_path / "log").read_text()
    assert "resnest-fused: stopped; the same command goes on" in told, told
    assert "going on after step" in finish(out, **OPTIONS, fsdp=True, save_every=1)
    assert_same(result(out), result(sharded))


def test_each_picture_is_evaluated_once_and_each_bad_one_named_once(tmp_path: Path) -> None:
    """Nine pictures in batches of two: the processes have different numbers of batches."""
    generator = np.random.default_rng(0)
    for side, count in (("train", 8), ("val", 4)):
        for label in ("cats", "dogs"):
            (tmp_path / side / label).mkdir(parents=True)
            for number in range(count + (side == "val" and label == "dogs")):
                pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / side / label / f"{number}.png")
    bad = ["train/dogs/1.png", "val/cats/0.png"]
    for path in map(tmp_path.joinpath, bad):
        path.write_bytes(path.read_bytes()[:400])
    out = tmp_path / "run"
    finish(out, data=str(tmp_path), batch=2, epochs=3, warmup=0, ema=0.0)
    named = (out / "bad_files.txt").read_text().splitlines()
    assert {line.split(": ")[0] for line in named} == set(bad)
    assert len(named) == 2
    rows = [row for row in result(out)["rows"] if row["kind"] == "epoch"]
    assert [row["bad_pictures"] for row in rows] == [2, 2, 2]

    from resnest_fused.training.assessment import assess

    last = max((out / "checkpoints").glob("step-*.pt"))
    found = assess(str(last), {})
    assert int(found.scores.confusion.sum()) == 9
    assert len(found.scores.complaints) == 1
    for name in ("top1", "calibration_error"):
        assert rows[-1][name] == pytest.approx(getattr(found.scores, name), rel=1e-4)
    assert rows[-1]["val_loss"] == pytest.approx(found.scores.loss, rel=1e-4)


def test_a_download_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    code = (
        "import time; from resnest_fused.training.distributed import join\n"
        "with join('cpu', 5) as world:\n"
        "    time.sleep(8 if world.first else 0)\n"
        "    world.wait_for_first()"
    )
    script = tmp_path / "wait.py"
    script.write_text(code)
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_bn": True}, "sync_bn: PyTorch has it for GPUs only"),
        ({"fsdp": True, "channels_last": True}, "channels_last: FSDP2 shards contiguous"),
    ],
)
def test_what_processes_cannot_do_is_named(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from resnest_fused.training import parallel
    from resnest_fused.training.config import ConfigError
    from resnest_fused.training.distributed import World

    with pytest.raises(ConfigError, match=message):
        parallel.check(config(tmp_path, **options), World(0, 2, torch.device("cpu"), True))


def test_a_dry_run_times_the_exchange() -> None:
    options = ["--batch", "4", "--model", "resnest14", "--options", "planes=[8,8,16,16]"]
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments += ["-m", "resnest_fused.training", "--synthetic", "cifar", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *arguments, "--workers", "0", *options],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("loading", "step", "all-reduce, beyond the step", "all-reduce alone"):
        assert done.stdout.count(part) >= 1, done.stdout
    assert "2 processes of 4 samples" in done.stdout
