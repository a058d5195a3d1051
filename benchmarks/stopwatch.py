"""Times work in turns: by CUDA events, around calls or graph replays, or by the clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from resnest_fused.compare import Timing

# What is timed at once lasts as long, far above an event's resolution and its own cost.
BURST_S = 2e-3


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        run: does it.
        calls: how many calls it makes.
        how: "graph" for replays of a captured graph, "calls" for calls in a stream that never runs
            dry, "clock" for calls on a CPU.
    """

    run: Callable[[], object]
    calls: int
    how: str


def prepare(steps: Sequence[Callable[[], object]], device: torch.device, graph: bool) -> Work:
    """All ``steps`` in a row, after each has run; captured in one graph if so wished on a GPU.

    A graph shows what the kernels take where calls from Python take longer. Its results lie in
    memory of their own, as inputs do.
    """
    for step in steps:
        step()

    def run() -> None:
        for step in steps:
            step()

    if device.type != "cuda":
        return Work(run, len(steps), "clock")
    if not graph:
        return Work(run, len(steps), "calls")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = [step() for step in steps]
    del results  # together until here, so that no two share memory
    return Work(captured.replay, len(steps), "graph")


def take_turns(works: Mapping[str, Work], rounds: int) -> dict[str, Timing]:
    """Seconds of a call of each; a round times every work once, after an untimed run of it."""
    repeats = {}
    for name, work in works.items():
        work.run()
        once = max(_seconds(work, 1) * work.calls, 1e-9)
        repeats[name] = max(1, math.ceil(BURST_S / once))
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            work.run()
            samples[name].append(_seconds(work, repeats[name]))
    return {name: _timing(seconds) for name, seconds in samples.items()}


def _seconds(work: Work, repeats: int) -> float:
    """Of one call."""
    if work.how == "clock":
        start = time.perf_counter()
        for _ in range(repeats):
            work.run()
        total = time.perf_counter() - start
    else:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            work.run()
        last.record()
        last.synchronize()
        total = first.elapsed_time(last) / 1e3
    return total / (repeats * work.calls)


def _timing(seconds: list[float]) -> Timing:
    if len(seconds) == 1:
        return Timing(*seconds * 3)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[-1])
