"""A whole ResNeSt-50 at 224 pixels: the workloads, and the times and memory of each contender."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused.measure import agreement, memory
from resnest_fused.measure.networks import step as train_step
from resnest_fused.measure.timing import Work, take_turns

SIDE = 224
# Bound on the relative difference of logits or loss, for the same purpose as in contenders.py.
TOLERANCE = 1e-3


def _official() -> nn.Module:
    return importlib.import_module("resnest.torch").resnest50()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: rf.models.create("resnest50", fused=False),
    "official": _official,
}


@dataclass(frozen=True)
class Workload:
    """Inference, or a training step without the optimizer's: forward, cross entropy, backward."""

    batch: int
    train: bool

    def __str__(self) -> str:
        return f"{'train step' if self.train else 'inference'} B={self.batch}"

    @property
    def contenders(self) -> tuple[str, ...]:
        """The plain model, the fused one, and that with its norms folded away."""
        return ("eager", "fused") if self.train else ("eager", "fused", "folded")


WORKLOADS = (Workload(1, train=False), Workload(8, train=False), Workload(8, train=True))


class Result(NamedTuple):
    """What a workload took.

    Attributes:
        samples: seconds per call of each contender, one entry a round.
        saved: bytes that each contender keeps for backward; empty in inference.
    """

    samples: dict[str, list[float]]
    saved: dict[str, int]


def measure(
    workload: Workload, model: str, backend: str, side: int, seconds: float, min_rounds: int
) -> Result:
    """Times and memory of a workload's contenders, which share their weights and take turns.

    Args:
        workload: what to measure.
        model: one of ``MODELS``.
        backend: the one that the fused modules are to use.
        side: pixels of the images.
        seconds: time to spend on rounds.
        min_rounds: rounds to make even if they take longer.

    Raises:
        AssertionError: a fused network's logits, or its loss, are not eager's.
    """
    torch.manual_seed(0)
    eager = MODELS[model]().train(workload.train)
    variants = {name: _variant(eager, name, backend) for name in workload.contenders}
    x = torch.randn(workload.batch, 3, side, side)
    target = torch.randint(1000, (workload.batch,))
    saved = {}
    if workload.train:
        saved = {
            name: memory.saved_for_backward(network, x, target)
            for name, network in variants.items()
        }

    def step(network: nn.Module) -> Callable[[], Tensor]:
        if workload.train:
            return lambda: train_step(network, x, target)
        return lambda: network(x)

    steps = {name: step(network) for name, network in variants.items()}
    with torch.set_grad_enabled(workload.train):
        results = {name: call() for name, call in steps.items()}
        for name, result in results.items():
            error = agreement.relative_error(result, results["eager"])
            assert error <= TOLERANCE, f"{workload}: {name} differs from eager by {error:.1e}"
        works = {name: Work(call) for name, call in steps.items()}
        # No untimed calls between, because a network is far larger than the caches.
        return Result(take_turns(works, min_rounds, seconds=seconds), saved)


def _variant(eager: nn.Module, name: str, backend: str) -> nn.Module:
    if name == "eager":
        return eager
    network = copy.deepcopy(eager)
    report = rf.fuse(network, backend=backend, fold=name == "folded")
    assert all(entry.fused and entry.reason is None for entry in report.entries), report
    return network
