"""What is measured: agreement of results, times in turn, and memory."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from resnest_fused import SplitAttentionConv2d, fuse
from resnest_fused.measure import agreement, memory, networks, timing
from resnest_fused.measure.timing import Speedup, Timing, Work, take_turns
from resnest_fused.models import images

pytestmark = pytest.mark.cpu


def test_relative_error() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert agreement.relative_error(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])) == 0.25
    assert agreement.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert agreement.relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert agreement.relative_error(torch.zeros(0), torch.zeros(0)) == 0
    for pair in ((nan, nan), (nan, torch.ones(2)), (torch.ones(2), nan)):
        error = agreement.relative_error(*pair)
        assert error != error
        assert not agreement.Check("", "", torch.float32, None, error, 1.0).passed


def test_check_in_a_16_bit_dtype() -> None:
    exact = torch.tensor([1.0, 0.5])
    reference = torch.tensor([1.0, 0.51], dtype=torch.bfloat16)
    own = (reference[1].float() - 0.5).item()
    allowed = 1.5 * own + torch.finfo(torch.bfloat16).eps
    found = networks.check("x", reference, exact.bfloat16(), exact, 0)
    assert found == agreement.Check("x", "", torch.bfloat16, own, 0.0, pytest.approx(allowed))
    assert not networks.check("x", reference, exact.bfloat16() * 1.1, exact, 0).passed


@pytest.mark.parametrize(
    ("second", "gap", "passed"), [(0.999, 0.002, True), (0.999, 0.0005, False), (0.5, 0.1, False)]
)
def test_top_five(second: float, gap: float, passed: bool) -> None:
    logits = torch.tensor([1.0, second, -1, -2, -3, -4])
    swapped = logits[[1, 0, 2, 3, 4, 5]]
    top = networks._top_five(logits, swapped, torch.tensor(gap))
    assert (top.reference, top.fused) == ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4])
    assert top.passed == passed


def test_networks_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        SplitAttentionConv2d(8, 8, 3),
        SplitAttentionConv2d(8, 16, 3, cardinality=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    fused = copy.deepcopy(reference)
    fuse(fused)
    before = copy.deepcopy(reference.state_dict())
    networks.check_train(reference, fused, images.random_images(4, 32, 0), torch.arange(4))
    for network in (reference, fused):
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("settle", "expected"), [(False, "ababab"), (True, "abaabbaabb")], ids=["no", "yes"]
)
def test_rounds_take_turns(settle: bool, expected: str) -> None:
    order: list[str] = []
    ticks: list[None] = []
    works = {name: Work(lambda name=name: order.append(name)) for name in "ab"}
    samples = take_turns(works, 2, settle=settle, advance=lambda: ticks.append(None))
    assert "".join(order) == expected
    assert [len(times) for times in samples.values()] == [2, 2]
    assert len(ticks) == 4


class Clock:
    """A clock that only work moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.runs = ""
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name: str, seconds: float, calls: int = 1) -> Work:
        def run() -> None:
            self.now += seconds
            self.runs += name

        return Work(run, calls)


def test_short_work_is_timed_in_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    works = {"a": clock.work("a", 1.0), "b": clock.work("b", 0.25, calls=5)}
    samples = take_turns(works, 2, burst=0.6)
    # A run to warm up and three to find out how long it takes, and then the two rounds.
    assert clock.runs == "aaaa" + "bbbb" + 2 * "abbb"
    assert samples == {"a": [1.0, 1.0], "b": [0.05, 0.05]}


def test_rounds_go_on_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert len(take_turns({"a": clock.work("a", 1.0)}, 2, seconds=4.5)["a"]) == 5
    assert len(take_turns({"a": clock.work("a", 1.0)}, 7, seconds=4.5)["a"]) == 7


def test_work_on_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock would time launches alone."""
    device_ms = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at, self.waited = device_ms, False

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, other: Event) -> float:
            assert other.waited
            return other.at - self.at

    def run() -> None:
        nonlocal device_ms
        device_ms += 20.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    samples = take_turns({"x": Work(run, 2, "graph"), "y": Work(run, 1, "calls")}, 2, settle=True)
    assert samples == {"x": [0.01, 0.01], "y": [0.02, 0.02]}


def test_timing_is_of_percentiles() -> None:
    assert Timing.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)
    assert Timing.of([2.0]) == (2.0, 2.0, 2.0)


def test_speedup_is_of_rounds() -> None:
    speedup = Speedup.of([2.0, 4.0, 3.0], [1.0, 2.0, 3.0])
    assert speedup == (2.0, pytest.approx(1.4), 2.0, 2, 0)


@pytest.mark.parametrize(
    ("faster", "slower", "noise"),
    [(6, 0, False), (0, 6, False), (5, 0, True), (9, 1, False), (8, 2, True), (2, 8, True)],
)
def test_what_chance_shows_too_is_noise(faster: int, slower: int, noise: bool) -> None:
    """The limit is a chance of 5 %: it is 1/32 (6 of 6), 11/512 (9 of 10) or 56/512 (8 of 10)."""
    ratios = [1.1] * faster + [0.9] * slower
    speedup = Speedup.of(ratios, [1.0] * len(ratios))
    assert (speedup.faster, speedup.slower, speedup.is_noise) == (faster, slower, noise)
    assert Speedup.of([1.0] * 10, [1.0] * 10).is_noise


def test_rounds_that_differ_much_give_no_figure() -> None:
    """For example 6.7 to 13 seconds, compared with 10.5."""
    assert not Speedup.of([10.5] * 10, [6.7, 7, 7, 7, 7, 9, 11, 12, 13, 13]).is_figure
    assert Speedup.of([10.5] * 10, [9.5, 9.6, 9.7, 9.8, 9.9] * 2).is_figure


def test_peak_memory() -> None:
    x = torch.ones(1000)

    def call() -> Tensor:
        a = x + 1  # 4000 bytes live
        b = a * 2  # 8000
        del a
        c = b.view(10, 100).add_(1)  # in place and a view: still 4000
        return c + x[:1]  # 8000

    assert memory.peak_memory(call) == 8000
    assert memory.peak_memory(lambda: x.add_(1)) == 0


def test_peak_memory_of_a_gpu_is_its_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was held before does not count, nor does an earlier peak."""
    gpu = SimpleNamespace(held=100, peak=500)

    def call() -> None:
        gpu.peak = max(gpu.peak, gpu.held + 60)
        gpu.held += 40

    def reset(device: torch.device) -> None:
        gpu.peak = gpu.held

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: gpu.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.peak)
    assert memory.peak_memory(call, torch.device("cuda", 0)) == 60


def test_saved_for_backward() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5, bias=False), nn.Sigmoid())
    x, target = torch.randn(3, 4), torch.arange(3)
    # Sigmoid keeps its output; cross entropy the log-softmax, the target and its total weight.
    expected = 2 * 3 * 5 * 4 + 3 * 8 + 4
    assert memory.saved_for_backward(model, x, target) == expected
