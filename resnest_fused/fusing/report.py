"""The report of :func:`resnest_fused.fuse`: which modules are fused, and why others are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_NAMED = 3  # how many fused modules of one class are named; of more the first and the last


class FuseEntry(NamedTuple):
    """What :func:`resnest_fused.fuse` did with one module.

    Attributes:
        name: the module's name in the model; "" for the model itself.
        kind: the module's original class, as ``package.module.Class``.
        fused: whether the module is fused now.
        reason: why the module was left alone, or that it already was fused. None for newly fused.
            With ``fold`` also which norm could not be folded, and why.
        folded: whether the module has a norm that is folded now.
        proven: whether it was proven now that the module computes the same when it is fused.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None
    folded: bool = False
    proven: bool = False


@dataclass(frozen=True, repr=False)
class FuseReport:
    """Every split-attention module of a model and what became of it, in the model's order.

    ``len(report)`` counts the fused modules, so a report is true when there is one. ``str(report)``
    has a line for each class, ``repr(report)`` is one line::

        >>> report = rf.fuse(model)
        >>> print(report)
        16 fused, 0 left alone
        fused: 16 timm.layers.split_attn.SplitAttn (layer1.0.conv2, ..., layer4.2.conv2)
        >>> [entry.name for entry in report.left_alone]
        []

    Attributes:
        entries: one for each module.
        folded_norms: how many batch normalisations are folded now, in the whole model.
    """

    entries: tuple[FuseEntry, ...]
    folded_norms: int = 0

    @property
    def fused(self) -> tuple[FuseEntry, ...]:
        """The modules that are fused now."""
        return tuple(entry for entry in self.entries if entry.fused)

    @property
    def left_alone(self) -> tuple[FuseEntry, ...]:
        """The modules that were left as they are, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.fused)

    def __len__(self) -> int:
        return len(self.fused)

    def _summary(self) -> str:
        text = f"{len(self.fused)} fused, {len(self.left_alone)} left alone"
        if self.folded_norms:
            text += f"; {self.folded_norms} batch normalisations folded"
        return text

    def __repr__(self) -> str:
        return f"FuseReport({self._summary()})"

    def __str__(self) -> str:
        if not self.entries:
            return "no split-attention module found; see resnest_fused.register"
        # Modules in one group differ in their names alone.
        groups: dict[FuseEntry, list[str]] = {}
        for entry in (*self.fused, *self.left_alone):
            names = groups.setdefault(entry._replace(name=""), [])
            names.append(entry.name or "the model itself")
        return "\n".join([self._summary(), *(_line(*group) for group in groups.items())])


def _line(group: FuseEntry, names: list[str]) -> str:
    what = "left alone" if not group.fused else "fused and folded" if group.folded else "fused"
    if group.proven:
        what = f"proven and {what}"
    listed = names
    if group.fused and len(names) > _NAMED:
        listed = [names[0], "...", names[-1]]
    line = f"{what}: {len(names)} {group.kind} ({', '.join(listed)})"
    return line if group.reason is None else f"{line}: {group.reason}"
