"""What a call of the fused module costs beyond its ops, on a map too small to take any time.

A training step of one module also pays for a call of ``torch.autograd.grad``, which a network makes
once for all its modules. So several modules are stepped together, too: what each more of them adds
is a module's share of a network's step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused.ops import (
    NOTHING_RUNS,
    FcArguments,
    MapArguments,
    NormArguments,
    RunningArguments,
)

OPS = torch.ops.resnest_fused
SEVERAL = 9


def of_ops(module: rf.FusedSplitAttention, x: Tensor, dout: Tensor) -> Callable[[], Tensor]:
    """A call or a training step by the ops alone: out, or the gradient of x."""
    fc1, bn1, fc2 = module.fc1, module.bn1, module.fc2
    map_and_bn0 = (*MapArguments(x, False, module.radix), *NormArguments(*[None] * 4, 0.0, False))
    fcs = FcArguments(fc1.weight, fc1.bias, fc2.weight, fc2.bias, module.cardinality)
    affine, running = (bn1.weight, bn1.bias), (bn1.running_mean, bn1.running_var)
    running_norm = NormArguments(*affine, *running, bn1.eps, False)
    needed = [True, False, False, *[True] * 6]

    def evaluate() -> Tensor:
        out: Tensor = OPS.split_attention.default(*map_and_bn0, *fcs, *running_norm)
        return out

    def step() -> Tensor:
        norm = NormArguments(*affine, None, None, bn1.eps, True)
        results = OPS.split_attention_train.default(*map_and_bn0, *fcs, *norm)
        _, gap, hidden, attention, _, _, mean, var = results
        update = RunningArguments(*running, bn1.num_batches_tracked, mean, var, bn1.momentum)
        OPS.update_running_statistics.default(x, *NOTHING_RUNS, *update)
        norm = norm._replace(mean=mean, var=var)
        dx: Tensor = OPS.split_attention_backward.default(
            dout, *map_and_bn0, *fcs, *norm, gap, hidden, attention, needed
        )[0]
        return dx

    return step if module.training else evaluate


def of_module(module: rf.FusedSplitAttention, x: Tensor, dout: Tensor) -> Callable[[], Tensor]:
    wanted = [x, *module.parameters()]
    x.requires_grad_(module.training)

    def step() -> Tensor:
        return torch.autograd.grad(module(x), wanted, dout)[0]

    return step if module.training else lambda: module(x)


def of_modules(modules: Sequence[nn.Module], x: Tensor, dout: Tensor) -> Callable[[], object]:
    """A training step of them side by side, each on a map of its own."""
    maps = [x.clone().requires_grad_() for _ in modules]
    wanted = [*maps, *(p for module in modules for p in module.parameters())]
    douts = [dout] * len(modules)

    def step() -> object:
        outs = [module(x) for module, x in zip(modules, maps, strict=True)]
        return torch.autograd.grad(outs, wanted, douts)

    return step


@pytest.mark.parametrize("contender", ["ops", "module"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_call_overhead(benchmark: BenchmarkFixture, mode: str, contender: str) -> None:
    """64 channels, 8x8 pixels, one sample; two in training."""
    module = rf.FusedSplitAttention(64).train(mode == "train")
    module.backend = "native"
    batch = 2 if module.training else 1
    x, dout = torch.rand(batch, 128, 8, 8), torch.rand(batch, 64, 8, 8)
    benchmark.group = f"call overhead, 64@8x8 {mode} fp32 NCHW R=2 B={batch}"
    with torch.set_grad_enabled(module.training):
        by_ops = of_ops(module, x.detach(), dout)
        by_module = of_module(module, x, dout)
        torch.testing.assert_close(by_ops(), by_module(), rtol=0, atol=0)
        benchmark(by_ops if contender == "ops" else by_module)


@pytest.mark.parametrize("count", [1, SEVERAL])
def test_training_overhead_of_several(benchmark: BenchmarkFixture, count: int) -> None:
    """As above; (the time of nine - the time of one) / 8 is what a module adds."""
    modules = [rf.FusedSplitAttention(64) for _ in range(count)]
    for module in modules:
        module.backend = "native"
    benchmark.group = "training overhead of several modules, 64@8x8 fp32 NCHW R=2 B=2"
    benchmark(of_modules(modules, torch.rand(2, 128, 8, 8), torch.rand(2, 64, 8, 8)))
