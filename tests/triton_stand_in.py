"""Compiles Triton's kernels for an H100 that is not there, and says as JSON what becomes of calls.

    python tests/triton_stand_in.py loads|eval|step

``loads``: by shape and kernel, the bytes of each load and store of global memory in the kernels
that read maps of 14x14 and 7x7 pixels in bfloat16, NCHW. ``eval`` and ``step``: of ops called three
times, how often Triton's own way to a launch was taken, and each launch. The environment must not
ask for Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import compile_triton
import test_op
import torch
from cases import Case, draw_any
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from resnest_fused.backends.registration import latest
from resnest_fused.backends.triton import launch, ops, replay
from resnest_fused.ops import TABLE

_ACCESS = re.compile(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global.*?, 0x([0-9a-f]+)")


def _arguments(name: str, case: Case) -> list[Any]:
    given = test_op.ARGUMENTS[name](draw_any(case))
    return [given[argument.name] for argument in TABLE[name].arguments]


def loads() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Of each shape, by kernel and by ld or st, the bytes of every access of a thread."""
    driver.set_active(compile_triton.Absent(compile_triton.parse("cuda:90")))
    found: dict[str, dict[str, dict[str, list[int]]]] = {}

    def compile_only(
        kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any
    ) -> None:
        done = kernel.warmup(*arguments, grid=(programs,), **options, enable_fp_fusion=False)
        accesses: dict[str, list[int]] = {"ld": [], "st": []}
        for kind, count, bits in _ACCESS.findall(done.asm["ptx"]):
            accesses[kind].append(int(count or 1) * int(bits) // 8)
        accesses["ld"] += [int(size, 16) for size in _COPY.findall(done.asm["ptx"])]
        found[shape][kernel.__name__] = accesses

    launch.run = compile_only
    for shape, channels, side in (("14x14", 64, 14), ("7x7", 128, 7)):
        found[shape] = {}
        sizes = (2, channels, side, side, 2, 1, 32)
        case = Case(*sizes, torch.bfloat16, torch.float32, norm="running", prologue="running")
        for name in (
            "batch_statistics",
            "pool",
            "recombine",
            "pool_backward",
            "recombine_backward",
        ):
            getattr(ops, name)(*TABLE[name].unpack(_arguments(name, case)))
    return found


class Launching(compile_triton.Absent):
    """Takes launches, too, and notes them."""

    def __init__(self, launches: list[tuple[str, int, list[Any]]]) -> None:
        super().__init__(compile_triton.parse("cuda:90"))
        self.launches = launches
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def run(grid: int, _y: int, _z: int, *arguments: Any) -> None:
            # The stream, the function, its metadata, those of the launch, and two hooks.
            self.launches.append((metadata.name, grid, [_seen(a) for a in arguments[6:]]))

        return run


def _seen(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return [list(argument.shape), list(argument.stride()), str(argument.dtype)]
    return argument if isinstance(argument, (int, float, bool, type(None))) else str(argument)


def calls(mode: str) -> Iterator[dict[str, Any]]:
    """Of each op and form: Triton's own launches and all launches, by call."""
    launches: list[tuple[str, int, list[Any]]] = []
    driver.set_active(Launching(launches))
    own = 0
    long_way = JITFunction.run

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal own
        own += 1
        return long_way(*args, **options)

    JITFunction.run = counted
    if mode == "eval":
        names = ["split_attention"]
        case = Case(2, 64, 14, 14, 2, 1, 32, norm="running", prologue="running")
        cases = {"contiguous": case, "strided": replace(case, layout="every_other_column")}
    else:
        names = ["split_attention_train", "update_running_statistics", "split_attention_backward"]
        # Several tiles a sample, so that there are partial sums to add up.
        case = Case(2, 64, 56, 56, 2, 1, 32, norm="batch", prologue="batch")
        cases = {"contiguous": replace(case, layout="channels_last", dout_layout="channels_last")}
    for form, case in cases.items():
        for name in names:
            function = latest(getattr(ops, name))
            counts, seen = [], []
            for _ in range(3):
                arguments = _arguments(name, case)
                own = 0
                launches.clear()
                replay.call(name, function, arguments)
                counts.append(own)
                seen.append(list(launches))
            yield {"form": form, "op": name, "own": counts, "launches": seen}


if __name__ == "__main__":
    print(json.dumps(loads() if sys.argv[1] == "loads" else [*calls(sys.argv[1])]))
