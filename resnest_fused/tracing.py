"""Lets every ``torch.fx`` tracer record a module as one node that calls it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.modules.module import _has_any_global_hook


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
    if module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook():
        # The tracer follows them around this forward: the node must not run them once more.
        called = x.tracer.create_proxy("get_attr", path, (), {})
        return x.tracer.create_proxy("call_function", call_forward, (called, x), {})
    return x.tracer.create_proxy("call_module", path, (x,), {})


def call_forward(module: nn.Module, x: Any) -> Any:
    """``module``'s result without its hooks."""
    return module.forward(x)
