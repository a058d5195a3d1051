"""Tries out on synthetic inputs, before a module is fused, whether it would compute the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import Identity

from resnest_fused.measure import agreement
from resnest_fused.measure.agreement import Call, Form, Incomparable

# Batch, height and width. There are more than two samples, since normalising two gives +1 and -1.
_SHAPES = ((5, 6, 5), (3, 1, 1), (4, 9, 12))
_LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.contiguous_format)

_UNTRIED = "it cannot be tried out"


def _draw(
    random: Callable[..., Tensor], shape: Iterable[int], generator: torch.Generator
) -> Tensor:
    # On the generator's device, whatever the default device is.
    return random(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def difference(module: nn.Module, fused: type[nn.Module], backend: str) -> str | None:
    """By how much ``module`` would differ if ``fused`` were its class; None if it would not.

    Both classes run in float64 on maps of several sizes, in eval and in training mode, forward and
    backward. Random parameters and running statistics take the place of the module's own. The
    convolution in front is left out, as both call it. Module and random generators stay unchanged.
    """
    radix = getattr(module, "radix", None)
    features = _features(module, radix)
    if features is None or not isinstance(radix, int):
        return f"{_UNTRIED}: the number of its features is unknown"
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        return f"{_UNTRIED}: it is on the meta device"

    @contextlib.contextmanager
    def as_fused() -> Iterator[None]:
        with agreement.preserved(module):
            module.__class__ = fused
            vars(module)["backend"] = backend
            yield

    forms = Form("unfused", module, contextlib.nullcontext), Form("fused", module, as_fused)
    random = agreement.RandomStates(tensors)
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        with torch.inference_mode(False), agreement.preserved(module):
            _randomise(module, generator)
            for shape, layout in zip(_SHAPES, _LAYOUTS, strict=True):
                call = _call(shape, features, radix, layout, device, generator)
                for training in (False, True):
                    module.train(training)
                    checks, _ = agreement.compare(*forms, call)
                    worst = agreement.worst(checks)
                    if not worst.passed:
                        mode = "training" if training else "eval"
                        return f"fused it would compute something else, in {mode}: {worst}"
    except Incomparable as error:
        return f"{_UNTRIED}: {error}"
    finally:
        random.restore()
    return None


def _features(module: nn.Module, radix: Any) -> int | None:
    """radix * channels, the number of features that enter the attention; None if unknown."""
    for name in ("conv", "fc2"):
        features = getattr(getattr(module, name, None), "out_channels", None)
        if isinstance(features, int):
            return features
    channels = getattr(module, "channels", None)
    return radix * channels if isinstance(channels, int) and isinstance(radix, int) else None


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    if "conv" in module._modules:
        module._modules["conv"] = Identity()

    def parameter(tensor: Tensor) -> Tensor:
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
        values = _draw(torch.randn, tensor.shape, generator)
        return (values / fan_in**0.5).to(tensor.device)

    def buffer(name: str, tensor: Tensor) -> Tensor:
        # The buffers of a normalisation; a frozen one has its weight and bias among them.
        if name not in ("running_mean", "running_var", "weight", "bias"):
            return agreement.copied(tensor, torch.float64)
        values = _draw(torch.rand, tensor.shape, generator)
        return (values + (0.5 if name in ("running_var", "weight") else -0.5)).to(tensor.device)

    agreement.stand_in(module, parameter, buffer)
    module.requires_grad_()


def _call(
    shape: tuple[int, int, int],
    features: int,
    radix: int,
    layout: torch.memory_format,
    device: torch.device,
    generator: torch.Generator,
) -> Call:
    batch, *size = shape

    def draw(*sizes: int) -> Tensor:
        return _draw(torch.randn, sizes, generator).to(device, memory_format=layout)

    # The samples differ in their means, since bn1 divides by the spread of these.
    x = draw(batch, features, *size) + draw(batch, features, 1, 1)
    return Call((x.requires_grad_(),), {}, (draw(batch, features // radix, *size),))
