"""Finds the compiled module ``_C`` that belongs to the package, without loading it.

In an installed package it lies beside the Python files. In a checkout the package finds the
installed one, if that was built from the same sources. The module contains their hash. The table of
ops counts as a source, because C++ is generated from it. This file imports only the standard
library, because ``setup.py`` runs it for the hash.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

NAME = "resnest_fused._C"

_SUFFIXES = (".h", ".cpp", ".cuh", ".cu")
_TABLE = "resnest_fused/ops.py"


def hash_sources(checkout: Path) -> str:
    """The SHA-256 of the compiled module's sources and of their names."""
    digest = hashlib.sha256()
    sources = [path for path in checkout.glob("csrc/**/*") if path.suffix in _SUFFIXES]
    for path in (*sorted(sources), checkout / "csrc/generate_ops.py", checkout / _TABLE):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(checkout).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def find(package: Path) -> ModuleSpec | None:
    """The compiled module for the package in this folder; None if it was installed without one.

    Raises:
        ImportError: the package lies beside its sources, and no compiled module on the path was
            built from them.
    """
    csrc = package.parent / "csrc"
    if not (csrc / "ops.cpp").is_file():
        return _compiled_in(package)
    sources = hash_sources(package.parent)
    others = []
    for folder in (package, *(Path(entry, package.name) for entry in sys.path)):
        spec = _compiled_in(folder)
        if spec is not None and spec.origin is not None:
            if sources.encode() in Path(spec.origin).read_bytes():
                return spec
            others.append(spec.origin)
    why = f"{others[0]} was built from others" if others else "none is installed"
    raise ImportError(
        f"Python imported the folder {package}, and no compiled module fits its sources in {csrc} "
        f"({why}); run `pip install {shlex.quote(str(package.parent))}`, or take the package as it "
        "is installed: start Python in another folder, or as `python -P`"
    )


def _compiled_in(folder: Path) -> ModuleSpec | None:
    """The compiled module that this Python would load from a folder."""
    return PathFinder.find_spec(NAME, [str(folder)])
