"""Compiles every Triton kernel in all forms, dtypes and layouts, for GPUs that are not there.

    python tests/compile_triton.py cuda:80 hip:gfx942 [--one-in 3]

Prints a line for each target. Kernels are compiled as the ops would launch them in the tests'
calls, with ``--one-in`` in a part of these. The environment must not ask for Triton's interpreter.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import test_op
import torch
from cases import Case, draw_any
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from resnest_fused.backends.triton import launch, ops
from resnest_fused.ops import TABLE

SIZES = (2, 64, 16, 16, 2, 1, 32)
# Every form, dtype and layout, and every kernel in each dtype; then sizes that share no divisor
# with a block, other radices, and float64.
CASES = [
    Case(*SIZES, dtype, layout=layout, norm=norm, prologue=prologue)
    for dtype, layout, prologue, norm in (
        (torch.float32, "nchw", "batch", "batch"),
        (torch.float32, "channels_last", "none", "batch"),
        (torch.bfloat16, "channels_last", "batch", "batch"),
        (torch.bfloat16, "channels_last", "running", "running"),
        (torch.bfloat16, "nchw", "none", "batch"),
        (torch.float16, "channels_last", "none", "running"),
        (torch.float16, "nchw", "batch", "batch"),
    )
] + [
    Case(3, 42, 7, 5, 3, 2, 18, norm="none", prologue="relu"),
    # Triton makes constants of arguments that are 1.
    Case(1, 1, 1, 1, 1, 1, 1, norm="running", prologue="running"),
    Case(2, 1, 1, 2, 2, 1, 1, layout="channels_last", prologue="batch"),
    Case(2, 64, 16, 16, 1, 1, 32, torch.bfloat16, layout="channels_last", norm="running"),
    Case(2, 64, 16, 16, 4, 2, 32, torch.bfloat16, torch.float32, layout="channels_last"),
    Case(2, 16, 8, 8, 2, 1, 8, torch.float64, prologue="batch"),
]


class Absent:
    """Stands in for a GPU's driver, and answers what the compiler asks of it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0


def parse(text: str) -> GPUTarget:
    kind, _, arch = text.partition(":")
    if kind == "cuda":
        return GPUTarget("cuda", int(arch), 32)
    # AMD's data-centre GPUs have wavefronts of 64.
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def compile_all(target: GPUTarget, one_in: int) -> Counter[str]:
    """Compile every kernel for a target; the number of variants of each."""
    driver.set_active(Absent(target))
    compiled: dict[str, set[str]] = {}

    def compile_only(
        kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any
    ) -> None:
        done = kernel.warmup(*arguments, grid=(programs,), **options, enable_fp_fusion=False)
        compiled.setdefault(kernel.__name__, set()).add(done.hash)

    def run(name: str, arguments: dict[str, Any]) -> None:
        op = TABLE[name]
        getattr(ops, name)(*op.unpack([arguments[argument.name] for argument in op.arguments]))

    launch.run = compile_only
    for case in CASES[::one_in]:
        call = draw_any(case)
        whole = ("split_attention", "split_attention_train", "split_attention_backward")
        for name in (*whole, "pool", "pool_backward"):
            run(name, test_op.ARGUMENTS[name](call))
        if case.has_bn0:
            run("prologue_backward", test_op.ARGUMENTS["prologue_backward"](call))
        run("update_running_statistics", test_op.ARGUMENTS["update_running_statistics"](call))
    return Counter({name: len(hashes) for name, hashes in compiled.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="+", metavar="TARGET")
    parser.add_argument("--one-in", type=int, default=1, metavar="N")
    options = parser.parse_args()
    for text in options.targets:
        counts = compile_all(parse(text), options.one_in)
        variants = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        print(f"{text}: {counts.total()} kernels: {variants}", flush=True)


if __name__ == "__main__":
    main()
