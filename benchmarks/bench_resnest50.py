"""A whole ResNeSt-50 in inference and in training: the plain model, fused, and folded as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from network import WORKLOADS, Result, Workload
from pytest_benchmark.fixture import BenchmarkFixture
from replay import Replay
from summary import network_info

PAIRS = [(workload, contender) for workload in WORKLOADS for contender in workload.contenders]
IDS = [f"{workload}-{contender}".replace(" ", "-") for workload, contender in PAIRS]

replay = Replay()


@pytest.mark.benchmark(timer=replay.replayed)
@pytest.mark.parametrize(("workload", "contender"), PAIRS, ids=IDS)
def test_resnest50(
    benchmark: BenchmarkFixture,
    measure_network: Callable[[Workload], Result],
    workload: Workload,
    contender: str,
) -> None:
    """Fails when a fused network's logits, or its loss, are not eager's."""
    result = measure_network(workload)
    benchmark.group = f"ResNeSt-50 {workload}"
    benchmark.extra_info.update(network_info(workload, result, contender))
    replay.play(benchmark, result.samples[contender])
