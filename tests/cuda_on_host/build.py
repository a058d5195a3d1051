"""Compiles CUDA sources for the CPU with g++, plain and with sanitizers, and runs Python on them.

A build is a shared library for Python to load. One with a sanitizer needs a Python that starts with
the sanitizer's library, :func:`run_python`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PROCESSORS = len(os.sched_getaffinity(0))
COMPILER = shlex.split(os.environ.get("CXX", "g++"))

# As setup.py has it; no contraction, so that every build of a kernel gives the same numbers.
FLAGS = [
    *("-std=c++20", "-fPIC", "-g1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Several builds of the same templates are loaded into one process.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
TORCH_TARGET_VERSION = "0x020a000000000000"


@dataclass(frozen=True)
class Kind:
    """How a build is compiled, and what Python has to be told before it loads one."""

    flags: tuple[str, ...]
    # Of the runtime, which must stay invisible for the sanitizers.
    runtime_flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


KINDS = {
    "plain": Kind(("-O1",), ("-O2",)),
    "thread": Kind(
        ("-O1", "-fsanitize=thread"),
        ("-O2", "-DCUDA_ON_HOST_THREAD"),
        ("libtsan.so",),
        (("TSAN_OPTIONS", "halt_on_error=1:exitcode=66"),),
    ),
    "address": Kind(
        ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("-O2", "-DCUDA_ON_HOST_ADDRESS"),
        ("libasan.so", "libubsan.so"),
        # Python itself leaves memory behind.
        (("ASAN_OPTIONS", "detect_leaks=0"), ("UBSAN_OPTIONS", "print_stacktrace=1")),
    ),
}


def build(
    name: str,
    sources: Sequence[Path],
    folder: Path,
    *,
    kinds: Iterable[str] = KINDS,
    includes: Sequence[Path] = (),
    torch: bool = False,
    extra_flags: Sequence[str] = (),
) -> dict[str, Path]:
    """The library of these sources and of the runtime, by kind; with ``torch`` they may use it.

    Compiles as many files at a time as there are processors. What is in ``folder`` already is taken
    if it is newer than every source and every header.
    """
    kinds = list(kinds)
    flags = [*FLAGS, f"-I{HERE / 'include'}", *(f"-I{path}" for path in includes)]
    link_flags: list[str] = []
    if torch:
        from torch.utils import cpp_extension

        flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
        flags.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
        link_flags = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    runtime = HERE / "runtime.cpp"
    inputs = [
        *sources,
        *HERE.glob("*"),
        *(path for root in (HERE / "include", *includes) for path in root.rglob("*")),
    ]
    newest = max(path.stat().st_mtime for path in inputs if path.is_file())
    folder.mkdir(parents=True, exist_ok=True)

    def is_new(path: Path) -> bool:
        return path.exists() and path.stat().st_mtime > newest

    def compile_one(kind: str, source: Path) -> Path:
        result = folder / f"{name}-{kind}-{source.parent.name}-{source.name}.o"
        if not is_new(result):
            is_runtime = source == runtime
            extra = KINDS[kind].runtime_flags if is_runtime else KINDS[kind].flags
            arguments = [*flags, *extra, *extra_flags, "-x", "c++", "-c", str(source)]
            run([*COMPILER, *arguments, "-o", str(result)])
        return result

    def link(kind: str, objects: Sequence[Path]) -> Path:
        result = folder / f"{name}-{kind}.so"
        if not is_new(result):
            files = map(str, objects)
            extra = KINDS[kind].flags
            run([*COMPILER, "-shared", *extra, *files, *link_flags, "-o", str(result)])
        return result

    with ThreadPoolExecutor(PROCESSORS) as pool:
        try:
            # The kinds that take longest are the last ones: first they, to end together.
            futures = {
                kind: [pool.submit(compile_one, kind, source) for source in (*sources, runtime)]
                for kind in reversed(kinds)
            }
            objects = {kind: [future.result() for future in futures[kind]] for kind in kinds}
            return dict(zip(kinds, pool.map(link, kinds, objects.values()), strict=True))
        except RuntimeError:
            pool.shutdown(cancel_futures=True)
            raise


def run(command: Sequence[str]) -> None:
    """Run a compiler; what it says is in the error."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")


def run_python(
    kind: str, *arguments: str, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, ready to load a build of this kind.

    With a sanitizer a report ends the process with an error.
    """
    chosen = KINDS[kind]
    # torch's OpenMP threads synchronise in ways that ThreadSanitizer does not see.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **dict(chosen.environment), **environment}
    command = [sys.executable, *arguments]
    if chosen.libraries:
        variables["LD_PRELOAD"] = " ".join(_library(name) for name in chosen.libraries)
        # The sanitizers want the addresses of their shadow memory for themselves.
        if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0:
            command = ["setarch", "-R", *command]
    # Not in the checkout, whose package, in front of the installed one, has no compiled module.
    options = {"cwd": HERE, "env": variables, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=timeout, **options)


def _library(name: str) -> str:
    """The path of one of the compiler's own libraries."""
    command = [*COMPILER, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if path == name:
        raise RuntimeError(f"{shlex.join(COMPILER)} has no {name}: a sanitizer build needs g++'s")
    return path
