"""What a call of the fused module costs beyond its op, on a map too small to take any time."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import resnest_fused as rf
from resnest_fused.ops import FcArguments, MapArguments, NormArguments


@pytest.mark.parametrize("contender", ["op", "module"])
def test_call_overhead(benchmark: BenchmarkFixture, contender: str) -> None:
    """Eval, 64 channels, 8x8 pixels, one sample."""
    module = rf.FusedSplitAttention(64).eval()
    module.backend = "native"
    x = torch.rand(1, 128, 8, 8)
    fc1, bn1, fc2 = module.fc1, module.bn1, module.fc2
    arguments = (
        *MapArguments(x, False, module.radix),
        *NormArguments(None, None, None, None, 0.0, False),
        *FcArguments(fc1.weight, fc1.bias, fc2.weight, fc2.bias, module.cardinality),
        *NormArguments(bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var, bn1.eps, False),
    )
    op = torch.ops.resnest_fused.split_attention.default
    calls = {"op": lambda: op(*arguments), "module": lambda: module(x)}
    benchmark.group = "call overhead, 64@8x8 eval fp32 NCHW R=2 B=1"
    with torch.no_grad():
        torch.testing.assert_close(calls["op"](), calls["module"](), rtol=0, atol=0)
        benchmark(calls[contender])
