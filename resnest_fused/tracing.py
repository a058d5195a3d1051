"""Lets every ``torch.fx`` tracer record a module as one node that calls it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` stands for a tensor while ``torch.fx`` traces."""
    return isinstance(x, Proxy)


def as_one_node(module: nn.Module, x: Any) -> Any:
    """A node that calls ``module`` with ``x``; its forward is not traced.

    Raises:
        TraceError: ``module`` is the root of the trace.
    """
    path = x.tracer.path_of_module(module)
    if not path:
        raise TraceError(
            f"{type(module).__name__} is a single node of a graph, which calls it: trace a module "
            "that contains it"
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})
