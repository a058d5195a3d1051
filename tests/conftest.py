"""What holds for every test: the native backend runs, and random numbers are the test's own."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

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
def poisoned() -> Iterator[None]:
    """Fill every fresh tensor with NaN, so that an element that nothing writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
