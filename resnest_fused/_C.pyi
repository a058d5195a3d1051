"""The compiled module: importing it registers the ops."""

from typing import Any

def build_info() -> dict[str, str]: ...

# The planner of CUDA launches, see csrc/cuda/planner.h; it needs no GPU.
def plan(
    device: dict[str, int], workload: dict[str, Any], strategy: str = "fastest"
) -> dict[str, Any]: ...
def plan_limits() -> dict[str, Any]: ...
