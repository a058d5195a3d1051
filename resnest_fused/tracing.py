"""Modules that ``torch.fx`` traces as one node which calls them, whatever the tracer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` stands for a tensor while ``torch.fx`` traces."""
    return isinstance(x, Proxy)


def as_one_node(module: nn.Module, x: Any) -> Any:
    """The node that calls ``module`` with ``x``, in place of what its forward does.

    Raises:
        TraceError: when ``module`` is itself what is traced.
    """
    path = x.tracer.path_of_module(module)
    if not path:
        raise TraceError(
            f"{type(module).__name__} is a single node of a graph, which calls it: trace a module "
            "that contains it"
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})
