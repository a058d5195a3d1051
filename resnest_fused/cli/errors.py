"""Reports an error as the fault of an option, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer


@contextlib.contextmanager
def blame(
    option: str, kind: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[None]:
    """Report an error of the block as the fault of ``option``, in one line, exit code 2.

    A wrong environment variable is named instead, as its errors begin with its name.

    Example::

        with blame("--weights"):
            models.load_checkpoint(model, path)
    """
    try:
        yield
    except kind as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if lines[0].startswith("RESNEST_FUSED_"):
            raise typer.BadParameter(lines[0]) from error
        raise bad(option, lines[0]) from error


def bad(option: str, message: str) -> typer.BadParameter:
    """The error that ``option`` has a wrong value; in quotes, as typer's own errors name options.

    Example::

        raise bad("--batch", "must hold all 2 images, got 1")
    """
    return typer.BadParameter(message, param_hint=f"'{option}'")
