"""Are results as near to the truth as those of plain loops? Judged by ranks, without a constant.

A sum's rounding error depends on the order of its terms. Take two evaluations that make the same
roundings in different orders. Each has the larger mean error in half of all draws, whatever the
distribution of errors, the dtype and the CPU. So the number of draws in which one is worse is
binomial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import oracle
from cases import Call, Results

# The chance that a result is judged worse, although its evaluation is as good as a loop.
FALSE_ALARM = 1e-6


def most_by_chance(draws: int) -> int:
    """How often an evaluation may be the worse of two equals, except with chance FALSE_ALARM."""
    chance, count = 0.0, draws
    while (chance := chance + math.comb(draws, count) / 2**draws) <= FALSE_ALARM:
        count -= 1
    return count


def mean_errors(call: Call, results: Results) -> dict[str, float]:
    """The mean error over the elements of out and of each gradient."""
    out, grads = results
    return {
        name: float(np.abs(oracle.wide(value) - call.truth.values[name]).mean())
        for name, value in {"out": out, **grads}.items()
    }


def times_worst(calls: Iterable[Call], evaluate: Callable[[Call], Results]) -> dict[str, int]:
    """In how many calls each result's mean error exceeds that of a loop, in both orders.

    For an evaluation as good as a loop the chance is at most one half in each call.
    """
    counts: dict[str, int] = {}
    for call in calls:
        ours = mean_errors(call, evaluate(call))
        loops = [mean_errors(call, call.loop()), mean_errors(call, call.in_reverse(Call.loop))]
        for name, error in ours.items():
            counts[name] = counts.get(name, 0) + (error > max(loop[name] for loop in loops))
    return counts
