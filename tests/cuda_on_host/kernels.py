"""The library of the real kernels on the CPU, and the GPU that it simulates."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from cuda_on_host.build import CSRC, HERE, Source, build

from resnest_fused.backends import native
from resnest_fused.ops import TABLE

# The files that need a GPU: the device's properties, and the registration for CUDA tensors.
REAL_DEVICE = ("context.cu", "library.cu")
# Few and small blocks run quickly, and reach code that needs many blocks on a GPU. L2 has room for
# a small sample or two.
DEVICE = {
    "multiprocessors": 2,
    "threads_per_block": 128,
    "threads_per_multiprocessor": 128,
    "registers_per_multiprocessor": 65_536,
    "shared_per_block": 48 * 1024,
    "shared_per_block_optin": 96 * 1024,
    "shared_per_multiprocessor": 64 * 1024,
    "grid_blocks": 2**31 - 1,
    "cluster_blocks": 1,
    "architecture": 90,
    "driver": 13000,
}
# Names the library with a sanitizer, with which tests run once more.
LIBRARY = "RESNEST_FUSED_ON_HOST_LIBRARY"


def build_kernels(
    *kinds: str, csrc: Path = CSRC, changed: Mapping[str, Collection[str]] = MappingProxyType({})
) -> dict[str, Path]:
    """The kernels' library by kind of build.

    The files that are ``changed`` in a kind come from another ``csrc``, unoptimised. They come
    first, because the linker takes the first of several definitions of a function. So they need
    not have all.
    """
    paths = [*sorted(CSRC.glob("cuda/*.cu")), *CSRC.glob("cuda/*.cpp"), CSRC / "problem.cpp"]
    names = [path.relative_to(CSRC) for path in paths if path.name not in REAL_DEVICE]

    def sources(kind: str) -> list[Source]:
        others = changed.get(kind, ())
        return [
            *(Source(csrc / n, ["-O0", f"-I{csrc}"]) for n in names if n.name in others),
            *(Source(CSRC / n, [f"-I{CSRC}"]) for n in names),
            Source(HERE / "library.cpp", [f"-I{CSRC}"]),
        ]

    return build({kind: sources(kind) for kind in kinds}, torch=True)


class Kernels:
    """A loaded library; a process can have one."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self._library = ctypes.CDLL(str(library))
        for setter in (self._library.cuda_on_host_set, self._library.device_on_host_set):
            setter.argtypes = [ctypes.c_char_p, ctypes.c_int64]
            setter.restype = ctypes.c_bool
        self._library.cuda_on_host_launches.restype = ctypes.c_int64
        self.ops = torch.ops.resnest_fused_on_host

    def replace_native(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the native backend run these kernels, on CPU tensors."""
        for name in TABLE:
            monkeypatch.setattr(native, name, getattr(self.ops, name).default)

    def reset(self) -> None:
        """The usual device, the first schedule, and no mistake."""
        self.set_device(**DEVICE)
        self.schedule(seed=0, resident_blocks=3)
        self.make_mistake(0)

    def set_device(self, **properties: int) -> None:
        for name, value in properties.items():
            assert self._library.device_on_host_set(name.encode(), value), name
            if name == "shared_per_block":
                self.limit_shared_memory(value)
            elif name == "shared_per_block_optin":
                assert self._library.cuda_on_host_set(b"shared_memory_optin", value)

    def limit_shared_memory(self, limit: int) -> None:
        """Limit the shared memory of a launch, whatever the device says."""
        assert self._library.cuda_on_host_set(b"shared_memory_limit", limit)

    def schedule(self, *, seed: int, resident_blocks: int) -> None:
        """Choose the order in which threads run, and how many blocks run at a time."""
        assert self._library.cuda_on_host_set(b"seed", seed)
        assert self._library.cuda_on_host_set(b"resident_blocks", resident_blocks)

    def launches(self) -> int:
        """How many launches there were so far."""
        return int(self._library.cuda_on_host_launches())

    def make_mistake(self, number: int) -> None:
        """Make one of the mistakes that mistakes.py built in, or none with 0."""
        assert self._library.cuda_on_host_set(b"mistake", number)
