"""The judgement of rounding errors finds evaluations that are worse than a loop, and only those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import oracle
import pytest
import torch
from cases import PROLOGUES, Call, Case, Results, check, draw
from rounding import FALSE_ALARM, most_by_chance, times_worst

pytestmark = pytest.mark.usefixtures("one_thread")
DRAWS = 48


def _draws(dtype: torch.dtype, mean: float = 0.0) -> Iterator[Call]:
    for index in range(DRAWS):
        radix = index % 4 + 1
        call = draw(Case(6, 24, 5, 5, radix, 2, 16, dtype, norm="batch", prologue="batch"))
        call.x = call.x + mean
        yield call


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().to(torch.float32).numpy()


def _rounded_exp(values: np.ndarray) -> np.ndarray:
    return _to_bfloat16(np.exp(values))


def _sum_in_bfloat16(values: np.ndarray, *axes: int) -> np.ndarray:
    kept = [axis for axis in range(values.ndim) if axis not in axes]
    terms = values.transpose(*axes, *kept).reshape(-1, *(values.shape[axis] for axis in kept))
    total = np.zeros_like(terms[0])
    for term in terms:
        total = _to_bfloat16(total + term)
    return total


def _variance_by_squares(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[x^2] - E[x]^2, which loses digits if the mean's square is far above the variance."""
    count = values.dtype.type(values.shape[0] * values.shape[2])
    mean, mean_square = oracle._sum(values, 0, 2) / count, oracle._sum(values**2, 0, 2) / count
    return mean, mean_square - mean**2


@pytest.mark.parametrize(
    ("dtype", "mean", "name", "wrong"),
    [
        (torch.bfloat16, 0, "_exp", _rounded_exp),
        (torch.float32, 0, "_sum", _sum_in_bfloat16),
        (torch.float32, 30, "_statistics", _variance_by_squares),
        (torch.float64, 30, "_statistics", _variance_by_squares),
    ],
)
def test_mistakes_are_found(
    dtype: torch.dtype,
    mean: float,
    name: str,
    wrong: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rounding too many, sums in a narrow dtype, and cancellation."""

    def evaluate(call: Call) -> Results:
        with monkeypatch.context() as mistake:
            mistake.setattr(oracle, name, wrong)
            return call.loop()

    counts = times_worst(_draws(dtype, mean), evaluate)
    assert min(counts["out"], counts["x"], counts["fc2_weight"]) > most_by_chance(DRAWS), counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_order_of_sums_is_no_mistake(dtype: torch.dtype) -> None:
    def evaluate(call: Call) -> Results:
        order = torch.randperm(call.case.batch)
        back = order.argsort()
        shuffled = Call(call.case, call.x[order], call.params, call.dout[order])
        out, grads = shuffled.loop()
        return out[back], grads | {"x": grads["x"][back]}

    counts = times_worst(_draws(dtype), evaluate)
    assert max(counts.values()) <= most_by_chance(DRAWS), counts


def test_check_asks_for_no_more_than_a_loop_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own error is tiny, if its order of summation happens to suit the numbers."""
    gradients = Call.gradients

    def exact(
        call: Call, backend: str | None = None, names: Iterable[str] | None = None
    ) -> Results:
        out, grads = gradients(call, backend, names)
        if backend != "reference":
            return out, grads
        truth = {name: torch.as_tensor(v.astype(float)) for name, v in call.truth.values.items()}
        return truth["out"].to(out), {name: truth[name].to(grad) for name, grad in grads.items()}

    monkeypatch.setattr(Call, "gradients", exact)
    for prologue in PROLOGUES:
        check(Case(2, 68, 14, 14, 3, 2, 34, prologue=prologue))


def test_false_alarms_are_as_rare_as_said() -> None:
    """Checked for fair coins, by the binomial distribution's recurrence."""
    assert [most_by_chance(draws) for draws in (1, 19, 20, 21)] == [1, 19, 19, 20]
    for draws in (20, DRAWS):
        chances = np.ones(1)
        for _ in range(draws):
            chances = (np.append(chances, 0) + np.append(0, chances)) / 2
        most = most_by_chance(draws)
        assert chances[most + 1 :].sum() <= FALSE_ALARM < chances[most:].sum()
