"""Options, the measurement that the benchmarks share, and the summary at the end of a run."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import cpuinfo
import pytest
import summary
import torch
from grid import GRIDS, Case
from interleave import interleave

import resnest_fused as rf

Samples = dict[str, list[float]]
RESULTS = pytest.StashKey[dict[Case, Samples]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("split attention benchmarks")
    group.addoption(
        "--shapes",
        choices=GRIDS,
        default="stages",
        help="ResNeSt-50's four stages in the usual settings, or the full grid (hours; use -k)",
    )
    group.addoption(
        "--backend", default="native", help="backend of the fused module (default: native)"
    )
    group.addoption(
        "--seconds",
        type=float,
        default=1.5,
        help="time for the rounds of one case, all contenders together (default: 1.5)",
    )


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own pytest_configure
def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}
    option = config.option
    option.benchmark_columns = option.benchmark_columns or ["min", "median", "iqr", "rounds"]
    option.benchmark_time_unit = option.benchmark_time_unit or "us"
    for status in rf.backends():
        if status.name == option.backend and not status.available:
            raise pytest.UsageError(f"--backend={option.backend}: {status.reason}")
    if option.backend not in {status.name for status in rf.backends()}:
        raise pytest.UsageError(f"--backend={option.backend}: no such backend")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contender"} <= set(metafunc.fixturenames):
        pairs = list(GRIDS[metafunc.config.option.shapes]())
        ids = [f"{case}-{contender}".replace(" ", "-") for case, contender in pairs]
        metafunc.parametrize(("case", "contender"), pairs, ids=ids)


@pytest.fixture(scope="session")
def measure(request: pytest.FixtureRequest) -> Callable[[Case], Samples]:
    """All contenders' times in a case, measured together when first asked for.

    ``compile`` takes part where its own benchmark was selected: it costs seconds a case.
    """
    option, results = request.config.option, request.config.stash[RESULTS]
    compiled = {
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("contender") == "compile"
    }

    def samples(case: Case) -> Samples:
        if case not in results:
            if option.benchmark_disable:
                # One round shows that the code runs; for that Inductor need not generate any.
                compiler, seconds, min_rounds = "aot_eager", 0.0, 1
            else:
                compiler, seconds, min_rounds = "inductor", option.seconds, 5
            results[case] = interleave(
                case, option.backend, compiler if case in compiled else None, seconds, min_rounds
            )
        return results[case]

    return samples


def pytest_benchmark_group_stats(
    benchmarks: list[dict], group_by: str
) -> list[tuple[str, list[dict]]] | None:
    """Groups in the order of the run, their rows named by the contender alone."""
    if group_by != "group":
        return None
    groups: dict[str, list[dict]] = {}
    for bench in benchmarks:
        row = {**bench, "name": bench["params"]["contender"]}
        groups.setdefault(bench["group"], []).append(row)
    return list(groups.items())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["resnest_fused"] = {
        "version": rf.__version__,
        "backend": config.option.backend,
        "backends": {status.name: status.reason for status in rf.backends()},
    }
    machine_info["torch"] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash[RESULTS]
    if not results or config.option.benchmark_disable:
        return
    cpu = cpuinfo.get_cpu_info()
    terminalreporter.section("split attention")
    for line in (
        f"{cpu.get('brand_raw', 'unknown CPU')}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {datetime.date.today()}",
        f"fused: FusedSplitAttention, {config.option.backend} backend, in turns with the others.",
        "copy: tensor.copy_ moving as many bytes as the op must, half read and half written:",
        "R+1 times out's size in eval; (2R+1) + (2R+2) times in train, forward + backward.",
        "",
        *summary.table(results),
    ):
        terminalreporter.write_line(line)
