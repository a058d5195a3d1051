"""How kernels are launched: block sizes and warps by phase and shape, and their tuning.

Block sizes depend on the map's shape, but not on the batch. So in evaluation a sample's result does
not depend on its batch. No kernel's sums depend on the order in which programs run. With
``RESNEST_FUSED_AUTOTUNE=1`` a phase over a new kind of map is timed with several block sizes. The
fastest is kept, also in a file in Triton's cache. Nothing is timed while a CUDA graph is captured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton import replay
from resnest_fused.backends.triton.compat import VERSION, autotunes, cache_folder
from resnest_fused.backends.triton.problem import Map

Result = TypeVar("Result")

# Elements of each split per program. A thread then holds 32 or 16 elements of every map. These
# sizes were not measured on a GPU yet.
ELEMENTS = {
    "statistics": 4096,
    "pool": 4096,
    "pool_backward": 1024,
    "recombine": 4096,
    "recombine_backward": 2048,
}
# The pool's backward goes through this many blocks of pixels before its threads join their sums.
STEPS = 8
# The sizes that tuning tries.
CANDIDATES = (1024, 2048, 4096, 8192)
# In channels_last this many bytes of neighbouring channels fill whole memory transactions.
CHANNEL_BYTES = 128
NCHW_PIXELS = 1024
# Numbers of pixels for which programs of NCHW take slabs (map.py), and a slab's elements.
SLAB_PIXELS = (2, 256)
SLAB_ELEMENTS = 1024
# With narrow vectors a program takes fewer elements, but still a few for each thread.
LEAST_ELEMENTS = 512
# With fewer programs, some processors of a GPU would have none.
PROGRAMS = 1024


# Triton has functions like these two, but slow ones: kernels may call theirs too.


def parts(size: int, part: int) -> int:
    """How many parts of this size, of which the last may be smaller."""
    return -(-size // part)


def power_of_2(number: int) -> int:
    """The least power of two that is not less than this positive number."""
    return 1 << (number - 1).bit_length()


class MapBlock(NamedTuple):
    """A program's channels and pixels of one sample, and its number of warps."""

    channels: int
    pixels: int
    num_warps: int

    def tiles(self, channels: int, pixels: int, steps: int = 1) -> tuple[int, int]:
        """The numbers of channel blocks and of tiles of ``steps`` times the block's pixels."""
        return parts(channels, self.channels), parts(pixels, steps * self.pixels)

    def options(self) -> dict[str, int]:
        return {"BLOCK_C": self.channels, "BLOCK_P": self.pixels, "num_warps": self.num_warps}


class ColumnBlock(NamedTuple):
    """For sums over rows of a matrix: a program takes all rows of some features."""

    rows: int
    features: int
    num_warps: int

    def blocks(self, features: int) -> int:
        """Programs, or items, for so many features."""
        return parts(features, self.features)

    def constants(self) -> dict[str, int]:
        """For a kernel that has its number of warps from elsewhere."""
        return {"BLOCK_ROWS": self.rows, "BLOCK_F": self.features}

    def of_partials(self) -> dict[str, int]:
        """The same for a kernel with sums over other rows, too."""
        return {"BLOCK_TILES": self.rows, "BLOCK_PAIRS": self.features}

    def options(self) -> dict[str, int]:
        return {**self.constants(), "num_warps": self.num_warps}


