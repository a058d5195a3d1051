"""Some of the random calls of random_calls.py, and how it reports those that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_calls
import torch
from torch import Tensor

import resnest_fused as rf
from resnest_fused import modules

pytestmark = pytest.mark.cpu


def test_none_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "calls.log"
    code = random_calls.main(["--count", "60", "--seed", "7", "--log", str(log)])
    output = capsys.readouterr().out
    assert code == 0, output
    assert "60 of 60 calls, seed 7: 0 failed" in output
    lines = log.read_text().splitlines()
    assert [line.partition(":")[0] for line in lines[1:61]] == [str(i) for i in range(60)]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_none_of_many_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert random_calls.main(["--count", "300", "--seed", "1"]) == 0, capsys.readouterr().out


def spoil(result: Tensor) -> Tensor:
    return result * 1.01


@pytest.mark.parametrize("where", ["split_attention", "modules"])
def test_failures_are_told(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = rf if where == "split_attention" else modules
    function: Callable[..., Tensor] = module.split_attention

    def spoiled(*args: Any, **options: Any) -> Tensor:
        # PyTorch's formulas stay as they are, because errors are judged by them.
        result = function(*args, **options)
        return result if options["backend"] == "reference" else spoil(result)

    monkeypatch.setattr(module, "split_attention", spoiled)
    assert random_calls.main(["--count", "20", "--seed", "3"]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED ")]
    command, _, text = told[0].removeprefix("FAILED python tests/random_calls.py ").partition(": ")
    assert command.startswith("--seed 3 --only ")
    assert text.startswith("split_attention, ") == (where == "split_attention")
    # That command repeats the same failure.
    assert random_calls.main(command.split()) == 1
    assert told[0] in capsys.readouterr().out


def test_it_stops_after_some_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert random_calls.main(["--minutes", "0"]) == 0
    assert "0 of 10000 calls" in capsys.readouterr().out


def test_memory_that_is_not_written_is_noticed() -> None:
    with pytest.raises(random_calls.Failure, match="x does not repeat to the bit"):
        random_calls._assert_repeats(lambda: {"x": torch.empty(5000)})
    random_calls._assert_repeats(lambda: {"x": torch.zeros(5000)})


def test_threads_and_seed_of_one_call() -> None:
    threads = torch.get_num_threads()
    first, second = (random_calls.run_one(5, 2) for _ in range(2))
    assert first == second and first.problem is None
    assert random_calls.run_one(6, 2).text != first.text
    assert torch.get_num_threads() == threads
