"""The CUDA kernels on the CPU, by builds with sanitizers, and with mistakes that must be found."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_cuda_kernels
from cuda_on_host import mistakes
from cuda_on_host.build import KINDS, PROCESSORS, run_python
from cuda_on_host.kernels import LIBRARY, build_kernels
from cuda_on_host.mistakes import MISTAKES, Mistake, build_mistakes

# The first test waits for a build, the first one of a mistake for all mistakes.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kind", ["thread", "older", "address"])
def test_sanitizers_find_nothing(kind: str) -> None:
    names = ["schedules_make_no_difference"]
    names += ["smallest_sizes"] if kind == "older" else ["on_chip_against_the_truth"]
    if kind == "address":  # where sizes and addresses matter, and which is faster
        names += [
            "smallest_sizes",
            "in_eval_a_sample_does_not_depend_on_its_batch",
            "on_chip_all_is_the_same_to_the_bit",
            "single_phases",
            "channels_in_chunks",
            "numbers_of_any_sizes_are_finite",
        ]
    tests = [f"{test_cuda_kernels.__file__}::test_{name}" for name in names]
    # The cases of the short run, as a sanitizer makes each of them many times slower.
    options = ("-p", "no:cacheprovider", "-x", "-q", "-s")
    library = str(build_kernels(kind)[kind])
    result = run_python(kind, "-m", "pytest", *options, *tests, timeout=1000, **{LIBRARY: library})
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[str, int]]:
    """What is said of a mistake of that kind and number, and the exit status."""
    to = tmp_path_factory.mktemp("mistakes")
    wrong = build_mistakes(to)

    def make_all(kind: str) -> None:
        (to / kind).mkdir()
        arguments = (mistakes.__file__, str(wrong[kind]), kind, str(to / kind))
        result = run_python(kind, *arguments, timeout=600)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(PROCESSORS) as pool:
        list(pool.map(make_all, wrong))

    def read(kind: str, number: int) -> tuple[str, int]:
        text, _, status = (to / kind / f"{number}.txt").read_text().rpartition("\n")
        return text, int(status)

    return read


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mistake_nothing_is_found(
    kind: str, said: Callable[[str, int], tuple[str, int]]
) -> None:
    text, status = said(kind, 0)
    assert status == 0, text


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistakes_are_found(mistake: Mistake, said: Callable[[str, int], tuple[str, int]]) -> None:
    finding = {
        "plain": "AssertionError",
        "thread": "ThreadSanitizer: data race",
        "older": "ThreadSanitizer: data race",
        "address": "AddressSanitizer: heap-",  # whatever lies beside the tensor
    }
    text, status = said(mistake.kind, MISTAKES.index(mistake) + 1)
    assert status != 0, text
    assert (mistake.finding or finding[mistake.kind]) in text, text
