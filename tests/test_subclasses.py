"""Subclasses of Tensor go in and come out, and operations on the output are differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse import features, randomise
from torch import Tensor, nn

import resnest_fused as rf


class Plain(Tensor):
    """A subclass without anything of its own."""


class Labelled(Tensor):
    """Carries a label from operation to operation, as medical images do with their place."""

    label: str

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_function__(function, types, args, kwargs)
        labels = [arg.label for arg in args if isinstance(arg, cls) and hasattr(arg, "label")]
        if isinstance(out, cls) and labels:
            out.label = labels[0]
        return out


NORMS: dict[str, Any] = {
    "batch": nn.BatchNorm2d,
    "group": lambda features: nn.GroupNorm(4, features),
    "none": None,
}


def add_in_place(x: Tensor) -> Tensor:
    return x.add_(1)


def relu_in_place(x: Tensor) -> Tensor:
    return nn.functional.relu(x.mul_(2), inplace=True)


@pytest.mark.parametrize("after", [add_in_place, relu_in_place, lambda x: x * 3])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("norm_layer", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("kind", [Plain, Labelled])
@pytest.mark.parametrize("conv", [False, True])
def test_subclasses(
    conv: bool,
    kind: type[Tensor],
    norm_layer: Any,
    backend: str,
    after: Callable[[Tensor], Tensor],
) -> None:
    """The same step on a plain tensor is the truth."""
    sizes = (8, 8, 3) if conv else (4,)
    make = rf.FusedSplitAttentionConv2d if conv else rf.FusedSplitAttention
    module = randomise(make(*sizes, norm_layer=norm_layer, inter_channels=8)).double()
    module.backend = backend
    for training in (False, True):
        module.train(training).requires_grad_(True)
        results = []
        for wrap in (False, True):
            module.zero_grad()
            leaf = features(4, 8, 6, 5).double().requires_grad_()
            x = leaf.as_subclass(kind) if wrap else leaf
            if wrap and kind is Labelled:
                x.label = "left"
            state = {name: buffer.clone() for name, buffer in module.named_buffers()}
            out = after(module(x))
            assert type(out) is (kind if wrap else Tensor)
            assert not (wrap and kind is Labelled) or out.label == "left"
            dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            out.backward(dout)
            grads = [parameter.grad for parameter in module.parameters()]
            buffers = [buffer.clone() for buffer in module.buffers()]
            results.append([out.detach().as_subclass(Tensor), leaf.grad, *grads, *buffers])
            module.load_state_dict(state, strict=False)
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


def test_without_gradients() -> None:
    module = rf.FusedSplitAttention(4).eval()
    x = features(2, 8, 3, 3).as_subclass(Plain)
    with torch.no_grad():
        assert type(module(x)) is Plain
        assert torch.equal(module(x).as_subclass(Tensor), module(x.as_subclass(Tensor)))


def test_a_subclass_may_answer_itself() -> None:
    class Answering(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, *_: Any, **__: Any) -> Any:
            return function

    x = torch.ones(2, 8, 3, 3).as_subclass(Answering)
    assert rf.FusedSplitAttention(4)(x) is rf.split_attention
