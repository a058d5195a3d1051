"""What ends a run that is not the fault of an option or a file."""

from __future__ import annotations


class BadPicture(ValueError):
    """A picture cannot be decoded, and the run was asked to end then; the message names it."""


class NotFinite(ArithmeticError):
    """The loss became NaN or infinite; the message names the step."""
