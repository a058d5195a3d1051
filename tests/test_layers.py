"""The package's layers: no file imports from a layer above its own, not even in a function."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import resnest_fused as rf

ROOT = Path(rf.__file__).parent
# From the top down. A file belongs to the layer with the longest prefix of its name.
LAYERS = (
    ("__main__", "training.__main__"),
    ("cli",),
    ("__init__",),
    ("training",),
    ("models",),
    ("fusing",),
    ("fusing.verification",),
    ("fusing.swap",),
    ("fusing.proof",),
    ("fusing.recognition", "fusing.folding", "fusing.watching"),
    ("fusing.registry", "fusing.peers", "fusing.report", "fusing.wrapping"),
    ("fusing.adapters",),
    ("fusing.adapters.ours", "fusing.adapters.official", "fusing.adapters.timm"),
    ("fusing.adapters.base",),
    ("modules",),
    ("children", "layout"),
    ("functional",),
    ("autograd",),
    ("backends",),
    ("reference", "checks"),
    ("ops",),
    ("sync", "tracing", "importing", "measure"),
)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def layer(file: str) -> int:
    """The number of a file's layer, from 0 at the top."""
    fits = {
        name: number
        for number, names in enumerate(LAYERS)
        for name in names
        if f"{file}.".startswith(f"{name}.")
    }
    assert fits, f"{file}: no layer has it"
    return fits[max(fits, key=len)]


def imports(file: str) -> Iterator[str]:
    """The package's files that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        else:
            continue
        for path in paths:
            package, _, name = path.partition(".")
            if package != "resnest_fused":
                continue
            # A name that is no file is defined in its parent's file.
            while name and name not in FILES:
                name = name.rpartition(".")[0]
            yield name or "__init__"


def test_nothing_imports_upwards() -> None:
    layers = {file: layer(file) for file in FILES}
    upward = [
        f"{file} imports {other}"
        for file in FILES
        for other in imports(file)
        if layers[other] < layers[file]
    ]
    assert not upward


def test_swap_and_adapters_know_each_other_by_the_registry_alone() -> None:
    assert not any(other.startswith("fusing.adapters") for other in imports("fusing.swap"))


def test_no_function_has_the_name_of_a_module() -> None:
    """Except rf.backends(), because users do not import the package of that name."""
    functions = {name for name in rf.__all__ if inspect.isfunction(getattr(rf, name))}
    assert functions & {file.rpartition(".")[2] for file in FILES} == {"backends"}
