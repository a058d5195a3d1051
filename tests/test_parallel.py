"""An exception in any thread reaches the caller unchanged."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_on_host.build import COMPILER, CSRC, TORCH_TARGET_VERSION

ITEMS, THREADS = 1000, (1, 2, 5)
# Bytes per item. One large item is enough for a thread; all small ones together are not.
LARGE, SMALL = 1 << 20, 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], str]:
    """The outcome of items of this many bytes, of which those from ``first`` on throw."""
    library = tmp_path_factory.mktemp("parallel") / "parallel.so"
    torch_folder = Path(torch.__file__).parent
    source = Path(__file__).with_name("parallel_exceptions.cpp")
    includes = [f"-I{CSRC}", f"-I{torch_folder / 'include'}"]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++20", "-fPIC", "-shared", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    command = [*COMPILER, *flags, *includes, str(source), *libraries]
    subprocess.run([*command, "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).run
    function.argtypes = (*(ctypes.c_int64,) * 3, ctypes.c_char_p, ctypes.c_size_t)

    def run(bytes_per_item: int, first: int) -> str:
        told = ctypes.create_string_buffer(200)
        function(ITEMS, bytes_per_item, first, told, len(told))
        return told.value.decode()

    return run


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("bytes_per_item", [LARGE, SMALL])
def test_the_first_exception_arrives_with_its_type_and_message(
    run: Callable[[int, int], str], bytes_per_item: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    for first in (0, 1, 300, 999):
        assert {run(bytes_per_item, first) for _ in range(20)} == {f"Refusal: item {first}"}
    assert run(bytes_per_item, ITEMS) == "nothing thrown"
