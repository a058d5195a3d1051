"""The benchmarks' arithmetic: the copy floor, the ratios and the summary tables; their options."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import gpu_summary
import instructions
import pytest
import scale
from contenders import interleave
from grid import DTYPES, FORMS, GRIDS, LAYOUTS, STAGES, Case
from network import Result, Workload
from summary import extra_info, network_info, network_table, relative_iqr, table

import resnest_fused as rf

SAMPLES = {
    "eager": [8e-3, 9e-3, 80e-3],
    "compile": [4e-3, 4.5e-3, 4e-3],
    "fused": [1e-3, 3e-3, 2e-3],
    "copy": [1e-3, 1e-3, 1e-3],
}


@pytest.mark.parametrize(
    ("form", "radix", "train", "units"),
    [
        ("attention", 1, False, 2),
        ("attention", 2, False, 3),
        ("attention", 4, False, 5),
        ("attention", 1, True, 3 + 4),
        ("attention", 2, True, 5 + 6),
        ("attention", 4, True, 9 + 10),
        ("after conv", 1, False, 2),
        ("after conv", 2, False, 3),
        ("after conv", 4, False, 5),
        ("after conv", 1, True, 4 + 5),
        ("after conv", 2, True, 7 + 8),
        ("after conv", 4, True, 13 + 14),
    ],
)
def test_copy_floor(form: str, radix: int, train: bool, units: int) -> None:
    case = Case(64, 56, 32, train, dtype="bf16", radix=radix, form=form)
    assert case.floor_units == units
    assert case.floor_bytes == units * 32 * 64 * 56 * 56 * 2


@pytest.mark.parametrize(
    ("form", "train", "floor"),
    [
        ("attention", False, "R+1"),
        ("attention", True, "(2R+1)+(2R+2)"),
        ("after conv", False, "R+1"),
        ("after conv", True, "(3R+1)+(3R+2)"),
    ],
)
def test_extra_info_names_form_and_floor(form: str, train: bool, floor: str) -> None:
    info = extra_info(Case(64, 56, 32, train, form=form), SAMPLES, "fused")
    assert (info["form"], info["floor"]) == (form, f"{floor} units of out")


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
    assert " attention eval fp32 NCHW R=2 B=32 " in title
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


def test_table_of_each_form() -> None:
    lines = table({Case(*STAGES[0], 32, True, form=form): SAMPLES for form in FORMS})
    titles = [line.strip("- ") for line in lines if line.startswith("--")]
    assert titles == [f"{form} train fp32 NCHW R=2 B=32" for form in FORMS]


@pytest.mark.parametrize("name", GRIDS)
def test_grid_has_every_benchmark_once(name: str) -> None:
    pairs = list(GRIDS[name]())
    assert len(set(pairs)) == len(pairs)
    assert len({str(case) for case, _ in pairs}) == len({case for case, _ in pairs})
    for form, shape, train in itertools.product(FORMS, STAGES, (False, True)):
        for batch in (2, 32):
            assert (Case(*shape, batch, train, form=form), "compile") in pairs
        assert (Case(*shape, 32, train, layout="channels_last", form=form), "fused") in pairs
        assert (Case(*shape, 32, train, dtype="bf16", form=form), "fused") in pairs


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_contenders_agree(form: str, dtype: str, layout: str, train: bool) -> None:
    """interleave raises if results differ, or if a contender changes its input."""
    case = Case(16, 12, 4, train, dtype, layout, form=form)
    samples = interleave(case, "native", None, 0.0, 2)
    assert list(samples) == ["eager", "fused", "copy"]
    assert all(len(times) == 2 and min(times) > 0 for times in samples.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda forward: lambda self, x: 1.01 * forward(self, x), "the fused output differs"),
        (lambda forward: lambda self, x: forward(self, x.relu_()), "changes its input"),
    ],
    ids=["result", "input"],
)
def test_wrong_contenders_are_noticed(change, message, monkeypatch) -> None:
    kind = rf.FusedSplitAttentionConv2d
    monkeypatch.setattr(kind, "forward", change(kind.forward))
    case = Case(16, 12, 4, train=False, form="after conv")
    with pytest.raises(AssertionError, match=message):
        interleave(case, "native", None, 0.0, 1)


INFERENCE = Result(
    {"eager": [0.4, 0.5, 0.6], "fused": [0.2, 0.25, 0.3], "folded": [0.2, 0.2, 0.2]}, {}
)
TRAINING = Result(
    {"eager": [4.0, 4.5, 5.0], "fused": [3.0, 3.0, 3.0]},
    {"eager": 1_000_000_000, "fused": 850_000_000},
)


def test_network_table() -> None:
    lines = network_table({Workload(1, train=False): INFERENCE, Workload(8, train=True): TRAINING})
    _, _, inference, training, _ = lines
    expected = ["500.0", "250.0", "200.0", "20%", "2.00", "2.50", "-", "-", "-"]
    assert inference.split() == ["inference", "B=1", *expected]
    expected = ["4,500.0", "3,000.0", "-", "0%", "1.50", "-", "1000", "850", "15.0%"]
    assert training.split() == ["train", "step", "B=8", *expected]
    assert max(map(len, lines)) <= 100


def test_network_info() -> None:
    info = network_info(Workload(8, train=True), TRAINING, "fused")
    assert info["median_ms"] == pytest.approx(3000)
    assert info["speedup_over_eager"] == pytest.approx(1.5)
    assert info["saved_for_backward_bytes"] == 850_000_000
    info = network_info(Workload(1, train=False), INFERENCE, "folded")
    assert info["speedup_over_eager"] == pytest.approx(2.5)
    assert "saved_for_backward_bytes" not in info


def _gpu_row(contender: str, median_us: float, **facts: object) -> dict[str, object]:
    row = {"what": "eval", "case": "a", "contender": contender, "how": "graph", "of_copy": 0.9}
    row |= {"floor_bytes": 3e8, "p20_us": median_us, "p80_us": median_us, "median_us": median_us}
    row |= {"form": "after conv", "dtype": "bf16", "layout": "channels_last", "radix": 2}
    return row | {"batch": 256, "train": False} | facts


def test_gpu_targets_pass_miss_or_are_not_measured() -> None:
    rows = [
        _gpu_row("fused", 100.0),
        _gpu_row("eager", 500.0),
        _gpu_row("fused", 100.0, what="compile"),
        _gpu_row("compile", 120.0, what="compile"),
        _gpu_row("fused", 9.0, case="b", batch=1, floor_bytes=1e6),
        *(_gpu_row(name, 10.0, what="op") for name in ("pool", "backward")),
        *(_gpu_row(f"triton {name}", 12.0, what="op") for name in ("pool", "backward")),
    ]
    lines = [target.line({"rows": rows}).split() for target in gpu_summary.TARGETS]
    reached = ["0.90", "0.90", "1.20", None, "5.00", None, "9.00", "1.20", None, None]
    verdicts = ["pass", "pass", "MISS", None, "pass", None, "MISS", "pass", None, None]
    for words, number, verdict in zip(lines, reached, verdicts, strict=True):
        if number is None:
            assert words[-2:] == ["not", "measured"]
        else:
            assert number in words and words[-1] == verdict


def test_gpu_summary_says_what_failed_and_what_was_skipped() -> None:
    machine = dict.fromkeys(("device", "driver", "cuda", "torch", "date", "settings"), "?")
    results = {**machine, "commit": "0" * 40, "copy_bytes_per_s": 4e12}
    ops = ("pool", "recombine", "eval")
    rows = [_gpu_row(name, 10.0, what="op") for name in ops]
    rows += [_gpu_row(f"triton {name}", 11.0, what="op") for name in ops[:2]]
    rows.append(_gpu_row("fused", 1.0))
    results |= {"rows": rows, "failed": {"x": "y"}, "skipped": ["z"] * 5}
    text = "\n".join(gpu_summary.lines(results))
    assert "FAILED: 1\n  x: y" in text
    assert "skipped, as the time was over: 5" in text and "and 2 more, in the JSON" in text
    triton = text.partition("Triton over native")[2].splitlines()[1]
    assert triton.split() == ["a", "graph", "1.10", "1.10", "-"]
    assert "eval, us" in text and "train step, us: not measured" in text


def test_gpu_summary_has_what_users_run() -> None:
    machine = dict.fromkeys(("device", "driver", "cuda", "torch", "date", "settings"), "?")
    results = {**machine, "commit": "0" * 40, "copy_bytes_per_s": 4e12, "failed": {}, "skipped": []}
    network = {"what": "network", "case": "net", "batch": 64}
    rows = [_gpu_row(name, 10.0, what=what) for what in ("amp", "calls") for name in ("fused",)]
    rows.append(_gpu_row("fused", 2e4, **network, images_per_s=3200.4, peak_bytes=1_500_000_000))
    rows.append(_gpu_row("eager", 4e4, **network, images_per_s=1600.0, peak_bytes=None))
    text = "\n".join(gpu_summary.lines({**results, "rows": rows}))
    assert "train step under autocast, us" in text and "calls without a graph, us" in text
    assert "autocast, us: not measured" not in text
    fused, eager = text.partition("images/s")[2].splitlines()[1:3]
    assert fused.split() == ["net,", "fused", "3,200", "1,500"]
    assert eager.split() == ["net,", "eager", "1,600", "-"]


REPORT = """
import instructions
import torch
from resnest_fused.backends import native
print(native.build_info()["cpu_capability"], torch.backends.cpu.get_cpu_capability())
"""


def _used(*arguments: str) -> list[str]:
    """The instruction sets of the kernels and of PyTorch in a process with these arguments."""
    environ = {name: v for name, v in os.environ.items() if name not in instructions.VARIABLES}
    environ["PYTHONPATH"] = str(Path(instructions.__file__).parent)
    command = [sys.executable, "-P", "-c", REPORT, *arguments]
    return subprocess.check_output(command, env=environ, text=True).split()


def test_all_contenders_are_held_to_an_instruction_set() -> None:
    best = _used()
    assert _used("--cpu-capability=baseline", "-q") == ["baseline", "DEFAULT"]
    assert _used("--cpu-capability", "sse9") == best  # pytest refuses it
    assert instructions.missed("avx2", "avx2", "AVX2") is None
    assert instructions.missed("baseline", "baseline", "DEFAULT") is None
    told = instructions.missed("baseline", "baseline", "AVX2")
    assert told is not None and "PyTorch avx2" in told and "ATEN_CPU_CAPABILITY=default" in told


def test_the_page_on_scale_is_what_its_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main()
    page = (Path(scale.__file__).parent / "SCALE.md").read_text()
    assert capsys.readouterr().out in page


def test_scale_by_hand() -> None:
    """8 GPUs pass 7/4 of 360 MB at 360 GB/s in 6 hops; 64 pass 63/32 of 40 MB at 40 GB/s in 12."""
    assert scale.reduce_seconds(8, 360e6) == pytest.approx(1.75e-3 + 6e-5)
    assert scale.reduce_seconds(64, 40e6) == pytest.approx(63 / 32 * 1e-3 + 12e-5)
    # A step of 30 ms hides 20 ms: all but the last bucket of a short all-reduce, ...
    last = 63 / 32 * 25 * 2**20 / 40e9 + 12e-5
    assert scale.predict(64, 0.03, 40e6)[1:] == pytest.approx((last, 0.03 + last))
    # ... and of one of 39.375 + 0.12 ms what is longer.
    assert scale.predict(64, 0.03, 800e6)[1] == pytest.approx(39.495e-3 - 0.02)
