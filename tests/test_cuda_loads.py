"""How matrix products on CUDA wait for memory, read from the code that nvcc makes of them.

A thread that uses what it loaded waits until it has come, hundreds of cycles. Loads issued before
that come in the meantime. So what counts is not the loads but the waits: an instruction that reads
a register which a load from global memory (LDG) writes, and for which no earlier one waited. It
ends the wait for all loads before it. A loop is read twice in a row, and the second reading
counted, as a register may be loaded in one turn and read in the next. All instructions of a loop
count, also those behind a branch. So a loop that chooses how to load has the waits of every choice.

The loops over the depth are those whose own instructions are the multiply-adds (FFMA) of a thread's
4 x 4 sums: their number tells the depth of a turn. Eight warps share 32 of a product's depth, four
for each. What is bounded are the waits in a warp while its block goes on by 32: one where a turn
has all its loads before the first use, eight where it loads and uses row by row.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from build_files import ROOT, load

pytestmark = [pytest.mark.cpu, pytest.mark.long, pytest.mark.timeout(1200)]

ARCHS = ("sm_80", "sm_90")
MOST_WAITS = 2  # in 32 of the depth
SUMS = 16  # of a thread
WARP_DEPTH = 4  # of 32
# Loops of each kernel: its two products with weights in three dtypes, and that of two weights'
# gradients; each of them in vectors and in single elements.
LOOPS = {"attention": 12, "attention_backward": 14}
# Of float32 and of 16 bits, four elements or one.
LOADS = {"LDG.E.128", "LDG.E", "LDG.E.64", "LDG.E.U16"}


class Instruction(NamedTuple):
    name: str
    operands: str

    @property
    def loaded(self) -> set[int]:
        """The registers that a load from global memory writes."""
        if not self.name.startswith("LDG"):
            return set()
        width = re.search(r"\.(64|128)\b", self.name)
        first = min(registers(self.operands.partition("[")[0]))
        return set(range(first, first + (int(width[1]) // 32 if width else 1)))

    @property
    def read(self) -> set[int]:
        """The registers of its operands, but for the first one where that is the result."""
        without = re.match(r"ST|ATOM|RED|BRA|WARPSYNC", self.name)
        return registers(self.operands if without else self.operands.partition(",")[2])


class Loop(NamedTuple):
    first: int
    last: int
    body: list[Instruction]

    @property
    def depth(self) -> float:
        """Of the product, in one turn of a thread."""
        return sum(i.name.startswith("FFMA") for i in self.body) / SUMS

    @property
    def loads(self) -> set[str]:
        return {i.name.removesuffix(".SYS") for i in self.body if i.loaded}

    @property
    def waits(self) -> int:
        """Of its second turn."""
        pending: set[int] = set()
        for _ in range(2):
            count = 0
            for instruction in self.body:
                if instruction.read & pending:
                    count += 1
                    pending.clear()
                pending |= instruction.loaded
        return count


def registers(operands: str) -> set[int]:
    """The numbers of the registers, of which `.64` means two."""
    found = re.findall(r"\bR(\d+)(?:\.reuse)?(\.64)?", operands)
    return {int(number) + more for number, pair in found for more in range(2 if pair else 1)}


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit; Triton has some of them too."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    triton = importlib.util.find_spec("triton")
    packages = (triton and triton.submodule_search_locations) or []
    places = [str(toolkit), *(str(Path(place, "backends/nvidia/bin")) for place in packages)]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
    assert found, f"{name} is neither on the PATH nor in {places}"
    return found


def loops_of(listing: str) -> Iterator[Loop]:
    """The innermost loops with multiply-adds of a kernel that nvdisasm has printed."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*\w{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            instructions.append(Instruction(code[1], code[2]))
            target = re.search(r"\((\.L_\w+)\)", code[2]) if code[1].startswith("BRA") else None
            if target and target[1] in labels:
                first = labels[target[1]]
                loop = Loop(first, len(instructions), instructions[first:])
                # Not that over a tile's results, whose multiply-adds are bn1's, of square roots.
                if loop.depth >= WARP_DEPTH and loop.depth.is_integer():
                    loops.append(loop)
    for loop in loops:
        inside = [other for other in loops if loop.first <= other.first and other.last <= loop.last]
        if inside == [loop]:
            yield loop


@functools.cache
def disassembled(arch: str) -> dict[str, str]:
    """The products' kernels with float32 sums, and what nvdisasm prints of them."""
    args = {name: name.title().replace("_", "") + "Args" for name in LOOPS}
    source = [
        '#include "cuda/attention.cuh"',
        "namespace resnest_fused::cuda {",
        *(f"template __global__ void {n}_kernel<float>({a}<float>);" for n, a in args.items()),
        "}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path, binary = Path(folder, "products.cu"), Path(folder, "products.cubin")
        path.write_text("\n".join(source))
        flags = [*load("setup.py").NVCC_FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-cubin"]
        command = [find_tool("nvcc"), *flags, str(path), "-o", str(binary)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        command = [find_tool("nvdisasm"), "-c", str(binary)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # A kernel's section begins with its name: _ZN13resnest_fused4cuda16attention_kernelIfEE...
    sections = re.split(r"^\.text\.\w*?\d+([a-z_]+)_kernelIfE\w*:$", listing, flags=re.MULTILINE)
    return dict(zip(sections[1::2], sections[2::2], strict=True))


@pytest.mark.parametrize("kernel", LOOPS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_product_loads_before_it_uses(arch: str, kernel: str) -> None:
    loops = list(loops_of(disassembled(arch)[kernel]))
    waits = [loop.waits * WARP_DEPTH / loop.depth for loop in loops]
    assert max(waits) <= MOST_WAITS, waits
    assert min(waits) > 0, waits
    assert len(loops) == LOOPS[kernel]
    assert set.union(*(loop.loads for loop in loops)) == LOADS
