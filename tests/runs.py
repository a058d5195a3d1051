"""Small training runs for tests: their options, start and end, and damage to their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from resnest_fused.training.config import Config, make_config

# Everything random is on: dropout, DropBlock, stochastic depth, mixup, colours, crops.
OPTIONS: dict[str, Any] = {
    "options": {"planes": [8, 8, 16, 16], "stem_width": 4},
    "epochs": 3,
    "warmup": 1,
    "batch": 200,
    "dropout": 0.1,
    "drop_block": 0.1,
    "drop_path": 0.1,
    "flip": 0.5,
    "lighting": 0.1,
    "ema": 0.9,
    "log_every": 2,
    "device": "cpu",
}


def config(out: Path, **options: Any) -> Config:
    """Three epochs of seven steps on the digits."""
    return make_config("digits", options={**OPTIONS, **options, "out": str(out)})


def command(out: Path, processes: int, **options: Any) -> list[str]:
    """The same run as a command: of one process, or of several under torchrun."""
    from resnest_fused.training.config import as_yaml

    file = out.with_suffix(".yaml")
    file.write_text(as_yaml(config(out, **options)))
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, "-m", "resnest_fused.training", "--config", str(file)]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, so that all its processes can be killed at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(
            arguments, stdout=file, stderr=file, start_new_session=True, env=environment
        )


def result(out: Path) -> dict[str, Any]:
    """The last checkpoint, and what metrics.jsonl has that is not a time."""
    last = max((out / "checkpoints").glob("step-*.pt"))
    state = torch.load(last, weights_only=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "images_per_s", "data_wait"):
            row.pop(name, None)
    best = torch.load(out / "checkpoints" / "best.pt", weights_only=True)
    return {"state": state, "rows": rows, "best": best["model"]}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the bit: weights, moving averages, momenta, random states, and all reported numbers."""
    assert found["rows"] == expected["rows"]
    for name in ("best", "state"):
        _compare(found[name], expected[name], name)


def _compare(found: Any, expected: Any, where: str) -> None:
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            if (where, key) != ("state", "config"):
                _compare(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            _compare(*pair, f"{where}.{index}")
    else:
        assert found == expected, where


def tear(path: Path, how: str) -> None:
    """Damage a file in one of WAYS_TO_TEAR."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "flipped":
        content[middle] ^= 1
    elif how == "hole":
        content[middle : middle + 4096] = bytes(4096)
    elif how == "garbage":
        content = bytearray(b"no checkpoint")
    else:
        del content[{"empty": 0, "half": middle, "last byte": -1}[how] :]
    path.write_bytes(content)


WAYS_TO_TEAR = ("flipped", "hole", "garbage", "empty", "half", "last byte")
