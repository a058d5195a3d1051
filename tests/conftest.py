"""What holds for every test: the native backend runs, and random numbers are the test's own."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Iterator

import pytest
import torch

import resnest_fused as rf
from resnest_fused.backends import choose


@pytest.fixture(scope="session", autouse=True)
def native_backend() -> None:
    """Without it the tests would compare the reference with itself."""
    native = next(status for status in rf.backends() if status.name == "native")
    assert native.available, native.reason
    assert choose("auto", torch.empty(1)) == "native", "another backend is made the default"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def fill_memory() -> Iterator[Callable[[int], None]]:
    """A function that makes glibc fill what is allocated with a byte, and what is freed with its
    complement."""
    perturb = -6  # M_PERTURB of malloc.h
    mallopt = ctypes.CDLL(None).mallopt

    def fill(byte: int) -> None:
        assert mallopt(perturb, byte ^ 0xFF)
        assert (torch.empty(5000, dtype=torch.uint8) == byte).all()

    yield fill
    mallopt(perturb, 0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)
