"""Split attention as a module call: eager, compiled, fused, and a plain copy to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from grid import Case
from pytest_benchmark.fixture import BenchmarkFixture
from summary import extra_info


class Replay:
    """A clock that shows times measured before.

    pytest-benchmark runs one benchmark after the other, and ratios need them interleaved. So the
    times are taken beforehand, and through this clock pytest-benchmark receives them for its
    statistics, tables, JSON and comparisons with other runs.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def replayed(self) -> float:
        return self._now

    def play(self, benchmark: BenchmarkFixture, durations: Sequence[float]) -> None:
        upcoming = iter(durations)

        def advance() -> None:
            self._now += next(upcoming)

        benchmark.pedantic(advance, rounds=len(durations))


replay = Replay()


@pytest.mark.benchmark(timer=replay.replayed)
def test_split_attention(
    benchmark: BenchmarkFixture,
    measure: Callable[[Case], dict[str, list[float]]],
    case: Case,
    contender: str,
) -> None:
    """Fails when the fused module's results are not eager's."""
    samples = measure(case)
    benchmark.group = str(case)
    benchmark.extra_info.update(extra_info(case, samples, contender))
    replay.play(benchmark, samples[contender])
