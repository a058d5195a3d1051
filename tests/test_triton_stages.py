"""Phase 2's items wait for what they need: started in any order, they give the same results.

Triton's interpreter runs one program after the other, and so in the order of their tickets. Here
each program has a thread, and the last items come first. One thread runs at a time, until it ends
or waits for a stage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Case, draw_any
from test_triton import (  # noqa: F401
    _everything,
    quick_interpreter,
    small_blocks,
    triton_backend,
)
from triton import language as tl

from resnest_fused.backends.triton import attention, attention_backward, launch
from resnest_fused.backends.triton.compat import INTERPRETED

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not INTERPRETED, reason="programs are the interpreter's"),
    pytest.mark.usefixtures("small_blocks"),
]


class Programs:
    """Runs programs in threads; ``waited`` counts waits for stages that were not done."""

    def __init__(self) -> None:
        self.baton = threading.Lock()
        self.mine = threading.local()
        self.waited = 0
        self.started = 0

    def take(self, counters: Any) -> Any:
        return tl.full((), self.mine.item, tl.int32)

    def wait_for(self, counters: Any, STAGE: Any, items: Any) -> None:
        def done() -> int:
            return int(tl.load(counters + 1 + STAGE).handle.data.item())

        needed = items if isinstance(items, int) else int(items.handle.data.item())
        self.waited += done() < needed
        while done() < needed:
            self.baton.release()
            time.sleep(1e-4)
            self.baton.acquire()

    def run(self, kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
        errors = []

        def program(item: int) -> None:
            self.mine.item = item
            with self.baton:
                try:
                    kernel[(1,)](*arguments, **options)
                except BaseException as error:
                    errors.append(error)

        threads = [threading.Thread(target=program, args=(i,)) for i in reversed(range(programs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors and not any(thread.is_alive() for thread in threads)
        self.started += programs


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    found, in_order = Programs(), launch.run
    kernels = (attention.attention_kernel, attention_backward.attention_backward_kernel)

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        (found.run if kernel in kernels else in_order)(kernel, *args, **options)

    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "take", found.take)
        monkeypatch.setattr(module, "wait_for", found.wait_for)
    monkeypatch.setattr(launch, "run", run)
    yield found


CASES = [
    Case(3, 12, 5, 7, 2, 2, 20, norm="batch", prologue="batch"),
    Case(2, 9, 6, 4, 1, 3, 9, norm="running", layout="channels_last"),
    Case(5, 8, 4, 4, 4, 1, 20, norm="batch", prologue="running", bias=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_items_in_any_order(
    case: Case, fill_memory: Callable[[int], None], request: pytest.FixtureRequest
) -> None:
    call = draw_any(case)
    expected = _everything(call)
    programs = request.getfixturevalue("programs")
    fill_memory(0x7F)  # NaN, or huge numbers, where nothing was stored yet
    results = _everything(call)
    assert programs.waited > 0
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.long
@pytest.mark.parametrize("stage", range(4))
def test_each_wait_is_needed(
    stage: int, fill_memory: Callable[[int], None], request: pytest.FixtureRequest
) -> None:
    """The test above would find a stage for which nothing waits."""
    call = draw_any(CASES[0])
    expected = _everything(call)
    programs = request.getfixturevalue("programs")
    waiting = programs.wait_for

    def careless(counters: Any, STAGE: Any, items: Any) -> None:
        if int(getattr(STAGE, "value", STAGE)) != stage:
            waiting(counters, STAGE, items)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (attention, attention_backward):
            monkeypatch.setattr(module, "wait_for", careless)
        fill_memory(0x7F)
        results = _everything(call)
    assert not all(map(torch.equal, results, expected))
