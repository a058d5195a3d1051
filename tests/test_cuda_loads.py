"""How matrix products on CUDA wait for memory, read from the code that nvcc makes of them.

``sass.py`` says what a wait is. The loops over the depth are those whose own instructions are the
multiply-adds (FFMA) of a thread's 4 x 4 sums: their number tells the depth of a turn. Eight warps
share 32 of a product's depth, four for each. What is bounded are the waits in a warp while its
block goes on by 32: one where a turn has all its loads before the first use, eight where it loads
and uses row by row.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import pytest
import sass
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


def depth(loop: sass.Loop) -> float:
    """Of the product, in one turn of a thread."""
    return sum(i.name.startswith("FFMA") for i in loop.body) / SUMS


@functools.cache
def compiled(arch: str) -> dict[str, sass.Kernel]:
    """The products' kernels with float32 sums."""
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
        command = [sass.find_tool("nvcc"), *flags, str(path), "-o", str(binary)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return sass.read(binary, arch)


@pytest.mark.parametrize("kernel", LOOPS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_product_loads_before_it_uses(arch: str, kernel: str) -> None:
    every = compiled(arch)[f"{kernel}_kernel<float>"].loops
    # Not the loop over a tile's results, whose multiply-adds are bn1's, of square roots.
    deep = [loop for loop in every if depth(loop) >= WARP_DEPTH and depth(loop).is_integer()]
    loops = sass.innermost(deep)
    waits = [len(loop.waits) * WARP_DEPTH / depth(loop) for loop in loops]
    assert max(waits) <= MOST_WAITS, waits
    assert min(waits) > 0, waits
    assert len(loops) == LOOPS[kernel]
    loads = {i.name.removesuffix(".SYS") for loop in loops for i in loop.loads}
    assert loads == LOADS
