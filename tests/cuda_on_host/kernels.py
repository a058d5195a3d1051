"""The real kernels' library on the CPU, and the device that it takes the CPU for."""

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

# What needs a GPU: the device's properties, and the registration for CUDA tensors.
REAL_DEVICE = ("context.cu", "library.cu")
# Small blocks and few of them are quick to run, and reach what needs many on a GPU. In L2 there is
# room for a small sample or two.
DEVICE = {
    "multiprocessors": 2,
    "threads_per_block": 128,
    "threads_per_multiprocessor": 128,
    "registers_per_multiprocessor": 65_536,
    "shared_per_block": 48 * 1024,
    "shared_per_multiprocessor": 64 * 1024,
    "grid_blocks": 2**31 - 1,
    "l2_bytes": 32 * 1024,
    "bytes_per_microsecond": 100_000,
}
# The library for tests that are run once more, by a build with a sanitizer.
LIBRARY = "RESNEST_FUSED_ON_HOST_LIBRARY"
STRATEGIES = {"fastest": 0, "launches": 1, "persistent": 2}


def build_kernels(
    *kinds: str, csrc: Path = CSRC, changed: Mapping[str, Collection[str]] = MappingProxyType({})
) -> dict[str, Path]:
    """The kernels' library by kind of build.

    The files that are ``changed`` in a kind come from another ``csrc``, unoptimised, and in front:
    of a function that several files have, the linker takes the first.
    """
    paths = [*sorted(CSRC.glob("cuda/*.cu")), *CSRC.glob("cuda/*.cpp"), CSRC / "problem.cpp"]
    names = [path.relative_to(CSRC) for path in paths if path.name not in REAL_DEVICE]

    def sources(kind: str) -> list[Source]:
        others = changed.get(kind, ())
        return [
            *(Source(csrc / n, ["-O0", f"-I{csrc}"]) for n in names if n.name in others),
            *(Source(CSRC / n, [f"-I{CSRC}"]) for n in names if n.name not in others),
            Source(HERE / "library.cpp", [f"-I{CSRC}"]),
        ]

    return build({kind: sources(kind) for kind in kinds}, torch=True)


class Kernels:
    """A library, loaded; a process can have one."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        self._library = ctypes.CDLL(str(library))
        for setter in (self._library.cuda_on_host_set, self._library.device_on_host_set):
            setter.argtypes = [ctypes.c_char_p, ctypes.c_int64]
            setter.restype = ctypes.c_bool
        self.ops = torch.ops.resnest_fused_on_host

    def replace_native(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the native backend run these kernels, on CPU tensors."""
        for name in TABLE:
            monkeypatch.setattr(native, name, getattr(self.ops, name).default)

    def reset(self) -> None:
        """The usual device, the fastest strategy, the first schedule, and no mistake."""
        self.set_device(**DEVICE)
        self.choose("fastest")
        self.schedule(seed=0, resident_blocks=3)
        self.make_mistake(0)

    def set_device(self, **properties: int) -> None:
        for name, value in properties.items():
            assert self._library.device_on_host_set(name.encode(), value), name
            if name == "shared_per_block":
                self.limit_shared_memory(value)

    def limit_shared_memory(self, limit: int) -> None:
        """What a launch may ask for, whatever the device says."""
        assert self._library.cuda_on_host_set(b"shared_memory_limit", limit)

    def choose(self, strategy: str) -> None:
        """In evaluation; "persistent" refuses the calls that it has no kernel for."""
        assert self._library.device_on_host_set(b"choice", STRATEGIES[strategy])

    def schedule(self, *, seed: int, resident_blocks: int) -> None:
        """In which order threads run, and how many blocks at a time."""
        assert self._library.cuda_on_host_set(b"seed", seed)
        assert self._library.cuda_on_host_set(b"resident_blocks", resident_blocks)

    def make_mistake(self, number: int) -> None:
        """One of those that mistakes.py has built in; 0 for none."""
        assert self._library.cuda_on_host_set(b"mistake", number)
