"""Standard output of a command, and what becomes of it where it cannot be written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class OutputError(OSError):
    """Standard output takes no more.

    Attributes:
        reason: why; None where it is a pipe whose reader has seen enough.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(f"what it prints cannot be written ({error.strerror})")
        self.reason = None if error.errno == errno.EPIPE else str(self)


class _Output(io.TextIOWrapper):
    """Tells its own errors from those of other files."""

    def write(self, text: str) -> int:
        with _named():
            return super().write(text)

    def flush(self) -> None:
        with _named():
            super().flush()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(error) from error


def prepare() -> None:
    """Make standard output raise :class:`OutputError`, and print names of files with any bytes."""
    given: Any = sys.stdout
    if given is not None:  # it was closed before the program began
        encoding, lines = given.encoding, given.line_buffering
        sys.stdout = _Output(given.detach(), encoding, "surrogateescape", line_buffering=lines)


def finish() -> None:
    """Write what has been printed.

    Raises:
        OutputError: that is not possible.
    """
    if sys.stdout is not None:
        sys.stdout.flush()


def give_up() -> None:
    """Print nothing more. What is left to write goes nowhere, as Python writes it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
