"""Mistakes in the real kernels, and a build of each kind that can make any one of them.

As a script, ``mistakes.py LIBRARY KIND FOLDER`` makes every mistake of a kind, each in a process of
its own. That must fail, in a check of numbers or by a sanitizer. Process NUMBER writes its output
to ``FOLDER/NUMBER.txt``, with its exit status in the last line. Number 0 makes no mistake.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mistake:
    """``wrong`` instead of ``right``, in a file of ``csrc/cuda`` that ``source`` includes.

    Both are statements if ``right`` ends with a semicolon, otherwise expressions. If ``right``
    occurs several times, ``place`` is the number of the one meant. ``kind`` must find the mistake,
    and say ``finding`` if that is not what it says of others.
    """

    kind: str
    source: str
    file: str
    right: str
    wrong: str
    place: int = 0
    finding: str = ""

    def __str__(self) -> str:
        where = f"{self.kind}-{self.file}-{self.right}"
        return re.sub(r"[^\w.-]+", "_", f"{where}-{self.place}" if self.place else where)


def _no_barriers(source: str, file: str, count: int) -> Iterable[Mistake]:
    for place in range(count):
        yield Mistake("thread", source, file, "__syncthreads();", "", place)


RELAXED = "::cuda::memory_order_relaxed"

# Numbered from 1 on.
MISTAKES = [
    # Barriers and the order of memory.
    *_no_barriers("pool.cu", "device.cuh", 2),
    *_no_barriers("prologue.cu", "map.cuh", 2),
    *_no_barriers("attention.cu", "norm.cuh", 2),
    *_no_barriers("attention.cu", "product.cuh", 2),
    *_no_barriers("running.cu", "running.cuh", 2),
    *_no_barriers("pool.cu", "prologue.cuh", 1),
    *_no_barriers("attention.cu", "stages.cuh", 4),
    *(
        Mistake("thread", "on_chip.cu", "on_chip.cuh", "__syncthreads();", "", place)
        for place in (0, 2, 3)
    ),
    *(Mistake("thread", "on_chip.cu", "on_chip.cuh", "cluster.sync();", "", i) for i in range(3)),
    *(Mistake("thread", "recombine.cu", "slab.cuh", "__syncthreads();", "", i) for i in (0, 3)),
    Mistake("older", "pool.cu", "slab.cuh", "__syncthreads();", "", 2),
    Mistake("older", "pool.cu", "prologue.cuh", "__syncthreads();", "", 1),
    Mistake("thread", "pool.cu", "line.cuh", "__syncthreads();", ""),
    Mistake("thread", "attention.cu", "stages.cuh", "::cuda::memory_order_acquire", RELAXED),
    Mistake("thread", "attention.cu", "stages.cuh", "::cuda::memory_order_release", RELAXED),
    Mistake("thread", "attention.cu", "stages.cuh", "items[stage] > 0", "false"),
    Mistake("thread", "attention.cu", "norm.cuh", "threadIdx.x % kWarp < kColumns", "true"),
    # Bounds whose violation only a sanitizer is sure to notice.
    Mistake("address", "pool.cu", "device.cuh", "warp * kSums + s", "(warp + 1) * kSums + s"),
    Mistake(
        "address",
        "prologue.cu",
        "map.cuh",
        "min(tiling.chunk_pixels, sizes.pixels - first_pixel)",
        "tiling.chunk_pixels + 1",
    ),
    Mistake("address", "attention.cu", "product.cuh", "result_row < a.rows", "true"),
    Mistake("address", "attention.cu", "product.cuh", "row + i < last", "true"),
    Mistake("address", "attention.cu", "product.cuh", "w * kDepths < left", "true"),
    # Numbers.
    Mistake(
        "plain",
        "recombine.cu",
        "map.cuh",
        "singles = pixels - vectors * kVector;",
        "singles = 0;",
    ),
    Mistake(
        "plain",
        "prologue.cu",
        "map.cuh",
        "end = head + vectors * kVector;",
        "end = head + (vectors - 1) * kVector;",
    ),
    Mistake(
        "plain",
        "on_chip.cu",
        "on_chip.cuh",
        "__syncthreads();",
        "",
        place=1,
        finding="copies that were never announced",
    ),
    Mistake("plain", "on_chip.cu", "on_chip.cuh", "arrivals[index - begin].wait();", ""),
    Mistake("plain", "on_chip.cu", "on_chip.cuh", "m * args.input_stride", "0"),
    Mistake("plain", "on_chip.cu", "on_chip.cuh", "part.row(row)", "part.row(0)"),
    Mistake("plain", "on_chip.cu", "slab.cuh", "max(i, first)", "i + 1"),
    Mistake("plain", "recombine.cu", "slab.cuh", "arrival().wait();", ""),
    Mistake(
        "plain",
        "recombine.cu",
        "slab.cuh",
        "__syncthreads();",
        "",
        place=1,
        finding="copies that were never announced",
    ),
    Mistake("plain", "pool.cu", "slab.cuh", "split * in_splits", "0"),
    Mistake("plain", "recombine.cu", "line.cuh", "__pipeline_wait_prior(kStages - 1);", ""),
    Mistake("plain", "prologue.cu", "line.cuh", "(u * kMaps + m) * kApart", "0"),
    Mistake(
        "plain",
        "prologue.cu",
        "device.cuh",
        "cudaGridDependencySynchronize();",
        "",
        finding="did not wait for the launch before",
    ),
    Mistake(
        "plain",
        "prologue.cu",
        "prologue.cuh",
        "static_cast<unsigned>(row + 1) % every == 0",
        "row + 1 == rows",
    ),
    Mistake(
        "older",
        "pool.cu",
        "slab.cuh",
        "__pipeline_wait_prior(0);",
        "",
        finding="AssertionError",
    ),
    Mistake("plain", "attention.cu", "product.cuh", "k < a.depth", "k + 1 < a.depth"),
    Mistake(
        "plain", "recombine.cu", "recombine.cuh", "block < args.blocks", "block + 1 < args.blocks"
    ),
    Mistake("plain", "attention.cu", "norm.cuh", "row < rows", "row + 1 < rows", place=1),
    Mistake("plain", "attention.cu", "product.cuh", "inside * stride + depth", "depth"),
    Mistake("plain", "attention.cu", "pool_sums.cuh", "j < args.chunks", "j + 1 < args.chunks"),
    Mistake(
        "plain",
        "attention.cu",
        "stages.cuh",
        f"Counter(counters[0]).fetch_add(1, {RELAXED})",
        "blockIdx.x",
        finding="deadlock",
    ),
]


def make_all(csrc: Path) -> None:
    """Write every mistake into the sources; at run time the chosen one is made."""
    files: dict[str, list[tuple[int, Mistake]]] = {}
    for number, mistake in enumerate(MISTAKES, 1):
        files.setdefault(mistake.file, []).append((number, mistake))
    for file, mistakes in files.items():
        path = csrc / "cuda" / file
        text = path.read_text()
        edits = []
        for number, mistake in mistakes:
            at = -1
            for _ in range(mistake.place + 1):
                at = text.find(mistake.right, at + 1)
                if at < 0:
                    raise RuntimeError(f"{file} has no {mistake.right!r} number {mistake.place}")
            edits.append((at, number, mistake))
        for at, number, mistake in sorted(edits, reverse=True, key=lambda edit: edit[0]):
            chosen = f"::cuda_on_host::mistake == {number}"
            if mistake.right.endswith(";"):
                both = f"if ({chosen}) {{ {mistake.wrong} }} else {{ {mistake.right} }}"
            else:
                both = f"(({chosen}) ? ({mistake.wrong}) : ({mistake.right}))"
            text = text[:at] + both + text[at + len(mistake.right) :]
        path.write_text(text)
    # Only kernels on float32 are compiled with mistakes. The others come from the true sources.
    for path in (csrc / "cuda").iterdir():
        other = r"^ *template void .*<(double|__half|__nv_bfloat16)>.*\n"
        path.write_text(re.sub(other, "", path.read_text(), flags=re.MULTILINE))


def build_mistakes(folder: Path) -> dict[str, Path]:
    """A library of each kind; the changed sources go to ``folder``."""
    from cuda_on_host.build import CSRC
    from cuda_on_host.kernels import build_kernels

    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    make_all(csrc)
    changed: dict[str, set[str]] = {}
    for mistake in MISTAKES:
        changed.setdefault(mistake.kind, set()).add(mistake.source)
    return build_kernels(*changed, csrc=csrc, changed=changed)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import numpy as np
    import oracle
    import pytest
    import torch
    from cases import Case, check, draw, draw_any
    from cuda_on_host.kernels import Kernels

    library, kind, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    kernels = Kernels(library)
    kernels.replace_native(pytest.MonkeyPatch())

    def with_clusters() -> None:
        room = 100 * 1024
        kernels.set_device(
            cluster_blocks=2, shared_per_block_optin=room, shared_per_multiprocessor=2 * room
        )

    def compute_some() -> None:
        """Runs every kernel that a mistake is in; the numbers do not matter."""
        kernels.set_device(grid_blocks=3)
        compute_forwards()
        if kind != "older":
            with_clusters()
            compute_forwards()
        norm = (torch.zeros(300), torch.ones(300), torch.tensor(0))
        norm += (torch.zeros(300), torch.ones(300), None)
        kernels.ops.update_running_statistics(torch.empty(2, 1, 1, 1), *norm, *norm)

    def compute_forwards() -> None:
        for layout in ("nchw", "channels_last"):
            call = draw_any(Case(2, 24, 30, 30, 2, 1, 12, layout=layout, prologue="batch"))
            call.gradients()
            for prologue in ("running", "none"):
                options = {"layout": layout, "norm": "running", "prologue": prologue}
                draw_any(Case(2, 24, 30, 30, 2, 1, 12, **options)).forward()
        # Without vectors and a prologue the pool's shared memory has no room but for its sums.
        draw_any(Case(2, 3, 31, 31, 2, 1, 3, norm="running", prologue="none")).forward()

    def check_evaluation() -> None:
        options = {"norm": "running", "prologue": "running"}
        # Of the second, parts of x begin between vectors.
        sizes = ((5, 24, 11, 9, 2, 2, 10), (1, 4, 45, 45, 2, 1, 3))
        for layout, size in itertools.product(("nchw", "channels_last"), sizes):
            call = draw(Case(*size, layout=layout, **options))
            truth = call.evaluate().values["out"]
            error = np.abs(oracle.wide(call.forward()) - truth).max()
            assert error <= 2e-6 * np.abs(truth).max()

    def check_some() -> None:
        for layout in ("nchw", "channels_last"):
            for dtype in (torch.float32, torch.float16):
                check(Case(3, 42, 9, 7, 2, 2, 18, dtype, layout=layout, prologue="batch"))
        kernels.set_device(shared_per_multiprocessor=32 * 1024)  # so that channels have chunks
        check(Case(2, 4, 45, 45, 2, 1, 3, layout="nchw", prologue="batch"))

    def make(number: int) -> None:
        kernels.reset()
        kernels.make_mistake(number)
        torch.manual_seed(0)
        if kind == "plain":
            check_some()
            check_evaluation()
            with_clusters()
            check_evaluation()
        else:
            if kind == "older":
                check_some()
            compute_some()

    for number, mistake in enumerate([None, *MISTAKES]):
        if mistake is not None and mistake.kind != kind:
            continue
        path = folder / f"{number}.txt"
        # A new Python would take longer to start than all else.
        child = os.fork()
        if child == 0:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
            status = 1
            try:
                make(number)
                status = 0
            except (AssertionError, RuntimeError):
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with path.open("a") as file:
            file.write(f"\n{status}")


if __name__ == "__main__":
    main()
