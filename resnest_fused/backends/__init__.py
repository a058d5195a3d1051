"""The ordered list of backends, the choice of one for a call, and the report on each."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from resnest_fused.backends import native, reference
from resnest_fused.backends.triton import backend as triton

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Backend(Protocol):
    """The functions of every backend."""

    def unavailable(self) -> str | None:
        """Why no call can run here, or None."""

    def can_run(self, x: Tensor) -> str | None:
        """Why a call with this input cannot run, or None.

        Raises:
            ValueError: an environment variable for it has a wrong value. "auto" must not ignore
                that silently.
        """

    def describe(self) -> str:
        """One line about the kernels, if the backend is available."""


class FusedBackend(Backend, Protocol):
    """A backend with kernels of its own: a function for each op, with its flat arguments."""

    def __getattr__(self, op: str) -> Callable[..., Any]: ...


class BackendStatus(NamedTuple):
    """One backend, as :func:`backends` reports it.

    ::

        native = rf.backends()[0]
        print(native.name, native.available, native.reason)

    Attributes:
        name: "native", "triton" or "reference".
        available: whether it can run calls here.
        reason: a description if it is available, else the reason why it is not.
    """

    name: str
    available: bool
    reason: str


# In the order in which "auto" tries them.
_BACKENDS: dict[str, Backend] = {
    "native": cast(Backend, native),
    "triton": cast(Backend, triton),
    "reference": cast(Backend, reference),
}
NAMES = ("auto", *_BACKENDS)


def check_name(name: str, source: str) -> str:
    """``name``, if it is a backend's or "auto"; the error names its ``source``."""
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


# Checked when a call needs it, so that a wrong value does not prevent the import.
_default = os.environ.get("RESNEST_FUSED_BACKEND") or "auto"


class use_backend:
    """Choose the backend of every call whose own backend is "auto", from now on.

    A ``with`` statement limits the choice to its block, a decorator to calls of its function::

        rf.use_backend("triton")
        with rf.use_backend("reference"):
            expected = model(images)

    This holds for the whole process, as the environment variable ``RESNEST_FUSED_BACKEND`` does.

    Args:
        name: "native", "triton", "reference", or "auto" for the first that can run a call.

    Raises:
        ValueError: there is no such backend.
    """

    def __init__(self, name: str) -> None:
        self._name = check_name(name, "backend")
        self._previous = _default
        self.__enter__()

    def __enter__(self) -> None:
        global _default
        _default = self._name

    def __exit__(self, *_: object) -> None:
        global _default
        _default = self._previous

    def __call__(self, function: _Function) -> _Function:
        self.__exit__()

        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            with use_backend(self._name):
                return function(*args, **options)

        return cast(_Function, wrapped)


def backends() -> list[BackendStatus]:
    """The status of every backend, in the order in which "auto" tries them.

    ::

        for status in rf.backends():
            print(status.name, status.available, status.reason)
    """
    found = []
    for name, backend in _BACKENDS.items():
        reason = backend.unavailable()
        found.append(BackendStatus(name, reason is None, reason or backend.describe()))
    return found


def choose(name: str, x: Tensor) -> str:
    """The backend that runs this call: the named one, or the first that can.

    Raises:
        ValueError: there is no such backend, or an environment variable has a wrong value.
        RuntimeError: the named backend cannot run the call. The message gives the reason.
    """
    source = "backend"
    if name == "auto":
        name, source = _default, "RESNEST_FUSED_BACKEND"
    if name != "auto":
        reason = _obstacle(check_name(name, source), x)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
        return name
    for name in _BACKENDS:
        if name == "triton" and triton.interpreted():
            continue  # far slower than PyTorch, for tests that ask for it
        if _obstacle(name, x) is None:
            return name
    raise AssertionError("the reference backend runs every call")


def _obstacle(name: str, x: Tensor) -> str | None:
    """Why the backend of this name cannot run a call with this input, or None."""
    if name != "reference" and _exports_to_onnx():
        return (
            "an ONNX graph has standard ops only; export with "
            'resnest_fused.use_backend("reference"), or without a backend\'s name'
        )
    return _BACKENDS[name].can_run(x)


def _exports_to_onnx() -> bool:
    # Last, because it imports the exporter.
    return (
        torch.compiler.is_exporting() or torch.jit.is_tracing()
    ) and torch.onnx.is_in_onnx_export()


def kernels(name: str) -> FusedBackend:
    """The kernels of the backend of this name."""
    return cast(FusedBackend, _BACKENDS[name])
