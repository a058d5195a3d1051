"""What the compiler made of the CPU's kernels, read from the compiled module on x86-64."""

from __future__ import annotations

import functools
import platform
import re
import subprocess
from typing import NamedTuple

import pytest

from resnest_fused.backends import native

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="it reads the registers' names of x86-64"
)

SETS = ("baseline", "avx2", "avx512")
# Functions with loops over maps and weights; csrc/cpu/kernels marks them.
KERNELS = (
    *("statistics", "pool", "pool_backward", "pool_backward_prologue", "recombine"),
    *("recombine_backward", "attention_from_logits", "GemmNt", "GemmNn"),
)
# Those that ask for memory ahead, but where rows are walked as the processor foresees.
FETCHING = (
    *("statistics", "pool", "pool_backward", "pool_backward_prologue", "recombine"),
    "recombine_backward",
)
FORWARD_IN_NCHW = ("pool", "pool_backward", "pool_backward_prologue")
# Of the products' multiply-adds, the share that those loops must have.
MULTIPLIED_IN_LOOPS = {"GemmNt": 0.35, "GemmNn": 0.6}
# With an index it is an array. GCC needs a frame pointer where it aligns the stack.
STACK = re.compile(r"\(%rsp\)|-0x[0-9a-f]+\(%rbp\)")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        found = re.match(r"[0-9a-f]+", self.operands) if self.name.startswith("j") else None
        return int(found[0], 16) if found else None


@functools.cache
def functions() -> dict[str, list[Instruction]]:
    """The module's functions by their C++ names."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", native._C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instruction]] = {}
    for line in listing.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            of_function = found.setdefault(head[1], [])
        elif code := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            of_function.append(Instruction(int(code[1], 16), code[2], code[3]))
    return found


def innermost_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The loops without a loop or a call inside: what runs for each vector."""
    addresses = {i.address: index for index, i in enumerate(instructions)}
    loops = []
    for end, jump in enumerate(instructions):
        begin = addresses.get(jump.target or -1, end + 1)
        body = instructions[begin : end + 1]
        if body and not any(
            i.name.startswith("call") or (i.target and not i.address < i.target <= jump.address)
            for i in body[:-1]
        ):
            loops.append(body)
    return loops


def reads_vectors(loop: list[Instruction]) -> bool:
    """Whether whole vectors come from memory; the rest of a row comes by single elements."""
    return any(
        re.search(r"\(.*\).*%[xyz]mm", i.operands)
        and not STACK.search(i.operands)
        and not re.fullmatch(r"v?mov(d|[lh]p[sd])|.*s[sd]", i.name)
        for i in loop
    )


def multiplies(instruction: Instruction) -> bool:
    return re.match("vfn?m(add|sub)|v?mulp", instruction.name) is not None


@pytest.mark.parametrize("instruction_set", SETS)
def test_hot_loops_keep_their_vectors_in_registers(instruction_set: str) -> None:
    """Few of a loop's vectors lie on the stack: constants that the registers do not hold."""
    seen: set[str] = set()
    for name, instructions in functions().items():
        kernel = re.search(rf"cpu::{instruction_set}::(\w+?)(_nchw|_nhwc)?<", name)
        if kernel is None or kernel[1] not in KERNELS or "lambda" in name:
            continue
        multiplied = 0
        for loop in innermost_loops(instructions):
            vectors = [i for i in loop if re.search(r"%[xyz]mm", i.operands)]
            if len(vectors) >= 3 and reads_vectors(loop):
                seen.add(kernel[1])
                multiplied += sum(map(multiplies, loop))
                on_stack = [i for i in vectors if STACK.search(i.operands)]
                told = "\n".join([name, *(f"{i.address:x} {i.name} {i.operands}" for i in loop)])
                assert len(on_stack) <= max(2, len(vectors) / 6), told
        if kernel[1] in FETCHING and not (kernel[1] in FORWARD_IN_NCHW and kernel[2] == "_nchw"):
            assert any(i.name.startswith("prefetch") for i in instructions), name
        # The others are for the last vector of a row, which is not whole.
        at_least = MULTIPLIED_IN_LOOPS.get(kernel[1], 0)
        assert multiplied >= at_least * sum(map(multiplies, instructions)), name
    assert seen == set(KERNELS)


def test_an_instruction_set_is_used_in_its_namespace_alone() -> None:
    """Or the linker may choose a function that an older processor cannot run."""
    wide = re.compile(r"%[yz]mm|%k[0-7]")
    for name, instructions in functions().items():
        used = any(i.name.startswith("v") or wide.search(i.operands) for i in instructions)
        assert not used or re.search("cpu::avx(2|512)::", name), name
    for instruction_set, register in zip(SETS[1:], ("%ymm", "%zmm"), strict=True):
        of_set = [
            i for name, of in functions().items() if f"::{instruction_set}::" in name for i in of
        ]
        assert any(register in i.operands for i in of_set)
        assert instruction_set == "avx512" or not any("%zmm" in i.operands for i in of_set)
