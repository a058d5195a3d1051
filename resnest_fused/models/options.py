"""Checks of a network's options: a wrong value is one ValueError that names the option."""

# No annotations as strings here, as in resnest.py.

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

OutIndices = Sequence[int] | Mapping[int, str]


def is_integer(value: object) -> bool:
    """Whether this is an integer; neither a float such as 1.0 nor True is one.

    Example::

        is_integer(1.0)  # False
    """
    return isinstance(value, int) and not isinstance(value, bool)


def check_integers(*, least: int, **given: Any) -> None:
    """Each value must be an integer from ``least`` on.

    Example::

        check_integers(num_classes=num_classes, least=0)
    """
    for name, value in given.items():
        if not is_integer(value) or value < least:
            raise ValueError(f"{name}: expected an integer from {least} on, got {value!r}")


def check_four_integers(*, least: int, **given: Any) -> None:
    """Each value must be four integers from ``least`` on, one for each stage."""
    for name, value in given.items():
        four = isinstance(value, Sequence) and len(value) == 4
        if not four or not all(is_integer(n) and n >= least for n in value):
            raise ValueError(f"{name}: expected four integers from {least} on, got {value!r}")


def check_rates(**given: Any) -> None:
    """Each value must be a number from 0 to below 1."""
    for name, rate in given.items():
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"{name}: expected a number from 0 to below 1, got {rate!r}")


def check_choice(known: Iterable[Any], **given: Any) -> None:
    """Each value must be one of ``known``, and of its type.

    Example::

        check_choice((8, 16, 32), output_stride=output_stride)
    """
    known = tuple(known)
    for name, value in given.items():
        if not any(type(value) is type(each) and value == each for each in known):
            raise ValueError(
                f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}"
            )


def check_makers(**given: Any) -> None:
    """Each value must be callable."""
    for name, make in given.items():
        if not callable(make):
            raise ValueError(f"{name}: expected a class or a function that makes it, got {make!r}")


def check_head(num_classes: int, global_pool: str, pools: Iterable[str]) -> None:
    """The pooling must be one of ``pools``, or for a network without a classifier empty."""
    check_choice((*pools, ""), global_pool=global_pool)
    if num_classes and not global_pool:
        raise ValueError(f"global_pool: '' takes num_classes=0, got {num_classes}")


def check_widths(widths: Iterable[int], radix: int, cardinality: int) -> None:
    """Splits and groups must divide the channels of every stage's attention."""
    for width in widths:
        if width % (max(radix, 1) * cardinality):
            raise ValueError(
                f"radix: expected radix times cardinality to divide a stage's {width} channels, "
                f"got {radix} times {cardinality}"
            )


def check_out_indices(out_indices: Any, numbers: range = range(5)) -> dict[int, str]:
    """The names of the maps by index, in the order asked for; names are empty for a list.

    Example::

        check_out_indices((1, 4))  # {1: "", 4: ""}
        check_out_indices({4: "out"})  # {4: "out"}
    """
    named = isinstance(out_indices, Mapping)
    names: dict[int, str] = {}
    if isinstance(out_indices, Mapping):
        names = dict(out_indices)
    elif isinstance(out_indices, Sequence):
        names = dict.fromkeys(out_indices, "")
    distinct = len(set(names.values())) == len(names) and all(names.values())
    if (
        not names
        or len(names) != len(out_indices)
        or not all(is_integer(index) and index in numbers for index in names)
        or (named and not distinct)
    ):
        raise ValueError(
            f"out_indices: expected different numbers from {numbers[0]} to {numbers[-1]}, or "
            f"different names by them, got {out_indices!r}"
        )
    return names


def check_known(given: Iterable[str], known: Collection[str]) -> None:
    """Each name must be that of an option."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{name}: no such option" + (f"; did you mean {close[0]}?" if close else "")
            )
