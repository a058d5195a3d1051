"""The benchmarks' arithmetic: the copy floor, the ratios and the summary table."""

from __future__ import annotations

import pytest
from grid import GRIDS, STAGES, Case
from summary import extra_info, relative_iqr, table

SAMPLES = {
    "eager": [8e-3, 9e-3, 80e-3],
    "compile": [4e-3, 4.5e-3, 4e-3],
    "fused": [1e-3, 3e-3, 2e-3],
    "copy": [1e-3, 1e-3, 1e-3],
}


@pytest.mark.parametrize(
    ("radix", "train", "units"),
    [(1, False, 2), (2, False, 3), (4, False, 5), (1, True, 7), (2, True, 11), (4, True, 19)],
)
def test_copy_floor(radix: int, train: bool, units: int) -> None:
    case = Case(64, 56, 32, train, dtype="bf16", radix=radix)
    assert case.floor_units == units
    assert case.floor_bytes == units * 32 * 64 * 56 * 56 * 2


def test_extra_info_are_ratios_of_medians() -> None:
    case = Case(64, 56, 32, train=False)
    info = extra_info(case, SAMPLES, "fused")
    assert info["median_us"] == pytest.approx(2000)
    assert info["speedup_over_eager"] == pytest.approx(4.5)
    assert info["speedup_over_compile"] == pytest.approx(2)
    assert info["times_copy_floor"] == pytest.approx(2)
    assert info["gb_per_s"] == pytest.approx(3 * 32 * 64 * 56 * 56 * 4 / 2e-3 / 1e9)
    assert info["relative_iqr"] == pytest.approx(0.5)


def test_spread_of_one_round() -> None:
    assert relative_iqr([1e-3]) == 0


def test_table_has_rows_and_geometric_means() -> None:
    faster = {name: [time / 4 for time in times] for name, times in SAMPLES.items()}
    faster["fused"] = SAMPLES["fused"]
    lines = table({Case(*STAGES[0], 32, False): SAMPLES, Case(*STAGES[1], 32, False): faster})
    title, _, _, first, second, means = lines[:6]
    assert "eval fp32 NCHW R=2 B=32" in title
    expected = ["9,000.0", "4,000.0", "2,000.0", "1,000.0", "50%", "4.50", "2.00", "2.00"]
    assert first.split() == ["64@56x56", *expected]
    assert second.split()[-3:] == ["1.12", "0.50", "8.00"]
    assert means.split()[-3:] == ["2.25", "1.00", "4.00"]
    assert max(map(len, lines)) < 100


def test_table_marks_what_was_not_measured() -> None:
    samples = {name: times for name, times in SAMPLES.items() if name != "compile"}
    lines = table({Case(*STAGES[0], 32, False): samples})
    assert lines[3].split()[2] == "-"
    assert lines[4].split()[-3:] == ["4.50", "-", "2.00"]


@pytest.mark.parametrize("name", GRIDS)
def test_grid_has_every_benchmark_once(name: str) -> None:
    pairs = list(GRIDS[name]())
    assert len(set(pairs)) == len(pairs)
    for shape in STAGES:
        for batch in (2, 32):
            for train in (False, True):
                assert (Case(*shape, batch, train), "compile") in pairs
