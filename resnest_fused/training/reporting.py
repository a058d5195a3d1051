"""What a run tells while it goes: a progress line, a table, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from resnest_fused.training.files import replacing

METRICS = "metrics.jsonl"
BAD_FILES = "bad_files.txt"
# The table with a line for each epoch: name in a row of metrics.jsonl, header, format, width.
# Together they fit 80 columns.
COLUMNS = (
    ("epoch", "epoch", "{:d}", 5),
    ("step", "step", "{:d}", 7),
    ("train_loss", "loss", "{:.4f}", 6),
    ("val_loss", "val loss", "{:.4f}", 8),
    ("top1", "top-1 %", "{:.2f}", 7),
    ("top5", "top-5 %", "{:.2f}", 7),
    ("lr", "LR", "{:.5f}", 7),
    ("images_per_s", "images/s", "{:.0f}", 8),
    ("data_wait", "wait", "{:.0%}", 4),
    ("bad_pictures", "bad", "{:d}", 4),
    ("seconds", "seconds", "{:.1f}", 7),
)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; the last one is left out if it was not written whole."""
    path = folder / METRICS
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Reporter:
    """Tells of a run, in the first of its processes.

    Args:
        folder: the run's.
        start: steps that are done; what files have of later ones is removed.
        total: steps of the whole run.
        silent: tell nothing, as all processes but the first.
    """

    def __init__(self, folder: Path, start: int, total: int, silent: bool) -> None:
        self.folder = folder
        self.total = total
        self.silent = silent
        self.rows: list[dict[str, Any]] = []
        if silent:
            return
        self.rows = [row for row in read_metrics(folder) if row["step"] <= start]
        with replacing(folder / METRICS) as file:
            file.write("".join(json.dumps(row) + "\n" for row in self.rows).encode())
        # From the last checkpoint's step on, of which a row may have been told too early.
        self._board = SummaryWriter(folder / "tensorboard", purge_step=start)
        for row in self.rows:
            if row["step"] == start:
                self._chart(row)
        console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(30),
            TextColumn("{task.completed}/{task.total}"),  # steps
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, completed=start, numbers="")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Show the progress line while the block runs, and complete the files after it."""
        if self.silent:
            yield
            return
        try:
            with self._progress:
                if any(row["kind"] == "epoch" for row in self.rows):
                    self.say(_table_line(None))
                yield
        finally:
            self._board.close()

    def say(self, text: str) -> None:
        """Print a line, above the progress line if there is one."""
        if not self.silent:
            if self._progress.disable:
                print(text, file=sys.stderr, flush=True)
            else:
                self._progress.console.print(text, markup=False, highlight=False)

    def advance(self, step: int) -> None:
        """Show that so many steps are done."""
        if not self.silent:
            self._progress.update(self._task, completed=step)

    def begin_evaluation(self) -> None:
        """Show why no steps are taken for a while."""
        if not self.silent:
            self._progress.update(self._task, numbers="evaluating")

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row of numbers, whose kind is "train" or "epoch"."""
        if self.silent:
            return
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        first = not any(known["kind"] == "epoch" for known in self.rows)
        self.rows.append(row)
        self._chart(row)
        if row["kind"] == "epoch":
            if first:
                self.say(_table_line(None))
            self.say(_table_line(row))
        else:
            numbers = (
                f"loss {row['loss']:.4f} LR {row['lr']:.5f} {row['images_per_s']:.0f} images/s "
                f"data wait {row['data_wait']:.0%}"
            )
            self._progress.update(self._task, numbers=numbers)

    def _chart(self, row: dict[str, Any]) -> None:
        """Add a row's numbers to TensorBoard's."""
        for name, value in row.items():
            if name not in ("kind", "step", "epoch"):
                self._board.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def note_bad_files(self, complaints: list[str]) -> None:
        """Keep the names of pictures that could not be decoded."""
        if not self.silent and complaints:
            text = "".join(f"{complaint}\n" for complaint in complaints)
            (self.folder / BAD_FILES).write_text(text, encoding="utf-8")

    def top1_of(self, epoch: int) -> float | None:
        """The top1 that was told of an epoch, in percent; None if none was."""
        rows = (row for row in self.rows if row["kind"] == "epoch")
        return next((row["top1"] for row in rows if row["epoch"] == epoch), None)


def _table_line(row: dict[str, Any] | None) -> str:
    """A line of the table by epoch; its header for None."""
    return " ".join(
        (header if row is None else form.format(row[name])).rjust(width)
        for name, header, form, width in COLUMNS
    )
