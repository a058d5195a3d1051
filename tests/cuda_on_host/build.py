"""Compiles CUDA sources for the CPU with g++, plain and with sanitizers, and runs Python on them.

A build is a shared library for Python to load. One with a sanitizer needs a Python that starts with
the sanitizer's library, :func:`run_python`.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from build_files import load
from cuda_on_host import cache

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PROCESSORS = len(os.sched_getaffinity(0))
COMPILER = shlex.split(os.environ.get("CXX", "g++"))

# Like setup.py's. No contraction, so that every build of a kernel gives the same numbers.
FLAGS = [
    *("-std=c++20", "-fPIC", "-g1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Several builds of the same templates are loaded into one process.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
TORCH_TARGET_VERSION = "0x020a000000000000"


@dataclass(frozen=True)
class Kind:
    """How a build is compiled, and what Python needs before it loads one."""

    flags: tuple[str, ...]
    # For the runtime, which must stay invisible to the sanitizers.
    runtime_flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


KINDS = {
    "plain": Kind(("-O0",), ("-O2",)),
    "thread": Kind(
        ("-O1", "-fsanitize=thread"),
        ("-O2", "-DCUDA_ON_HOST_THREAD"),
        ("libtsan.so",),
        (("TSAN_OPTIONS", "halt_on_error=1:exitcode=66"),),
    ),
    # The code for GPUs before sm_90.
    "older": Kind(
        ("-O1", "-fsanitize=thread", "-DRF_OLDER_GPU"),
        ("-O2", "-DCUDA_ON_HOST_THREAD"),
        ("libtsan.so",),
        (("TSAN_OPTIONS", "halt_on_error=1:exitcode=66"),),
    ),
    "address": Kind(
        ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("-O2", "-DCUDA_ON_HOST_ADDRESS"),
        ("libasan.so", "libubsan.so"),
        # Python itself leaks memory.
        (("ASAN_OPTIONS", "detect_leaks=0"), ("UBSAN_OPTIONS", "print_stacktrace=1")),
    ),
}


class Source(NamedTuple):
    """A file to compile, with flags of its own."""

    path: Path
    flags: Sequence[str] = ()


RUNTIME = Source(HERE / "runtime.cpp")


def generated() -> Path:
    """The folder with the header that is written from the ops' table; named by the text's hash."""
    generator = load("csrc/generate_ops.py")
    text = generator.header().encode()
    folder = cache.folder() / f"generated-{hashlib.sha256(text).hexdigest()[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=folder)
    os.write(handle, text)
    os.close(handle)
    os.replace(unfinished, folder / "ops_generated.h")
    return folder


def build(sources: Mapping[str, Sequence[Source]], *, torch: bool = False) -> dict[str, Path]:
    """Build a library of each kind from its sources and the runtime; ``torch`` lets them use torch.

    Compiles the files that the cache does not have, as many at a time as there are processors.
    """
    flags = [*FLAGS, f"-I{HERE / 'include'}"]
    link_flags: list[str] = []
    if torch:
        from torch.utils import cpp_extension

        flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
        flags.append(f"-I{generated()}")
        flags.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
        link_flags = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    compiler = run([*COMPILER, "-v"])

    def compile_one(source: Source, kind_flags: Sequence[str]) -> Path:
        command = [*COMPILER, *flags, *kind_flags, *source.flags]
        # The source with all that it includes is compiled, and its hash is the key.
        text = run([*command, "-x", "c++", "-E", str(source.path)])

        def make(path: Path) -> None:
            run([*command, "-x", "c++-cpp-output", "-c", "-", "-o", str(path)], text)

        return cache.get(".o", shlex.join(command).encode(), compiler, text, make=make)

    def link(kind: str, objects: Sequence[Path]) -> Path:
        command = [*COMPILER, "-shared", *KINDS[kind].flags, *map(str, objects), *link_flags]

        def make(path: Path) -> None:
            run([*command, "-o", str(path)])

        # The objects' names have the hashes of their contents.
        return cache.get(".so", shlex.join(command).encode(), compiler, make=make)

    with ThreadPoolExecutor(PROCESSORS) as pool:
        try:
            # The last kinds take longest, so they start first, and all end together.
            futures = {
                kind: [
                    *(pool.submit(compile_one, source, KINDS[kind].flags) for source in of_kind),
                    pool.submit(compile_one, RUNTIME, KINDS[kind].runtime_flags),
                ]
                for kind, of_kind in reversed(sources.items())
            }
            objects = {kind: [future.result() for future in futures[kind]] for kind in sources}
            libraries = dict(zip(objects, pool.map(link, objects, objects.values()), strict=True))
        except RuntimeError:
            pool.shutdown(cancel_futures=True)
            raise
    cache.prune()
    return libraries


def run(command: Sequence[str], text: bytes | None = None) -> bytes:
    """What a compiler writes; ``text`` is its input. The error has its complaints."""
    result = subprocess.run(command, input=text, capture_output=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr.decode()}")
    return result.stdout


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
        # The addresses of the sanitizers' shadow memory must be free.
        if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0:
            command = ["setarch", "-R", *command]
    # Not in the checkout, whose package would hide the installed one.
    options = {"cwd": HERE, "env": variables, "capture_output": True, "text": True}
    return subprocess.run(command, timeout=timeout, **options)


def _library(name: str) -> str:
    """The path of one of the compiler's own libraries."""
    command = [*COMPILER, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if path == name:
        raise RuntimeError(f"{shlex.join(COMPILER)} has no {name}: a sanitizer build needs g++'s")
    return path
