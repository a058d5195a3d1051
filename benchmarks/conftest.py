"""Options, the measurement that the benchmarks share, and the summary at the end of a run."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import cpuinfo
import instructions  # sets the environment, before the modules below read it
import network
import pytest
import summary
import torch
from contenders import interleave
from grid import GRIDS, Case
from network import Workload

import resnest_fused as rf
from resnest_fused.backends import native

Samples = dict[str, list[float]]
RESULTS = pytest.StashKey[dict[Case, Samples]]()
NETWORK_RESULTS = pytest.StashKey[dict[Workload, network.Result]]()
DEFAULTS = {"shapes": "stages", "backend": "native", "seconds": 1.0, "model": "ours"}
MIN_ROUNDS = 7
# A call of a whole network takes up to seconds, so its rounds get more time and are fewer.
NETWORK_SECONDS = 6
NETWORK_MIN_ROUNDS = 3


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
        help="backend of the fused modules (default: %(default)s)",
    )
    group.addoption(
        "--seconds",
        type=float,
        default=DEFAULTS["seconds"],
        help="time for the rounds of one case, all contenders together (default: %(default)s); "
        f"a whole network's take {NETWORK_SECONDS} times as long",
    )
    group.addoption(
        "--model",
        choices=network.MODELS,
        default=DEFAULTS["model"],
        help="whose ResNeSt-50 to measure as a whole (default: %(default)s)",
    )
    group.addoption(
        instructions.OPTION,
        choices=instructions.VALUES,
        help="instructions of the CPU that all contenders are held to (default: each the best)",
    )


def get_option(config: pytest.Config, name: str) -> Any:
    """An option's value; its default if pytest found this file too late to add options."""
    return config.getoption(name, DEFAULTS[name])


def is_disabled(config: pytest.Config) -> bool:
    return config.option.benchmark_disable and not config.option.benchmark_enable


def cpu_capabilities() -> tuple[str, str]:
    """The instruction sets of resnest_fused's kernels, if they were built, and of PyTorch's."""
    kernels = "none" if native.unavailable() else native.build_info()["cpu_capability"]
    return kernels, torch.backends.cpu.get_cpu_capability()


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in its own pytest_configure
def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS], config.stash[NETWORK_RESULTS] = {}, {}
    option = config.option
    option.benchmark_columns = option.benchmark_columns or ["min", "median", "iqr", "rounds"]
    option.benchmark_time_unit = option.benchmark_time_unit or "us"
    backend = get_option(config, "backend")
    known = {status.name: status for status in rf.backends()}
    if backend not in known:
        raise pytest.UsageError(f"--backend: expected one of {', '.join(known)}, got {backend}")
    if not known[backend].available:
        raise pytest.UsageError(f"--backend={backend}: {known[backend].reason}")
    wanted = config.getoption(instructions.OPTION, None)
    missed = wanted and instructions.missed(wanted, *cpu_capabilities())
    if missed:
        raise pytest.UsageError(missed)
    if get_option(config, "model") == "official" and importlib.util.find_spec("resnest") is None:
        raise pytest.UsageError("--model=official: the package resnest is not installed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contender"} <= set(metafunc.fixturenames):
        pairs = list(GRIDS[get_option(metafunc.config, "shapes")]())
        ids = [f"{case}-{contender}".replace(" ", "-") for case, contender in pairs]
        metafunc.parametrize(("case", "contender"), pairs, ids=ids)


@pytest.fixture(scope="session")
def measure(request: pytest.FixtureRequest) -> Callable[[Case], Samples]:
    """All contenders' times in a case, measured together when first asked for.

    ``compile`` takes part only if its benchmark was selected, because it costs seconds a case.
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
        # One round of few samples shows that the benchmark runs, without Inductor's code.
        compiler, seconds, rounds, most_samples = "aot_eager", 0.0, 1, 2
    else:
        compiler, seconds, rounds = "inductor", get_option(config, "seconds"), MIN_ROUNDS
        most_samples = sys.maxsize

    def samples(case: Case) -> Samples:
        if case not in results:
            results[case] = interleave(
                dataclasses.replace(case, batch=min(case.batch, most_samples)),
                get_option(config, "backend"),
                compiler if case in compiled else None,
                seconds,
                rounds,
            )
        return results[case]

    return samples


@pytest.fixture(scope="session")
def measure_network(request: pytest.FixtureRequest) -> Callable[[Workload], network.Result]:
    """All contenders' times and memory in a workload, measured together when first asked for."""
    config, results = request.config, request.config.stash[NETWORK_RESULTS]
    if is_disabled(config):
        side, seconds, rounds = 64, 0.0, 1
    else:
        side, rounds = network.SIDE, NETWORK_MIN_ROUNDS
        seconds = NETWORK_SECONDS * get_option(config, "seconds")

    def result(workload: Workload) -> network.Result:
        if workload not in results:
            results[workload] = network.measure(
                workload,
                get_option(config, "model"),
                get_option(config, "backend"),
                side,
                seconds,
                rounds,
            )
        return results[workload]

    return result


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
        "cpu_capability": cpu_capabilities()[0],
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
    cases, workloads = config.stash[RESULTS], config.stash[NETWORK_RESULTS]
    if is_disabled(config) or not (cases or workloads):
        return
    backend = get_option(config, "backend")
    kernels, aten = cpu_capabilities()
    machine = (
        f"{cpuinfo.get_cpu_info().get('brand_raw', 'unknown CPU')}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, {datetime.date.today()}; "
        f"instructions: fused {kernels}, PyTorch {aten.lower()}"
    )
    sections = {}
    if cases:
        sections["split attention"] = (
            machine,
            f"fused: the {backend} backend; all took turns. After conv: bn0, ReLU and attention.",
            "copy: tensor.copy_ moving as many bytes as the op must, half read and half written:",
            "R+1 times out's size in eval; in train, forward + backward, (2R+1) + (2R+2) times for",
            "the attention and (3R+1) + (3R+2) times for all after conv.",
            "",
            *summary.table(cases),
        )
    if workloads:
        sections["ResNeSt-50"] = (
            machine,
            f"Whole network ({get_option(config, 'model')}), {network.SIDE} pixels, fp32 NCHW.",
            f"fused: the {backend} backend; folded: norms in convolutions, too. All took turns.",
            "",
            *summary.network_table(workloads),
        )
    for title, lines in sections.items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
