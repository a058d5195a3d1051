"""Calls of an op that are like an earlier one launch what that one launched, and do nothing else.

Python's part of a call (checks, block sizes, and above all Triton's own way to a launch) takes
longer than the kernels do on small batches. All of it depends only on what `_key` reads: shapes,
strides, dtypes, devices, alignments and numbers. So the first call of a kind is recorded: which
tensors it makes, and which compiled kernels it launches over them and its arguments. Later ones
make such tensors and launch the same. A call that does anything else, such as copying a map to
other strides, has no recording and takes the long way each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnest_fused.backends.triton.compat import INTERPRETED, autotunes

# Recordings kept; more kinds of calls than these come from maps of ever changing sizes.
_MOST = 1024
_MAKE = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}
_DETACH = torch.ops.aten.detach.default
_PROMOTE = torch.ops.aten.promote_types.default  # of dtypes; touches no tensor


class _Launch(NamedTuple):
    run: Callable[..., Any]
    arguments: list[Any]  # None where a tensor comes
    tensors: list[tuple[int, int]]  # places in the arguments, and among the call's tensors


class _Recording(NamedTuple):
    """A call's tensors are its arguments, then those that it makes."""

    made: list[tuple[Any, ...]]  # shape, strides, dtype and device of each
    launches: list[_Launch]
    results: list[int]  # places among the call's tensors
    struct: Callable[[list[Tensor]], Any] | None  # of the results; None for a single one

    def play(self, arguments: Sequence[Any]) -> Any:
        tensors = list(arguments)
        for shape, strides, dtype, device in self.made:
            tensors.append(torch.empty_strided(shape, strides, dtype=dtype, device=device))
        for run, template, places in self.launches:
            given = template.copy()
            for place, tensor in places:
                given[place] = tensors[tensor]
            run(*given)
        if self.struct is None:
            return tensors[self.results[0]] if self.results else None
        return self.struct([tensors[place] for place in self.results])


class _Recorder(TorchDispatchMode):
    """Watches a call; ``fits`` says whether it did nothing but make tensors and launch."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.arguments = arguments
        self.alive: list[Tensor] = []  # whose ids must not be used again
        self.place = {id(a): i for i, a in enumerate(arguments) if isinstance(a, Tensor)}
        # One tensor given twice would be two in another call.
        self.fits = len(self.place) == sum(isinstance(a, Tensor) for a in arguments)
        self.settled = True  # whether another call like this one does the same
        self.made: list[tuple[Any, ...]] = []
        self.launches: list[_Launch] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _MAKE:
            self.place[id(result)] = len(self.arguments) + len(self.made)
            self.made.append((result.shape, result.stride(), result.dtype, result.device))
            self.alive.append(result)
        elif function is _DETACH and id(args[0]) in self.place:
            # torch.empty does this with what it made, under a mode such as this one.
            self.place[id(result)] = self.place[id(args[0])]
            self.alive.append(result)
        elif function is not _PROMOTE:
            self.fits = False
        return result

    def launched(self, run: Callable[..., Any], arguments: Sequence[Any]) -> None:
        tensors = [(i, id(a)) for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        self.fits = self.fits and all(tensor in self.place for _, tensor in tensors)
        if self.fits:
            places = [(i, self.place[tensor]) for i, tensor in tensors]
            others = [None if isinstance(a, Tensor) else a for a in arguments]
            self.launches.append(_Launch(run, others, places))

    def finish(self, result: Any) -> _Recording | None:
        several = isinstance(result, tuple)
        results = [*result] if several else [] if result is None else [result]
        if not self.fits or not all(id(tensor) in self.place for tensor in results):
            return None
        places = [self.place[id(tensor)] for tensor in results]
        struct = getattr(type(result), "_make", None) if several else None
        return _Recording(self.made, self.launches, places, struct)


_recordings: dict[Any, _Recording | None] = {}
_active = threading.local()


def call(name: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """The op of this name: ``function`` of its flat arguments."""
    if INTERPRETED:
        return function(*arguments)
    key = _key(name, arguments)
    recording = _recordings.get(key, ...)
    if recording is None:
        return function(*arguments)
    if recording is not ...:
        return recording.play(arguments)
    if len(_recordings) >= _MOST:
        _recordings.clear()
    with _Recorder(arguments) as recorder:
        _active.recorder = recorder
        try:
            result = function(*arguments)
        finally:
            _active.recorder = None
    if recorder.settled:
        _recordings[key] = recorder.finish(result)
    return result


def recording() -> bool:
    """Whether launches are to be told."""
    return getattr(_active, "recorder", None) is not None


def launched(run: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Say that ``run(*arguments)`` launches again what was launched now."""
    _active.recorder.launched(run, arguments)


def not_settled() -> None:
    """Say that the next call like this one may launch something else."""
    if recording():
        _active.recorder.settled = False


def _key(name: str, arguments: Sequence[Any]) -> Any:
    """All that what a call launches depends on."""
    key: list[Any] = [name, autotunes()]
    for a in arguments:
        if isinstance(a, Tensor):
            key += a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % 16
        else:
            key.append(tuple(a) if isinstance(a, list) else a)
    return tuple(key)
