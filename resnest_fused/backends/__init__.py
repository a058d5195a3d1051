"""Who can run a call: the ordered list of backends, the choice among them, and its report."""

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
    """What each module of this package offers."""

    def unavailable(self) -> str | None:
        """Why no call at all can run here, or None."""

    def can_run(self, x: Tensor) -> str | None:
        """Why a call with this input cannot run, or None.

        Raises:
            ValueError: an environment variable that is read for it has a wrong value, which "auto"
                must not pass by in silence.
        """

    def describe(self) -> str:
        """One line on what runs, when available."""


class FusedBackend(Backend, Protocol):
    """A backend with kernels of its own: a function for each op, with its flat arguments."""

    def __getattr__(self, op: str) -> Callable[..., Any]: ...


class BackendStatus(NamedTuple):
    """One backend: its name, whether it is available, and what it is or why it is not."""

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
    """``name`` if it is a backend's or "auto"; ``source`` says in the error where it came from."""
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


# Checked when a call needs it, so that a wrong one does not keep the package from being imported.
_default = os.environ.get("RESNEST_FUSED_BACKEND") or "auto"


class use_backend:
    """Let every call whose own backend is "auto" run on another one, from now on.

    In a ``with`` statement until its end, and as a decorator during calls of the function::

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
    """Every backend in the order in which "auto" tries them, with the reason for its status."""
    found = []
    for name, backend in _BACKENDS.items():
        reason = backend.unavailable()
        found.append(BackendStatus(name, reason is None, reason or backend.describe()))
    return found


def choose(name: str, x: Tensor) -> str:
    """The backend that runs this call: the named one, or the first that can.

    Raises:
        ValueError: when there is no such backend, or a wrong value in the environment.
        RuntimeError: when the named backend cannot run the call, with its reason.
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
    # Asked second, as it imports the exporter.
    return (
        torch.compiler.is_exporting() or torch.jit.is_tracing()
    ) and torch.onnx.is_in_onnx_export()


def kernels(name: str) -> FusedBackend:
    """The kernels of the backend of this name."""
    return cast(FusedBackend, _BACKENDS[name])
