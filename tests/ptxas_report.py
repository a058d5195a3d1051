"""Judges CUDA kernels by ptxas's report: none may spill or exceed the registers planned for.

The report is in the log of a build with NVCC_APPEND_FLAGS=-Xptxas=-v. The second argument names the
architectures that must be there:

    python ptxas_report.py LOG "8.0;9.0+PTX"
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from resnest_fused import _C


class Kernel(NamedTuple):
    """One kernel on one architecture."""

    name: str
    arch: str
    registers: int
    stack: int  # bytes of the stack frames of the kernel and of what it calls
    spilled: int  # bytes of stores and loads

    def fault(self, most_registers: int) -> str | None:
        """Why this kernel is slower than planned, or None."""
        if "<double" in self.name:
            return None  # float64 is for checks, its speed is not planned
        if self.stack or self.spilled:
            return f"{self.stack} bytes of stack, {self.spilled} bytes spilled"
        if self.registers > most_registers:
            return f"{self.registers} registers, {most_registers} are planned for"
        return None


def read(log: str) -> list[Kernel]:
    """Every kernel in the log of a build with -Xptxas=-v."""
    kernels = []
    for report in log.split("Compiling entry function ")[1:]:
        name, number = re.findall(r"'(\S+)' for 'sm_(\d+)'", report)[0]
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill.*?, (\d+) bytes", report)
        stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
        registers = int(re.findall(r"Used (\d+) registers", report)[0])
        arch = f"{number[:-1]}.{number[-1]}"
        kernels.append(Kernel(name, arch, registers, stack, stores + loads))
    names = [kernel.name for kernel in kernels]
    found = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True)
    plain = [re.sub(r"^void |\(.*$|\w+::", "", name) for name in found.stdout.splitlines()]
    return [kernel._replace(name=name) for kernel, name in zip(kernels, plain, strict=True)]


def table(kernels: list[Kernel], archs: list[str]) -> str:
    """The most registers of each template, by architecture."""
    lines = [f"{'registers':30}{'kernels':>8}" + "".join(f"{arch:>6}" for arch in archs)]
    templates: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        templates.setdefault(kernel.name.partition("<")[0], []).append(kernel)
    for name, instances in sorted(templates.items()):
        most = [max(k.registers for k in instances if k.arch == arch) for arch in archs]
        count = len(instances) // len(archs)
        lines.append(f"{name:30}{count:8}" + "".join(f"{registers:6}" for registers in most))
    return "\n".join(lines)


def main(log: str, wanted: str) -> int:
    """Print the report; 0 if every kernel is there for every architecture and none has a fault."""
    kernels = read(Path(log).read_text())
    archs = re.findall(r"\d+\.\d", wanted)
    names = {arch: sorted(k.name for k in kernels if k.arch == arch) for arch in archs}
    if not kernels or any(names[arch] != names[archs[0]] for arch in archs):
        counts = ", ".join(f"{len(names[arch])} for {arch}" for arch in archs)
        print(f"expected the same kernels for every architecture, found {counts}")
        return 1
    print(table(kernels, archs))
    most = _C.plan_limits()["registers"]
    faults = [f"{k.name} for {k.arch}: {k.fault(most)}" for k in kernels if k.fault(most)]
    verdict = f"except float64's, none spills or takes more than {most} registers"
    print("\n".join(faults or [verdict]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
