"""The environment variables that are set now, and what each of them does or why it is wrong."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from resnest_fused import BackendStatus

_INSTALLING = "read by pip install; without effect now"
_EFFECTS = {
    "RESNEST_FUSED_BACKEND": "calls whose backend is auto run on {value}",
    "RESNEST_FUSED_CPU_CAPABILITY": "the CPU kernels use {value} instructions",
    "RESNEST_FUSED_CUDA_TUNING": "launches of CUDA kernels are planned with the values in {value}",
    "RESNEST_FUSED_AUTOTUNE": "timing of Triton's block sizes at first calls: 1 is on, 0 off",
    "RESNEST_FUSED_CUDA": _INSTALLING,
    "RESNEST_FUSED_SKIP_NATIVE": _INSTALLING,
    "TRITON_INTERPRET": "Triton's slow interpreter, on CPU tensors: 1 is on, 0 off",
}


class Setting(NamedTuple):
    """One environment variable that is set.

    Attributes:
        name, value: the variable's.
        effect: what it does; of a wrong one what is wrong.
        wrong: whether it is.
    """

    name: str
    value: str
    effect: str
    wrong: bool

    def __str__(self) -> str:
        return f"{'WRONG: ' if self.wrong else ''}{self.effect}"


def active_settings(statuses: list[BackendStatus]) -> list[Setting]:
    """Every variable of this package that is set; an empty value counts as unset.

    Example::

        for setting in active_settings(resnest_fused.backends()):
            print(setting.name, setting.value, setting)

    Args:
        statuses: the backends' statuses, whose reasons name a wrong variable first.
    """
    names = [name for name in sorted(os.environ) if name.startswith("RESNEST_FUSED_")]
    names += [name for name in _EFFECTS if name not in names]
    settings = []
    for name in names:
        value = os.environ.get(name)
        if value:
            problem = _problem(name, value, statuses)
            effect = problem or _EFFECTS[name].format(value=value)
            settings.append(Setting(name, value, effect, problem is not None))
    return settings


def _problem(name: str, value: str, statuses: list[BackendStatus]) -> str | None:
    """What is wrong with a variable, or None."""
    if name not in _EFFECTS:
        close = difflib.get_close_matches(name, _EFFECTS, n=1)
        return "no such variable" + (f"; did you mean {close[0]}?" if close else "")
    for status in statuses:
        if status.reason.startswith(f"{name}: "):
            return status.reason.removeprefix(f"{name}: ")
    if name != "RESNEST_FUSED_BACKEND":
        return None
    allowed = ("auto", *(status.name for status in statuses))
    if value not in allowed:
        return f"expected one of {', '.join(allowed)}, got {value!r}"
    for status in statuses:
        if status.name == value and not status.available:
            return f"{value} cannot run: {status.reason}"
    return None
