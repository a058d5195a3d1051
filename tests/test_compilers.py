"""The CPU's kernels as other compilers make them, also for aarch64, in an emulator.

Without torch, of which there may be none for the processor. It needs the packages that
CONTRIBUTING.md names.
"""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from build_files import load
from cases import DIFFERENTIABLE, EPS, Call, Case, Results, check_calls, draw
from cuda_on_host import cache
from cuda_on_host.build import CSRC, TORCH_TARGET_VERSION, generated, run
from torch import Tensor
from torch.utils import cpp_extension

from resnest_fused.backends import native

pytestmark = pytest.mark.long

SOURCES = (
    Path(__file__).with_name("kernels_alone.cpp"),
    CSRC / "problem.cpp",
    *sorted((CSRC / "cpu").glob("*.cpp")),
)
DTYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}


class Compiler(NamedTuple):
    command: str
    emulator: str = ""
    capability: str = ""


HERE = platform.machine()
BEST = str(native.build_info()["cpu_capability"])
SETS = ["baseline", "avx2", "avx512"]
HAVE = SETS[: SETS.index(BEST) + 1]
COMPILERS = [Compiler("clang++", capability=c) for c in HAVE]
if HERE != "aarch64":
    emulator = "qemu-aarch64 -L /usr/aarch64-linux-gnu"
    COMPILERS.append(Compiler("aarch64-linux-gnu-g++", emulator))


@functools.cache
def build(command: str) -> Path:
    """A program of the kernels; what the cache has is not compiled again."""
    includes = [f"-I{CSRC}", f"-I{generated()}"]
    includes += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    includes.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
    flags = [*load("setup.py").CXX_FLAGS, "-Werror"]
    compiler = run([command, "-v"])

    def compile_one(source: Path) -> Path:
        # What cannot run here is compiled for its warnings.
        runs = source.stem not in SETS or source.stem in HAVE
        call = [command, *flags, *([] if runs else ["-O0"])]
        text = run([*call, *includes, "-x", "c++", "-E", str(source)])

        def make(path: Path) -> None:
            run([*call, "-x", "c++-cpp-output", "-c", "-", "-o", str(path)], text)

        return cache.get(".o", shlex.join(call).encode(), compiler, text, make=make)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    link = [command, *map(str, objects)]

    def make(path: Path) -> None:
        run([*link, "-o", str(path)])

    return cache.get("", shlex.join(link).encode(), compiler, make=make)


@pytest.fixture(params=COMPILERS, ids=lambda c: " ".join(filter(None, (c.command, c.capability))))
def program(request: pytest.FixtureRequest) -> tuple[list[str], dict[str, str]]:
    """The command that runs the kernels, and its environment."""
    compiler: Compiler = request.param
    missing = [
        name
        for name in (compiler.command, compiler.emulator.partition(" ")[0])
        if name and shutil.which(name) is None
    ]
    assert not missing, f"CONTRIBUTING.md says which packages bring {' and '.join(missing)}"
    command = [*shlex.split(compiler.emulator), str(build(compiler.command))]
    return command, {**os.environ, "RESNEST_FUSED_CPU_CAPABILITY": compiler.capability}


def _number(value: float) -> bytes:
    return (np.float64 if isinstance(value, float) else np.int64)(value).tobytes()


def _in_memory(tensor: Tensor) -> Tensor:
    """The elements in the order in which they lie in memory, which has no gaps."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _tensor(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return _number(-1)
    sizes = [tensor.dim(), *tensor.shape, tensor.dim(), *tensor.stride()]
    elements = _in_memory(tensor).view(torch.uint8).numpy().tobytes()
    return b"".join(map(_number, [DTYPES[tensor.dtype], *sizes])) + elements


def _input(call: Call, names: Sequence[str]) -> bytes:
    case, p = call.case, call.params

    def norm(name: str, batch_stats: bool) -> list[bytes]:
        statistics = ("running_mean", "running_var") if not batch_stats else ()
        found = [p.get(f"{name}_{part}") for part in ("weight", "bias", *statistics)]
        found += [None] * (4 - len(found))
        return [*map(_tensor, found), _number(float(EPS)), _number(int(batch_stats))]

    return b"".join(
        [
            _tensor(call.x),
            _number(int(case.prologue != "none")),
            _number(case.radix),
            *norm("bn0", case.prologue == "batch"),
            *(_tensor(p[f"fc{i}_weight"]) for i in (1, 2)),
            *(_tensor(p.get(f"fc{i}_bias")) for i in (1, 2)),
            _number(case.cardinality),
            *norm("bn1", case.norm == "batch"),
            _tensor(call.dout),
            *(_number(int(name in names)) for name in DIFFERENTIABLE),
        ]
    )


CASES = [
    Case(
        *sizes,
        dtype=dtype,
        layout=("nchw", "channels_last")[(i + j) % 2],
        dout_layout=("nchw", "channels_last")[(i + j) % 2],
        norm=("batch", "running", "none")[(i + j) % 3],
        prologue=("batch", "none", "running", "relu")[(i + 2 * j) % 4],
        bias=i != 1,
    )
    # (batch, channels, height, width, radix, cardinality, inter_channels)
    for i, sizes in enumerate(
        [
            (5, 34, 7, 7, 2, 2, 6),
            (17, 40, 1, 1, 1, 2, 10),
            (3, 33, 5, 7, 3, 1, 10),
        ]
    )
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_of_another_compiler(program: tuple[list[str], dict[str, str]], case: Case) -> None:
    command, environment = program

    def evaluate(call: Call, names: Iterable[str]) -> Results:
        names = list(names)
        options = {"input": _input(call, names), "env": environment, "capture_output": True}
        result = subprocess.run(command, **options)
        assert result.returncode == 0, result.stderr.decode()
        found, at = {}, 0
        # In the order of the op's results.
        for name in ("out", *(name for name in DIFFERENTIABLE if name in names)):
            like = call.dout if name == "out" else call.tensor(name)
            end = at + like.numel() * like.element_size()
            found[name] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
            elements = torch.frombuffer(bytearray(result.stdout[at:end]), dtype=like.dtype)
            _in_memory(found[name]).copy_(elements)
            at = end
        assert at == len(result.stdout)
        return found.pop("out"), found

    check_calls([draw(case) for _ in range(3)], evaluate=evaluate)
