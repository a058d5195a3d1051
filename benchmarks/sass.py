"""What nvcc made of CUDA kernels: registers, shared memory, loops, loads, and the waits for them.

A thread that uses what it loaded waits until it has come, hundreds of cycles. Loads issued before
that come in the meantime. So what counts is not the loads but the waits: an instruction that reads
a register which a load writes, and for which no earlier one waited. It ends the wait for all loads
before it. A loop is read twice in a row, and the second reading counted, as a register may be
loaded in one turn and read in the next. All instructions of a loop count, also those behind a
branch. So a loop that chooses how to load has the waits of every choice.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Loads from global memory, and from shared memory. Those that go from one to the other, LDGSTS,
# write no register.
GLOBAL, SHARED = "LDG.", "LDS"


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def width(self) -> int:
        """Bytes that a load writes."""
        bits = re.search(r"\.[US]?(8|16|64|128)\b", self.name)
        return int(bits[1]) // 8 if bits else 4

    def loaded(self, kind: str) -> frozenset[int]:
        """The registers that it writes if it is a load of the kind."""
        if not self.name.startswith(kind):
            return frozenset()
        first = min(registers(self.operands.partition("[")[0]), default=None)
        return (
            frozenset() if first is None else frozenset(range(first, first + -(-self.width // 4)))
        )

    @property
    def read(self) -> frozenset[int]:
        """The registers of its operands, but for the first one where that is the result."""
        without = re.match(r"ST|ATOM|RED|BRA|WARPSYNC", self.name)
        return registers(self.operands if without else self.operands.partition(",")[2])

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


@functools.cache
def registers(operands: str) -> frozenset[int]:
    """The numbers of the registers, of which `.64` means two."""
    found = re.findall(r"\bR(\d+)(?:\.reuse)?(\.64)?", operands)
    return frozenset(int(number) + more for number, pair in found for more in range(1 + bool(pair)))


def waits_of(
    body: Iterable[Instruction], kind: str, pending: dict[int, int] | None = None
) -> list[int]:
    """Bytes in flight in a thread at each wait for loads of the kind.

    ``pending`` has what is loaded on entry, by register, and then on exit.
    """
    pending = {} if pending is None else pending
    waits = []
    for instruction in body:
        if instruction.read & pending.keys():
            waits.append(sum(pending.values()))
            pending.clear()
        loaded = instruction.loaded(kind)
        pending.update(dict.fromkeys(loaded, instruction.width // len(loaded) if loaded else 0))
    return waits


class Loop(NamedTuple):
    body: Sequence[Instruction]

    @property
    def span(self) -> tuple[int, int]:
        return self.body[0].address, self.body[-1].address

    def has(self, other: Loop) -> bool:
        """Whether the other one is in it."""
        (first, last), (others_first, others_last) = self.span, other.span
        return first <= others_first and others_last <= last

    @property
    def loads(self) -> list[Instruction]:
        """Of a turn, from global memory."""
        return [i for i in self.body if i.loaded(GLOBAL)]

    @property
    def shared_loads(self) -> list[Instruction]:
        """Of a turn, from shared memory."""
        return [i for i in self.body if i.loaded(SHARED)]

    @property
    def waits(self) -> list[int]:
        """Bytes in flight in a thread at each wait of a turn, when the loop is under way."""
        pending: dict[int, int] = {}
        waits_of(self.body, GLOBAL, pending)
        return waits_of(self.body, GLOBAL, pending)


@dataclass(frozen=True, eq=False)
class Kernel:
    name: str  # as in C++, without namespaces
    registers: int
    shared_bytes: int  # beside what a launch asks for
    body: Sequence[Instruction]

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """All of them, also those around others."""
        index = {instruction.address: i for i, instruction in enumerate(self.body)}
        return [
            Loop(self.body[index[i.target] : index[i.address] + 1])
            for i in self.body
            if i.target is not None and i.target < i.address
        ]

    @functools.cached_property
    def loading(self) -> list[Loop]:
        """The innermost loops that load from global memory."""
        return innermost([loop for loop in self.loops if loop.loads])

    @functools.cached_property
    def outside(self) -> list[Instruction]:
        """The instructions in no innermost loop that loads."""
        inside = {i.address for loop in self.loading for i in loop.body}
        return [i for i in self.body if i.address not in inside]


def innermost(loops: Sequence[Loop]) -> list[Loop]:
    """Those that have no other one in them."""
    return [
        a for a in loops if not any(a is not b and a.has(b) and a.span != b.span for b in loops)
    ]


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit; Triton has some of them too."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    triton = importlib.util.find_spec("triton")
    packages = (triton and triton.submodule_search_locations) or []
    places = [str(toolkit), *(str(Path(place, "backends/nvidia/bin")) for place in packages)]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise FileNotFoundError(f"{name} is neither on the PATH nor in {places}")
    return found


def read(binary: Path, arch: str, only: str = "") -> dict[str, Kernel]:
    """The kernels of an object file or library that are compiled for ``arch``, as in ``sm_90``.

    ``only`` is a regular expression that the name of a kernel as in C++ must match. It is a
    ``ValueError`` if there are none.
    """
    tool = find_tool("cuobjdump")

    def dump(*options: str) -> str:
        command = [tool, *options, "-arch", arch, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"Function (\w+):\s+(REG:.*)", dump("-res-usage")))
    listed = subprocess.run(
        ["c++filt"], input="\n".join(usage), capture_output=True, text=True, check=True
    )
    plain = [re.sub(r"^void |\(.*$|\w+::", "", name) for name in listed.stdout.splitlines()]
    names = {
        mangled: name for mangled, name in zip(usage, plain, strict=True) if re.match(only, name)
    }
    if not names:
        raise ValueError(f"{binary}: no kernels {only or 'at all'} for {arch}")
    found = {}
    for section in re.split(r"^\s*Function : ", dump("-sass"), flags=re.MULTILINE)[1:]:
        mangled = section.partition("\n")[0].strip()
        if mangled in names:
            numbers = dict(re.findall(r"(REG|SHARED):(\d+)", usage[mangled]))
            kernel = Kernel(
                names[mangled], int(numbers["REG"]), int(numbers["SHARED"]), instructions(section)
            )
            found[kernel.name] = kernel
    return found


def instructions(listing: str) -> list[Instruction]:
    """Of a kernel as cuobjdump prints it."""
    code = r"^\s*/\*(\w{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
    return [
        Instruction(int(address, 16), name, operands)
        for address, name, operands in re.findall(code, listing, re.MULTILINE)
    ]
