"""Prepares steps for timing; on a GPU it can capture them in one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from resnest_fused.measure.timing import Work


def prepare(steps: Sequence[Callable[[], object]], device: torch.device, graph: bool) -> Work:
    """Run each step once, and return all in a row; on a GPU in one graph if ``graph`` is true.

    A graph shows the kernels' own time if calls from Python take longer. Its results lie in memory
    of their own, as inputs do.
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
    del results  # kept until here, so that no two share memory
    return Work(captured.replay, len(steps), "graph")
