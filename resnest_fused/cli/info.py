"""``resnest-fused info``: what is built and installed, and which backends can run."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from resnest_fused.cli import environment, screen


def run(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same facts as one JSON object.")
    ] = False,
) -> None:
    """Show what is built and installed, and which backends can run."""
    facts = _collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _collect() -> dict[str, Any]:
    import torch

    import resnest_fused
    from resnest_fused.backends import native

    reason = native.unavailable()
    built = {}
    if reason is None:
        built = {**native.build_info(), "cuda_kernels": native.cuda_status()}
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        runs = reason is None and native.gpu_unavailable(index) is None
        capability = f"{gpu.major}.{gpu.minor}"
        gpus.append({"name": gpu.name, "capability": capability, "cuda_kernels_run": runs})
    statuses = resnest_fused.backends()
    return {
        "resnest_fused": {
            "version": resnest_fused.__version__,
            "folder": str(Path(resnest_fused.__file__).parent),
        },
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "torch": {
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
        },
        "native": {"unavailable": reason, **built},
        "gpus": gpus,
        "backends": [status._asdict() for status in statuses],
        "environment": [s._asdict() for s in environment.active_settings(statuses)],
    }


def _print(facts: dict[str, Any]) -> None:
    console = screen.make_console()
    package, python, torch, native = (
        facts[name] for name in ("resnest_fused", "python", "torch", "native")
    )
    grid = screen.make_facts()
    grid.add_row("resnest_fused", f"{package['version']} in {package['folder']}")
    grid.add_row("Python", f"{python['version']} on {python['platform']}")
    cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
    grid.add_row("torch", f"{torch['version']}, {cuda}, {torch['threads']} threads")
    if native["unavailable"] is not None:
        grid.add_row("native kernels", f"cannot run: {native['unavailable']}")
    else:
        grid.add_row("native kernels", f"built against torch {native['torch_version']}")
        grid.add_row("compiler", native["compiler"])
        grid.add_row("flags", native["cxx_flags"])
        grid.add_row("instructions", f"{native['cpu_capability']}, chosen for this CPU at run time")
        grid.add_row("CUDA kernels", native["cuda_kernels"])
    for index, gpu in enumerate(facts["gpus"]):
        runs = "CUDA kernels run on it" if gpu["cuda_kernels_run"] else "no CUDA kernels for it"
        grid.add_row(f"GPU {index}", f"{gpu['name']}, {gpu['capability']}: {runs}")
    console.print(grid)
    table = screen.make_table("name", "available", "")
    for status in facts["backends"]:
        table.add_row(status["name"], "yes" if status["available"] else "no", status["reason"])
    screen.print_table(console, "Backends, in the order in which auto tries them", table)
    if facts["environment"]:
        table = screen.make_table("name", "value", "effect")
        for setting in (environment.Setting(**fields) for fields in facts["environment"]):
            table.add_row(setting.name, setting.value, str(setting))
        screen.print_table(console, "Environment variables that are set", table)
