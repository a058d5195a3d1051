"""Several steps in one launch: programs take items by tickets, in the order of their stages.

A stage has items, a program for each. An item may wait for all items of an earlier stage. Only
programs that have started hold tickets, and an item waits for lower tickets alone, so that a launch
comes to its end however few of its programs run at a time. Which program takes an item makes no
difference to its result.

The counters are zero at first: an earlier launch of the same call sees to that (`open_stages`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnest_fused.backends.triton.problem import Map

# Items taken, then those done by stage.
COUNTERS = tl.constexpr(8)


@triton.jit
def open_stages(counters):
    """For the launch before: makes the counters ready."""
    if tl.program_id(0) == 0:
        tl.store(counters + tl.arange(0, COUNTERS), 0)


@triton.jit
def take(counters):
    """The number of the item that this program takes."""
    return tl.atomic_add(counters, 1, sem="relaxed")


@triton.jit
def wait_for(counters, STAGE: tl.constexpr, items):
    """Wait until the stage's items are done; then all that they stored can be loaded."""
    done = counters + 1 + STAGE
    # To acquire empties the multiprocessor's L1, also for its other programs: once is enough.
    while tl.atomic_add(done, 0, sem="relaxed") < items:
        pass
    while tl.atomic_add(done, 0, sem="acquire") < items:
        pass
    tl.debug_barrier()


@triton.jit
def finish(counters, STAGE: tl.constexpr):
    """Say that this program's item is done."""
    tl.debug_barrier()
    tl.atomic_add(counters + 1 + STAGE, 1, sem="release")


def make_counters(m: Map) -> Tensor:
    """Counters for a launch behind one that opens its stages."""
    # Over an empty batch that one has no programs.
    make = m.x.new_zeros if m.batch == 0 else m.x.new_empty
    return make(COUNTERS.value, dtype=torch.int32)
