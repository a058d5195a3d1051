"""Hands times that were measured in turns to pytest-benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_benchmark.fixture import BenchmarkFixture


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
