"""Signals that ask a run to stop: noted by what trains, kept from the processes that load data."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether a signal asked this process to stop: SIGTERM, SIGUSR1 or SIGINT.

    While the block runs these signals only set :attr:`made`. A second SIGINT interrupts.

    Example::

        with StopRequest() as stop:
            while not stop.made:
                step()
    """

    def __init__(self) -> None:
        self.made = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)


def ignore() -> None:
    """From now on do nothing at such a signal, as when the exit code is known already."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let these signals to this thread wait until the block ends; in processes it starts, for ever.

    They inherit that from their first moment on, before they could set handlers. Other threads,
    which PyTorch may have, note a signal meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
