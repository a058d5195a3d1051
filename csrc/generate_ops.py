"""Writes the C++ side of the ops' table: ``python csrc/generate_ops.py HEADER``.

The header has the structs of arguments and of results, the schemas, and functions with
the flat arguments that PyTorch's dispatcher passes. It is made at every build.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).parents[1] / "resnest_fused" / "ops.py"
_TYPES = {
    "Tensor": "Tensor",
    "Tensor?": "std::optional<Tensor>",
    "bool": "bool",
    "int": "int64_t",
    "float": "double",
    "float?": "std::optional<double>",
    "bool[]": "std::vector<bool>",
}

_HEADER = """\
// Written by csrc/generate_ops.py from resnest_fused/ops.py, which describes the ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace resnest_fused {{

using torch::stable::Tensor;

{structs}

// The ops as the dispatcher calls them. Calls has a function for each, which takes the structs.
template <typename Calls>
struct FlatCalls {{
{functions}
}};

// Define the ops on m, the handle that STABLE_TORCH_LIBRARY gives.
template <typename Library>
void define_ops(Library& m) {{
{schemas}
}}

// Register the ops on m, the handle that STABLE_TORCH_LIBRARY_IMPL gives.
template <typename Calls, typename Library>
void implement_ops(Library& m) {{
{registrations}
}}

}}  // namespace resnest_fused
"""


def _struct(name: str, fields: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"  {kind} {field};\n" for field, kind in fields)
    return f"struct {name} {{\n{lines}}};"


def _structs(table: dict[str, Any]) -> Iterable[str]:
    """Every struct once."""
    done = set()
    for op in table.values():
        for struct, arguments in ((p.struct, p.arguments) for p in op.parameters):
            if struct is not None and struct not in done:
                done.add(struct)
                kinds = (_TYPES[argument.kind] for argument in arguments)
                yield _struct(struct.__name__, zip(struct._fields, kinds, strict=True))
        if op.struct_of_results is not None and op.struct_of_results not in done:
            done.add(op.struct_of_results)
            yield _struct(op.struct_of_results.__name__, ((name, "Tensor") for name in op.results))


def _function(op: Any) -> str:
    flat = ", ".join(f"{_TYPES[a.kind]} {a.name}" for a in op.arguments)
    values = []
    for parameter in op.parameters:
        moved = ", ".join(
            f"std::move({a.name})" if a.is_tensor else a.name for a in parameter.arguments
        )
        struct = parameter.struct
        values.append(moved if struct is None else f"{struct.__name__}{{{moved}}}")
    call = f"Calls::{op.name}({', '.join(values)})"
    if op.returns_nothing:
        return f"  static void {op.name}({flat}) {{\n    {call};\n  }}"
    if op.struct_of_results is None:
        return f"  static Tensor {op.name}({flat}) {{\n    return {call};\n  }}"
    tensors = ", ".join(["Tensor"] * len(op.results))
    results = ", ".join(f"std::move(results.{name})" for name in op.results)
    return (
        f"  static std::tuple<{tensors}> {op.name}({flat}) {{\n"
        f"    auto results = {call};\n    return {{{results}}};\n  }}"
    )


def header() -> str:
    """The text of the header."""
    table = runpy.run_path(str(_TABLE))["TABLE"]
    return _HEADER.format(
        structs="\n\n".join(_structs(table)),
        functions="\n\n".join(map(_function, table.values())),
        schemas="\n".join(f'  m.def("{op.schema}");' for op in table.values()),
        registrations="\n".join(
            f'  m.impl("{name}", TORCH_BOX(&FlatCalls<Calls>::{name}));' for name in table
        ),
    )


def write(path: Path) -> None:
    """Write the header to a file."""
    path.write_text(header())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
