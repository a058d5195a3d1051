"""Options, the measurement that the benchmarks share, and the summary at the end of a run."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import cpuinfo
import pytest
import summary
import torch
from grid import GRIDS, Case
from interleave import interleave

import resnest_fused as rf

Samples = dict[str, list[float]]
RESULTS = pytest.StashKey[dict[Case, Samples]]()
DEFAULTS = {"shapes": "stages", "backend": "native", "seconds": 1.0}
MIN_ROUNDS = 7


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("split attention benchmarks")
    group.addoption(
        "--shapes",
        choices=GRIDS,
        default=DEFAULTS["shapes"],
        help="ResNeSt-50's four stages in the usual settings, or the full grid (hours; use -k)",
    )
    group.addoption(
        "--backend",
        default=DEFAULTS["backend"],
        help="backend of the fused module (default: %(default)s)",
    )
    group.addoption(
        "--seconds",
        type=float,
        default=DEFAULTS["seconds"],
        help="time for the rounds of one case, all contenders together (default: %(default)s)",
    )


def get_option(config: pytest.Config, name: str) -> Any:
    """An option's value; its default where pytest found this file too late to add options."""
    return config.getoption(name, DEFAULTS[name])


def is_disabled(config: pytest.Config) -> bool:
    return config.option.benchmark_disable and not config.option.benchmark_enable


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own pytest_configure
def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}
    option = config.option
    option.benchmark_columns = option.benchmark_columns or ["min", "median", "iqr", "rounds"]
    option.benchmark_time_unit = option.benchmark_time_unit or "us"
    backend = get_option(config, "backend")
    known = {status.name: status for status in rf.backends()}
    if backend not in known:
        raise pytest.UsageError(f"--backend: expected one of {', '.join(known)}, got {backend}")
    if not known[backend].available:
        raise pytest.UsageError(f"--backend={backend}: {known[backend].reason}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contender"} <= set(metafunc.fixturenames):
        pairs = list(GRIDS[get_option(metafunc.config, "shapes")]())
        ids = [f"{case}-{contender}".replace(" ", "-") for case, contender in pairs]
        metafunc.parametrize(("case", "contender"), pairs, ids=ids)


@pytest.fixture(scope="session")
def measure(request: pytest.FixtureRequest) -> Callable[[Case], Samples]:
    """All contenders' times in a case, measured together when first asked for.

    ``compile`` takes part where its own benchmark was selected: it costs seconds a case.
    """
    config, results = request.config, request.config.stash[RESULTS]
    compiled = {
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("contender") == "compile"
    }

    if is_disabled(config):
        # One round shows that the code runs; for that Inductor need not generate any.
        compiler, seconds, rounds = "aot_eager", 0.0, 1
    else:
        compiler, seconds, rounds = "inductor", get_option(config, "seconds"), MIN_ROUNDS

    def samples(case: Case) -> Samples:
        if case not in results:
            results[case] = interleave(
                case,
                get_option(config, "backend"),
                compiler if case in compiled else None,
                seconds,
                rounds,
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
        "backend": get_option(config, "backend"),
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
    if not results or is_disabled(config):
        return
    cpu = cpuinfo.get_cpu_info()
    terminalreporter.section("split attention")
    for line in (
        f"{cpu.get('brand_raw', 'unknown CPU')}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {datetime.date.today()}",
        f"fused: FusedSplitAttention, {get_option(config, 'backend')} backend; all took turns.",
        "copy: tensor.copy_ moving as many bytes as the op must, half read and half written:",
        "R+1 times out's size in eval; (2R+1) + (2R+2) times in train, forward + backward.",
        "",
        *summary.table(results),
    ):
        terminalreporter.write_line(line)
