"""Split attention, and all after a convolution: eager, compiled, fused, and a plain copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from grid import Case
from pytest_benchmark.fixture import BenchmarkFixture
from replay import Replay
from summary import extra_info

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
