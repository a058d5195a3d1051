"""Runs the kernels of toy.cu: a script for any build, ``toys.py LIBRARY NAME``.

The function ``right`` must succeed on every build. Each other one does one thing wrong.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

TOYS: dict[str, Callable[[Toys], None]] = {}
WARP = 32
OK = "no error"


def toy(function: Callable[[Toys], None]) -> Callable[[Toys], None]:
    TOYS[function.__name__] = function
    return function


class Toys:
    """The library; its functions are called by name and return what the launch says."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.cuda_on_host_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self._library.cuda_on_host_set.restype = ctypes.c_bool

    def set(self, name: str, value: int) -> None:
        assert self._library.cuda_on_host_set(name.encode(), value), name

    def __call__(self, name: str, *arguments: Any) -> str:
        function = self._library[f"toy_{name}"]
        function.restype = ctypes.c_char_p
        return function(*arguments).decode()


def floats(count: int, value: float = 0.0) -> Any:
    return (ctypes.c_float * count)(*[value] * count)


def expect(found: object, expected: object) -> None:
    if found != expected:
        raise SystemExit(f"expected {expected!r}, got {found!r}")


# --- right


@toy
def right(toys: Toys) -> None:
    for seed in range(3):
        toys.set("seed", seed)
        sums(toys, 16, 256)
        sums(toys, 5, 64)
        for resident_blocks in (1, 2, 3):
            toys.set("resident_blocks", resident_blocks)
            relay(toys)
        share_in_warp(toys, True)
    end_early(toys)
    indices(toys)
    copy_vectors(toys, 0)
    refused(toys)
    stuck(toys)
    sums(toys, 16, 256)


def sums(toys: Toys, grid: int, block: int, barrier: bool = True) -> None:
    x, out = floats(grid * block, 0.5), floats(grid)
    shared_bytes = 4 * block // WARP
    expect(toys("sum_blocks", grid, block, shared_bytes, x, out, barrier), OK)
    expect(set(out), {block / 2})


def relay(toys: Toys, acquires: bool = True) -> None:
    items, passes = 7, 5
    counters = (ctypes.c_uint * (1 + items * passes))()
    values = floats((passes + 1) * items * WARP)
    expect(toys("relay", 4, 64, counters, values, items, passes, acquires), OK)
    expect(set(values[-items * WARP :]), {float(passes)})


def share_in_warp(toys: Toys, sync: bool) -> None:
    block = 64
    x, out = (ctypes.c_double * block)(*range(block)), (ctypes.c_double * block)()
    expect(toys("share_in_warp", block, x, out, sync), OK)
    expected = [sum(range(32)), sum(range(32, 64))]
    expect(list(out), [float(expected[thread // WARP]) for thread in range(block)])


def end_early(toys: Toys) -> None:
    out = floats(32)
    expect(toys("end_early", 64, out), OK)
    expect(list(out), [float(31 - thread) for thread in range(32)])


def indices(toys: Toys) -> None:
    grid, block = (3, 2), (5, 4)
    out = (ctypes.c_int * (4 * 6 * 20))()
    expect(toys("indices", *grid, *block, out), OK)
    expected = [
        value
        for block_y in range(grid[1])
        for block_x in range(grid[0])
        for thread_y in range(block[1])
        for thread_x in range(block[0])
        for value in (block_x, block_y, thread_x, thread_y)
    ]
    expect(list(out), expected)


def copy_vectors(toys: Toys, offset: int) -> None:
    x, out = floats(64, 3.0), floats(32)
    expect(toys("copy_vectors", 8, ctypes.byref(x, offset), out), OK)
    expect(set(out), {3.0})


def refused(toys: Toys) -> None:
    """Configurations that CUDA does not launch."""
    out = floats(2000)
    for grid, block in ((0, 32), (1, 0), (1, 1056)):
        found = toys("sum_blocks", grid, block, 0, out, out, True)
        expect(found, "invalid configuration argument")
    expect(toys("indices", 1, 70_000, 1, 1, out), "invalid configuration argument")
    expect(toys("read_shared", 32, 48 * 1024 + 1, out, 0), "invalid argument")
    toys.set("shared_memory_limit", 48 * 1024 + 1)
    expect(toys("read_shared", 32, 48 * 1024 + 1, out, 0), OK)
    toys.set("shared_memory_limit", 48 * 1024)


def stuck(toys: Toys) -> None:
    """A launch that would never end fails, and says where its threads are."""
    found = toys("half_at_shuffle")
    expect(found, "deadlock; block 0: 32 at __syncthreads, 32 at a shuffle")
    toys.set("resident_blocks", 2)
    flag = (ctypes.c_uint * 1)()
    for sleeps in (False, True):
        found = toys("wait_forever", flag, sleeps)
        blocks = [f"; block {index}: 64 waiting in a loop" for index in range(2)]
        expect(found, f"deadlock{''.join(blocks)}")
    for name, reason in (
        ("split_warp", "threads of a warp wait for each other at different operations"),
        ("shuffle_in_half_warp", "a shuffle in a warp of fewer than 32 threads"),
        ("name_half_warp", "a warp operation that does not name the whole warp"),
    ):
        expect(toys(name).partition(";")[0], reason)


# --- races


@toy
def no_barrier(toys: Toys) -> None:
    sums(toys, 16, 256, barrier=False)


@toy
def no_acquire(toys: Toys) -> None:
    relay(toys, acquires=False)


@toy
def shuffle_as_barrier(toys: Toys) -> None:
    share_in_warp(toys, False)


@toy
def blocks_at_one_place(toys: Toys) -> None:
    expect(toys("one_place", 2, 64, floats(1)), OK)


# --- addresses


@toy
def beyond_shared(toys: Toys) -> None:
    toys("read_shared", 32, 16, floats(32), 4)


@toy
def beyond_global(toys: Toys) -> None:
    # Large, because ctypes allocates few bytes from a pool of its own.
    count = 1000
    toys("read_shared", count + 1, 16, floats(count), 0)


@toy
def misaligned(toys: Toys) -> None:
    copy_vectors(toys, 4)


if __name__ == "__main__":
    TOYS[sys.argv[2]](Toys(sys.argv[1]))
