"""Times calls in turns, so that whatever disturbs the machine disturbs all of them alike.

Clock rates and memory bandwidth drift by more than the differences of interest. A ratio of two
numbers that were taken a minute apart measures that drift. Here every round times everything once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

# A speed-up is one figure where its 20-80 % range is no wider than this part of it.
_FIGURE = 0.2
# A difference counts where chance alone would show it less often than this, for which it takes the
# sign test six rounds.
_CHANCE = 0.05
FEWEST_ROUNDS = 6


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        run: does it.
        calls: how many calls a run makes.
        how: "clock" for calls on a CPU, which the wall clock times. "calls" and "graph" for calls
            and replayed graphs on a GPU, which device events time: calls return before kernels end.
    """

    run: Callable[[], object]
    calls: int = 1
    how: Literal["clock", "calls", "graph"] = "clock"


class Timing(NamedTuple):
    """Seconds of one call: the median, and the 20th and 80th percentile.

    Example::

        >>> Timing.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
        Timing(median=3.5, low=2.0, high=5.0)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The percentiles of measured seconds, of which there is at least one."""
        return cls(*_percentiles(samples))


class Speedup(NamedTuple):
    """How many times as fast one work is as another, by the rounds in which both were timed.

    Example::

        >>> speedup = Speedup.of([2.0, 2.2, 2.1, 2.0, 2.1, 2.0], [1.0, 1.1, 1.0, 1.0, 1.1, 1.0])
        >>> f"{speedup.median:.1f}", speedup.is_noise, speedup.is_figure
        ('2.0', False, True)

    Attributes:
        median, low, high: the median of the rounds' ratios, and their 20th and 80th percentile.
        faster, slower: in how many rounds the work took less time than the other, and more.
    """

    median: float
    low: float
    high: float
    faster: int
    slower: int

    @classmethod
    def of(cls, base: Sequence[float], samples: Sequence[float]) -> Speedup:
        """The speed-up over ``base``; both have an entry for each round."""
        ratios = [other / own for other, own in zip(base, samples, strict=True)]
        faster, slower = (sum(r > 1 for r in ratios), sum(r < 1 for r in ratios))
        return cls(*_percentiles(ratios), faster, slower)

    @property
    def is_noise(self) -> bool:
        """Whether chance alone shows such a difference more often than once in twenty times.

        This is the sign test: of works that take the same time either is faster in half the rounds.
        Fewer than ``FEWEST_ROUNDS`` never suffice.
        """
        rounds = self.faster + self.slower
        fewer = range(min(self.faster, self.slower) + 1)
        return 2 * sum(math.comb(rounds, k) for k in fewer) / 2**rounds > _CHANCE

    @property
    def is_figure(self) -> bool:
        """Whether the rounds agree so far that the median tells the speed-up."""
        return self.high - self.low <= _FIGURE * self.median


def take_turns(
    works: Mapping[str, Work],
    rounds: int,
    *,
    seconds: float = 0.0,
    burst: float = 0.0,
    settle: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of a call of each work, one entry a round; a round times every work once.

    Every work runs once before the first round, to warm up.

    Example::

        samples = take_turns({"eager": Work(eager), "fused": Work(fused)}, rounds=10)
        print(Timing.of(samples["fused"]), Speedup.of(samples["eager"], samples["fused"]))

    Args:
        works: what to time, by name.
        rounds: how many rounds to make at least.
        seconds: rounds go on until so much time is over.
        burst: seconds for which one measurement lasts at least. Short works run several times in
            it, so that the clock's own resolution and cost do not matter.
        settle: whether an untimed run comes before each measurement. Caches and allocator are then
            as this work leaves them, and a GPU has something to do when the measurement begins.
        advance: called after each measurement.
    """
    runs = {name: _runs(work, burst) for name, work in works.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    done = 0
    end = time.perf_counter() + seconds
    while done < rounds or time.perf_counter() < end:
        for name, work in works.items():
            if settle:
                work.run()
            samples[name].append(_seconds(work, runs[name]) / work.calls)
            advance()
        done += 1
    return samples


def _runs(work: Work, burst: float) -> int:
    """How many runs last as long as ``burst``."""
    work.run()
    if burst == 0:
        return 1
    fastest = min(_seconds(work, 1) for _ in range(3))
    return max(1, math.ceil(burst / max(fastest, 1e-9)))


def _seconds(work: Work, runs: int) -> float:
    """Of one run."""
    if work.how == "clock":
        start = time.perf_counter()
        for _ in range(runs):
            work.run()
        return (time.perf_counter() - start) / runs
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(runs):
        work.run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / runs


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 20th and 80th."""
    if len(values) == 1:
        return (values[0],) * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]
