"""Exchanges a module's class inside the class that ``torch.distributed`` wrapped around it.

``fully_shard`` and ``replicate`` give a module a new class, which derives from its own.
"""

from __future__ import annotations

from torch import nn


def _is_wrapper(cls: type) -> bool:
    first = cls.__bases__[0]
    return first.__module__.startswith("torch.distributed.") and not issubclass(first, nn.Module)


def core(cls: type) -> type:
    """The class that a module had before ``torch.distributed`` wrapped it."""
    return core(cls.__bases__[1]) if _is_wrapper(cls) else cls


# What with_core made, and what it made it from: fuse and unfuse then give back the very class.
_made: dict[tuple[type, type], type] = {}


def with_core(cls: type, wanted: type) -> type:
    """``cls`` with the class ``wanted`` inside its wrappers instead."""
    if not _is_wrapper(cls):
        return wanted
    if (cls, wanted) not in _made:
        wrapper, inner = cls.__bases__
        prefix = cls.__name__.removesuffix(inner.__name__)
        bases = (wrapper, with_core(inner, wanted))
        body = {name: value for name, value in vars(cls).items() if name != "__weakref__"}
        made = type(prefix + bases[1].__name__, bases, body)
        _made[cls, wanted], _made[made, core(cls)] = made, cls
    return _made[cls, wanted]
