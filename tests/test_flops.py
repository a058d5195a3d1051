"""FlopCounterMode counts in a fused module what it counts in the unfused one.

It sets hooks on all modules, so a fused module calls its children and each is counted in its place.
Without such hooks, as in a function or a compiled graph, the ops are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from cases import NAMESPACES
from test_peers import official, timm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resnest_fused as rf
from resnest_fused import modules

# (channels, side) behind ResNeSt-50's convolutions at 224 pixels.
SIZES = [(64, 56), (128, 28), (256, 14), (512, 7)]
BATCH = 3


def flops(module: nn.Module, x: Tensor, backward: bool) -> dict[Any, int]:
    """FLOPs by op, and their total under "total"."""
    with FlopCounterMode(display=False) as counter:
        out = module(x)
        if backward:
            out.sum().backward()
    counts = dict(counter.get_flop_counts()["Global"])
    return {**counts, "total": counter.get_total_flops()}


def assert_counts_stay(
    plain: nn.Module, x: Tensor, backward: bool, namespace: str = "resnest_fused"
) -> None:
    """Fusing changes no count, neither with hooks on all modules nor without."""
    fused = copy.deepcopy(plain)
    rf.fuse(fused, backend={of: name for name, of in NAMESPACES.items()}[namespace])
    expected = flops(plain, x, backward)
    assert flops(fused, x, backward) == expected
    with mock.patch.object(modules, "calls_are_watched", lambda: False):
        found = flops(fused, x, backward)
    assert found.pop("total") == expected["total"]
    ops = getattr(torch.ops, namespace)
    assert found.get(ops.split_attention_train, 0) + found.get(ops.split_attention, 0) > 0
    assert (ops.split_attention_backward in found) is backward


@pytest.mark.parametrize("namespace", NAMESPACES.values())
@pytest.mark.parametrize(
    ("channels", "side", "radix", "cardinality"),
    [*((*size, 2, 1) for size in SIZES), *((512, 7, r, k) for r in (1, 4) for k in (1, 2))],
)
def test_counts_of_resnest_50_s_sizes(
    channels: int, side: int, radix: int, cardinality: int, namespace: str
) -> None:
    with torch.device("meta"):
        attention = rf.SplitAttention(channels, radix, cardinality)
        conv = rf.SplitAttentionConv2d(
            channels, channels, 3, padding=1, radix=radix, cardinality=cardinality
        )
        x = torch.empty(BATCH, radix * channels, side, side)
        image = torch.empty(BATCH, channels, side, side)
    for module, given in ((attention, x), (conv, image)):
        for training in (True, False):
            module.train(training)
            assert_counts_stay(module, given, backward=True, namespace=namespace)
            assert_counts_stay(module, given.clone().requires_grad_(), True, namespace)
        module.requires_grad_(False)
        assert_counts_stay(module, given, backward=False, namespace=namespace)


def test_counts_with_one_tensor_trained_or_frozen() -> None:
    with torch.device("meta"):
        module = rf.SplitAttention(16, 2, 2)
        x = torch.empty(BATCH, 32, 5, 7)
    tensors = [x, *module.parameters()]
    for chosen in tensors:
        for trained in (True, False):
            for tensor in tensors:
                tensor.requires_grad_((tensor is chosen) is trained)
            assert_counts_stay(module, x, backward=True)


@pytest.mark.parametrize("frozen", ["conv", "bn0", "conv bn0", "conv bn0 fc1", "fc1 bn1 fc2"])
def test_counts_with_frozen_layers_behind_the_convolution(frozen: str) -> None:
    with torch.device("meta"):
        module = rf.SplitAttentionConv2d(16, 16, 3, padding=1, cardinality=2)
        x = torch.empty(BATCH, 16, 5, 7)
    for name in frozen.split():
        getattr(module, name).requires_grad_(False)
    assert_counts_stay(module, x, backward=True)


def test_other_modules_between_the_halves_count_for_themselves() -> None:
    with torch.device("meta"):
        plain = rf.SplitAttentionConv2d(16, 32, 3, norm_layer=lambda n: nn.GroupNorm(2, n))
        x = torch.empty(BATCH, 16, 8, 8)
    fused = copy.deepcopy(plain)
    rf.fuse(fused)
    assert flops(fused, x, True) == flops(plain, x, True)


@pytest.mark.parametrize("namespace", NAMESPACES.values())
def test_counts_of_a_network(namespace: str) -> None:
    with torch.device("meta"):
        model = rf.models.create("resnest50", fused=False)
        x = torch.empty(2, 3, 64, 64)
    assert_counts_stay(model, x, backward=True, namespace=namespace)


@pytest.mark.peers
@pytest.mark.parametrize("make", [official, timm], ids=["official", "timm"])
@pytest.mark.parametrize("cardinality", [1, 2])
@pytest.mark.parametrize("radix", [1, 2, 4])
def test_counts_of_peers(make: Callable[..., nn.Module], radix: int, cardinality: int) -> None:
    module, x = make(radix, cardinality), torch.empty(BATCH, 16, 9, 8)
    assert_counts_stay(module, x, backward=True)
    module.eval().requires_grad_(False)
    assert_counts_stay(module, x, backward=False)


def test_counts_on_data() -> None:
    """On real data, so that the kernels themselves run."""
    plain, x = rf.SplitAttention(16, 2, 2), torch.randn(BATCH, 32, 6, 6, requires_grad=True)
    for namespace in NAMESPACES.values():
        assert_counts_stay(plain, x, backward=True, namespace=namespace)
