"""Prepares every test: chooses backend, device and number of threads, and seeds random numbers."""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the tests make their tensors (default: %(default)s)",
    )
    parser.addoption(
        "--kernels",
        choices=("native", "triton"),
        default="native",
        help="whose kernels the tests run (default: %(default)s)",
    )
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="seed of all random numbers (default: %(default)s)",
    )
    parser.addoption("--sources", help="folder of other packages' sources, for the mark sources")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would begin with the most tests
    # pytest-xdist's processes share the cores. With more threads than cores they would wait.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
    # The option is missing if pytest found this file too late to add it.
    if config.getoption("--device", "cpu") == "cuda":
        # Here, because test modules make tensors when they are imported.
        torch.set_default_device("cuda")
        # Eager PyTorch is the measure of results, so it must be precise and repeatable.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    else:
        # Triton's kernels run on the CPU too, if this is set before anything imports Triton.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import cases  # and with it the package

    cases.BACKEND = config.getoption("--kernels", "native")


# The files that take longest, in this order. Begun last, one would run while other processes wait.
LONGEST = (
    *("test_cuda_sanitizers", "test_compilers", "test_triton", "test_cuda_kernels"),
    *("test_compile", "test_triton_compiled", "test_export", "test_cpu_kernels", "test_cli"),
    *("test_distributed", "test_install", "test_models", "test_backends", "test_reimport"),
)


def _start(item: pytest.Item) -> int:
    """When an item's file is begun, among those of ``LONGEST`` and the rest."""
    return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_start)
    cases: Counter[str] = Counter()
    for item in items:
        # The product of a module's mark and of a function's.
        of_cases = math.prod(mark.args[0] for mark in item.iter_markers("one_in"))
        function = item.nodeid.partition("[")[0]
        if cases[function] % of_cases:
            item.add_marker("long")
        cases[function] += 1
    if seed := config.getoption("--seed", 0):
        for item in items:
            if hypothesis.is_hypothesis_test(item.obj):
                item.obj = hypothesis.seed(seed)(item.obj)  # instead of that from its name


@pytest.fixture(scope="session", autouse=True)
def backend() -> Iterator[None]:
    """Ensures that the chosen kernels run: the reference must not be compared with itself."""
    import cases

    from resnest_fused.backends import choose, use_backend

    x = torch.empty(1)
    choose(cases.BACKEND, x)  # raises and says why it cannot run on this device
    if cases.BACKEND == "native":
        assert choose("auto", x) == "native", "another backend is made the default"
        yield
    else:
        with use_backend(cases.BACKEND):
            yield


@pytest.fixture(autouse=True)
def gpu_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Attributes a kernel's error, which comes late, to the test that launched it.

    After it every CUDA call of the process fails, so the process ends here. pytest-xdist starts
    another one in its place and names the test.
    """
    yield
    if torch.get_default_device().type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = f"{request.node.nodeid}: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(reason, returncode=1)
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(reason, file=sys.stderr, flush=True)
        os._exit(1)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    start = request.config.getoption("--seed", 0)
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode(), start))


@pytest.fixture
def fill_memory() -> Iterator[Callable[[int], None]]:
    """As ``cases.fill_memory``."""
    import cases

    with cases.fill_memory() as fill:
        yield fill


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)
