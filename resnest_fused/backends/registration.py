"""Lets an op that PyTorch keeps for the whole process run the code that was imported last."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def latest(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``function`` as its module has it by then.

    A module can be run again (``importlib.reload``, autoreload in a notebook) or be imported anew
    after its removal from ``sys.modules``. What PyTorch once registered stays: an op cannot be
    defined twice, and graphs and modules hold it.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        module = sys.modules.get(function.__module__)
        return getattr(module, function.__name__, function)(*args, **kwargs)

    return call
