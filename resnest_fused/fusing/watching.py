"""Notices forwards that decide by a map's size or by its values what they compute.

A proof tries a few maps. A forward that takes another way for the 65th row, or for a batch of 11,
would pass it. So a map is sent through whose class knows what it is asked: sizes are integers that
notice comparisons with other numbers, and numbers that are read from the map are noticed as well.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Whose Python code may ask: torch's own modules check their input, einops the shapes that it takes,
# and DropBlock's size is that of a map at most. That one is called as it is.
_LIBRARIES = ("torch", "einops", "resnest_fused")
_DROP_BLOCK = "timm.layers.drop"
_SHAPE: Any = Tensor.shape
_ASKS_FOR_SIZES = (_SHAPE.__get__, Tensor.size, Tensor.numel, Tensor.nelement, torch.numel)
_ASKS_FOR_VALUES = (
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item),
    *(Tensor.tolist, Tensor.is_nonzero, torch.is_nonzero),
    *(Tensor.equal, torch.equal, Tensor.allclose, torch.allclose),
)

# What was asked since the last watch began, in order.
_asked: dict[str, None] = {}


def _is_by_library() -> bool:
    """Whether the code that asks, two frames above, is none of the module's."""
    asking = sys._getframe(2).f_globals.get("__name__", "")
    return asking.partition(".")[0] in _LIBRARIES or asking == _DROP_BLOCK


class _Size(int):
    """A size of a map, or what was computed of sizes."""

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        if not _is_by_library():
            _asked["whether a size of its input is zero"] = None
        return int(self) != 0


def _noting(name: str, words: str) -> Callable[[Any, Any], Any]:
    of_integers = getattr(int, name)

    def compare(self: _Size, other: Any) -> Any:
        # Whether a map is square is tried, and what an empty one gives is nobody's concern.
        is_number = isinstance(other, int | float) and not isinstance(other, _Size) and other
        if is_number and not _is_by_library():
            _asked[f"whether a size of its input is {words} {other}"] = None
        return of_integers(self, other)

    return compare


def _computing(name: str) -> Callable[[Any, Any], Any]:
    of_integers = getattr(int, name)

    def compute(self: _Size, other: Any) -> Any:
        found = of_integers(self, other)
        return _Size(found) if isinstance(found, int) else found

    return compute


for _name, _words in {
    "__lt__": "less than",
    "__le__": "at most",
    "__gt__": "more than",
    "__ge__": "at least",
    "__eq__": "equal to",
    "__ne__": "equal to",
    "__mod__": "a multiple of",
}.items():
    setattr(_Size, _name, _noting(_name, _words))
for _name in ("add", "sub", "mul", "floordiv"):
    setattr(_Size, f"__{_name}__", _computing(f"__{_name}__"))
    setattr(_Size, f"__r{_name}__", _computing(f"__r{_name}__"))


class _Watched(Tensor):
    """A map, and all that is computed of it. Its dimensions are those of the map."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func in _ASKS_FOR_VALUES:
            _asked["for values of its input"] = None
        if func not in _ASKS_FOR_SIZES:
            return found
        if isinstance(found, torch.Size):
            # The batch and the pixels: features are the module's own.
            last = 2 + (len(found) > 4)
            return torch.Size(
                _Size(size) if i == 0 or i >= last else size for i, size in enumerate(found)
            )
        axis = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
        is_of_features = axis is not None and axis % args[0].dim() == 1
        return found if is_of_features else _Size(found)


_len = len


def _length(of: Any) -> int:
    return _Size(_len(of)) if isinstance(of, _Watched) else _len(of)


def questions(module: nn.Module, x: Tensor) -> list[str]:
    """What the module's forward asks about x, by which it may decide what it computes.

    Example::

        questions(module, torch.randn(3, 8, 5, 4))
        # ["whether a size of its input is at least 64"]
    """
    _asked.clear()
    builtins.len = _length  # which would make a plain integer of what a tensor answers
    try:
        module(x.as_subclass(_Watched))
    finally:
        builtins.len = _len
    return list(_asked)
