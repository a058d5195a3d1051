"""How threads share the work, and that an exception in any of them reaches the caller unchanged."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
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


# Notes for each call how many items the op shares, among how many threads, and a thread's most.
COUNT_SHARES = """
import ctypes, json, sys
import torch
import resnest_fused as rf

class Shared(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("items", "threads", "largest")]

THREADS = (1, 2, 3, 5, 7, 8, 12, 16, 21, 24, 31, 32, 43, 48, 61, 64)
counter = ctypes.CDLL(sys.argv[1])
counter.noted_begin.restype = ctypes.POINTER(Shared)

def noted():
    shared = counter.noted_begin()[: counter.noted_count()]
    return sorted({(s.items, s.threads, s.largest) for s in shared})

shapes = [(b, 64 << s, 56 >> s, 56 >> s) for s in range(4) for b in (1, 2, 3, 8, 32, 100, 256)]
shapes += [(b, 64, 200, 334) for b in (1, 2)]
found = []
for batch, channels, height, width in shapes:
    module = rf.FusedSplitAttentionConv2d(channels, channels, 1)
    module.conv = torch.nn.Identity()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        size = (batch, 2 * channels, height, width)
        x = torch.empty(size, memory_format=memory_format).requires_grad_()
        for threads in THREADS:
            for backward in (False, True):
                counter.set_threads(threads)
                with torch.set_grad_enabled(backward):
                    out = module.train(backward and batch > 1)(x)
                if backward:
                    out.backward(torch.empty_like(out))
                    x.grad = None
                found.append((size, str(memory_format), backward, threads, noted()))
print(json.dumps(found))
"""


def test_large_batches_have_work_for_all_threads(tmp_path: Path) -> None:
    """Counted for up to 64 threads, as torch shares the items that a call offers."""
    counter = tmp_path / "work_shares.so"
    source = Path(__file__).with_name("work_shares.cpp")
    flags = ["-std=c++20", "-fPIC", "-shared"]
    subprocess.run([*COMPILER, *flags, str(source), "-o", str(counter)], check=True)
    program = [sys.executable, "-c", COUNT_SHARES, str(counter)]
    environment = {**os.environ, "LD_PRELOAD": str(counter)}
    run = subprocess.run(program, env=environment, stdout=subprocess.PIPE, check=True)
    found = json.loads(run.stdout)
    assert len(found) == 30 * 2 * 16 * 2
    for size, layout, backward, threads, shared in found:
        if size[0] >= 100:
            used = max(used for _, used, _ in shared)
            assert used >= 0.8 * threads, (size, layout, backward, threads)
        # From so many items per thread on no thread has more than 1.2 times the mean.
        if size[0] >= 100 and threads <= size[0] // 5:
            assert any(items >= 5 * threads for items, *_ in shared), (size, layout, threads)
