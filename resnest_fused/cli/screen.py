"""What commands print: facts by name, tables with a title, and a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def make_console() -> Console:
    """Standard output, on which text is printed as it is."""
    # Captured output has no width of its own: rich then takes 80 columns.
    return Console(markup=False, highlight=False, emoji=False)


def make_facts() -> Table:
    """A table of names and what they are."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def make_table(*columns: str) -> Table:
    """A table with these headers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def print_table(
    console: Console, title: str, table: Table, note: str = "", whole: bool = False
) -> None:
    """Print a table below its title, and a note below the table.

    Args:
        whole: whether rows stay whole on a screen that is too narrow, which then wraps them.
            Otherwise cells are broken to fit.
    """
    console.print()
    # Not the table's own title and caption, which wrap at its width. A path stays whole.
    console.print(title, style="bold", soft_wrap=True)
    if whole:
        wide = console.options.update(width=1000)
        table.width = console.measure(table, options=wide).maximum
    console.print(table, soft_wrap=whole)
    if note:
        console.print(note, style="dim")


def mark(passed: bool) -> str:
    """The word for a check's outcome."""
    return "ok" if passed else "DIFFERS"


@contextlib.contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A bar on stderr while the block runs, where that is a terminal; yields what advances it."""
    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
