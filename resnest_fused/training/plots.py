"""Pictures of numbers: the curves of runs, and a matrix of confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

_NAMED = 40  # the most classes whose names stand beside a matrix
_LETTERS = 24  # of a name
_DPI = 110


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Loss, accuracy and learning rate of runs, as PNG and SVG.

    Args:
        runs: the rows of each run's metrics.jsonl, by the name to show.
        path: without a suffix.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for number, (name, rows) in enumerate(runs.items()):
        colour = f"C{number}"
        train = [row for row in rows if row["kind"] == "train"]
        epochs = [row for row in rows if row["kind"] == "epoch"]
        if len(train) > 1:
            _line(loss, train, "loss", colour, f"{name}, training", alpha=0.35, linewidth=0.8)
        _line(loss, epochs, "val_loss", colour, f"{name}, evaluation", marker=".")
        _line(accuracy, epochs, "top1", colour, f"{name}, top-1", marker=".")
        _line(rate, train or epochs, "lr", colour, name)
    for axes, title in ((loss, "loss"), (accuracy, "accuracy, %"), (rate, "learning rate")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    loss.set_ylim(bottom=0)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=_DPI)


def _line(axes: Any, rows: Sequence[Any], name: str, colour: str, label: str, **style: Any) -> None:
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row[name] for row in rows], color=colour, label=label, **style)


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Which classes are taken for which: shares of each true class, by row.

    Args:
        confusion: ``(C, C)`` counts, true classes by row.
        classes: their names.
        path: where to, as PNG or SVG by its suffix.
    """
    shares = 100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    # Room for a name, or a dot, for each class; not more than a picture of 3300 dots has.
    count = len(confusion)
    side = max(5.0, 0.2 * count) if count <= _NAMED else min(max(8.0, 1.25 * count / _DPI), 30.0)
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    # Colours by the root of the share, as mistakes are rare.
    scale = PowerNorm(0.5, vmin=0, vmax=100)
    shown = axes.imshow(shares.numpy(), cmap="viridis", norm=scale, interpolation="nearest")
    figure.colorbar(shown, label="% of the true class", fraction=0.04, pad=0.03)
    axes.set_xlabel("likeliest class")
    axes.set_ylabel("true class")
    if count <= _NAMED:
        names = [n if len(n) <= _LETTERS else f"{n[: _LETTERS - 1]}\u2026" for n in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
        axes.set_yticks(range(len(names)), names, fontsize="small")
    figure.savefig(path, dpi=_DPI, bbox_inches="tight")  # with names, however far they reach