class ProductBlock(NamedTuple):
    """A tile of a matrix product, and how much of its depth is taken at a time."""

    m: int
    n: int
    depth: int
    num_warps: int
    num_stages: int

    def tiles(self, rows: int, columns: int) -> int:
        """Tiles of a result of this size."""
        return parts(rows, self.m) * parts(columns, self.n)

    def options(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_D": self.depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


COLUMNS = ColumnBlock(rows=64, features=32, num_warps=4)
# Partial sums that a program adds up at once: as many tiles as there are, up to the second number.
PARTIALS, PARTIAL_TILES, PARTIAL_COLUMNS = 4096, 128, 1024
PRODUCT = ProductBlock(m=16, n=64, depth=32, num_warps=4, num_stages=3)
# Features that the one program of the running statistics takes at a time.
RUNNING_BLOCK = 1024


def acc(x: Tensor) -> tl.dtype:
    """The dtype in which kernels add."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def slab(m: Map) -> int:
    """SLAB of map.py: the pixels of a channel if programs take whole rows as one piece, else 0."""
    itemsize = m.x.element_size()
    narrow = not m.nhwc and m.pixels * itemsize % 16 != 0
    whole = m.channels * m.pixels * itemsize % 16 == 0
    return m.pixels if narrow and whole and SLAB_PIXELS[0] <= m.pixels <= SLAB_PIXELS[1] else 0


def alignment(m: Map) -> int:
    """The largest power of two, up to 16, that divides what decides how wide a map's loads are:

    the length of a row of x and of out, or with slabs the number of channels.
    """
    return math.gcd(m.channels if m.nhwc or slab(m) else m.pixels, 16)


def map_block(m: Map, elements: int) -> MapBlock:
    """A block of about this many elements, contiguous in memory as far as possible."""
    itemsize = m.x.element_size()
    if slab(m):
        block_p = power_of_2(m.pixels)
        # The next slab begins at a multiple of 16 bytes, too.
        least = 16 // math.gcd(m.pixels * itemsize, 16)
        block_c = max(min(power_of_2(m.channels), SLAB_ELEMENTS // block_p), least)
        return MapBlock(block_c, block_p, 4)
    if alignment(m) * itemsize < 16:
        # A thread loads more, narrower vectors, and then needs more channels' coefficients.
        elements = max(elements * alignment(m) * itemsize // 16, LEAST_ELEMENTS)
    if m.nhwc:
        block_c = min(power_of_2(m.channels), CHANNEL_BYTES // itemsize)
        block_p = min(power_of_2(m.pixels), max(elements // block_c, 1))
    else:
        block_p = min(power_of_2(m.pixels), NCHW_PIXELS, elements)
        block_c = min(power_of_2(m.channels), elements // block_p)
    return MapBlock(block_c, block_p, 8 if elements > 4096 else 4)


def partial_block(tiles: int) -> ColumnBlock:
    """For sums over the tiles of a sample."""
    rows = min(power_of_2(tiles), PARTIAL_TILES)
    return ColumnBlock(rows, min(PARTIALS // rows, PARTIAL_COLUMNS), COLUMNS.num_warps)


def map_options(m: Map, block: MapBlock) -> dict[str, Any]:
    """The constants of every kernel that computes z of a map, and the launch's options."""
    return {
        "EPS": m.bn0.eps,
        "RELU": m.relu,
        "RADIX": m.radix,
        "NHWC": m.nhwc,
        "ALIGN": alignment(m),
        "SLAB": slab(m),
        "ACC": acc(m.x),
        **block.options(),
    }


def samples_per_program(batch: int, programs: int) -> int:
    """How many samples a program takes, if one sample is the work of ``programs`` programs."""
    chunks = min(max(batch, 1), parts(PROGRAMS, programs))
    return max(parts(batch, chunks), 1)


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
    """Launch this many programs, if any; ``options`` are more arguments and the launch's own."""
    if programs > 0:
        # No contraction: it would differ between kernels. They call tl.fma where they mean it.
        compiled = kernel[(programs,)](*arguments, **options, enable_fp_fusion=False)
        if replay.recording():
            constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
            replay.launched(compiled[(programs, 1, 1)], (*arguments, *constants))


def best(phase: str, m: Map, call: Callable[[MapBlock], Result]) -> Result:
    """Run ``call`` with the block for this phase and map."""

    if not autotunes():
        return call(map_block(m, ELEMENTS[phase]))
    key = _key(phase, m)
    chosen = _tuned().get(key)
    if chosen is None:
        replay.not_settled()
        if m.batch == 0 or _is_capturing(m.x):
            return call(map_block(m, ELEMENTS[phase]))
        chosen = min(CANDIDATES, key=lambda n: _time(lambda: call(map_block(m, n))))
        _tuned()[key] = chosen
        _save()
    return call(map_block(m, chosen))


# --- tuning


def _key(phase: str, m: Map) -> str:
    """All that the choice depends on; the batch is not part of it."""
    dtype = str(m.x.dtype).removeprefix("torch.")
    layout = "nhwc" if m.nhwc else "nchw"
    form = "bn0" if m.bn0.mean is not None else "relu" if m.relu else "plain"
    device = _device_name(m.x.device)
    return f"{device}: {phase} {m.radix}x{m.channels}@{m.pixels} {dtype} {layout} {form}"


@functools.cache
def _device_name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if device.type != "cpu" else "cpu"


def _time(call: Callable[[], object]) -> float:
    """The median time of a call in milliseconds."""
    return float(triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median"))


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _file() -> Path:
    return Path(cache_folder()) / f"resnest_fused-{VERSION}.json"


@functools.cache
def _tuned() -> dict[str, int]:
    """Elements by key, as found so far."""
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):  # absent, or damaged
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: elements for key, elements in found.items() if elements in CANDIDATES}


def _save() -> None:
    path = _file()
    part = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # where nothing can be written, each process tunes anew
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(_tuned(), indent=1, sort_keys=True) + "\n")
        part.replace(path)
