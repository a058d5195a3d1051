"""Batch normalisation folded into the convolution in front of it, for inference, and back.

In eval mode ``bn(conv(x))`` is a convolution itself. With scale = gamma / sqrt(var + eps)::

    weight' = scale * weight        bias' = beta + scale * (bias - mean)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnest_fused.modules import FoldedNorm, batch_norm_args, computes_as_conv, intercepted

# A convolution, and the norm that follows it.
_PAIRS = (("conv", "bn0"), ("fc1", "bn1"))


def fold(module: nn.Module) -> list[str]:
    """Fold ``module``'s ``bn0`` into ``conv`` and ``bn1`` into ``fc1``, where it has them.

    Both children are replaced; :func:`unfold` puts them back.

    Returns:
        Why what could not be folded was not; empty when all is folded.
    """
    reasons = []
    for name, norm_name in _PAIRS:
        conv, norm = (module._modules.get(child) for child in (name, norm_name))
        if norm is None or type(norm) in (nn.Identity, FoldedNorm):
            continue
        reason = _obstacle(module, name, conv, norm)
        if reason is None:
            setattr(module, name, _folded_conv(conv, norm))
            setattr(module, norm_name, FoldedNorm(conv, norm))
        else:
            reasons.append(f"{norm_name} not folded: {reason}")
    return reasons


def unfold(module: nn.Module) -> None:
    """Undo :func:`fold`: the original children, where ``module`` is now and in its dtype."""
    for name, norm_name in _PAIRS:
        folded = module._modules.get(norm_name)
        if isinstance(folded, FoldedNorm):
            weight: Any = module.get_submodule(name).weight
            for original, child in zip(folded.originals, (name, norm_name), strict=True):
                original.to(weight.device, weight.dtype).train(folded.training)
                setattr(module, child, original)


def is_folded(module: nn.Module) -> bool:
    """Whether a norm of ``module`` is folded."""
    return any(isinstance(module._modules.get(norm), FoldedNorm) for _, norm in _PAIRS)


def _obstacle(module: nn.Module, name: str, conv: Any, norm: nn.Module) -> str | None:
    args = batch_norm_args(norm)
    if args is None:
        return intercepted(norm) or f"expected a batch normalisation, got {type(norm).__name__}"
    if args.batch_stats:
        return "it normalises with the batch's statistics in eval mode too"
    if not computes_as_conv(type(conv)):
        return f"{name}: expected a Conv2d, got {type(conv).__name__}"
    if intercepted(conv) is not None:
        return f"{name}: {intercepted(conv)}"
    drop = module._modules.get("drop")
    if name == "conv" and not isinstance(drop, nn.Identity | None):
        return f"{type(drop).__name__} stands behind it"
    return None


@torch.no_grad()
def _folded_conv(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    args = batch_norm_args(norm)
    assert args is not None and args.running_mean is not None and args.running_var is not None

    def wide(tensor: Tensor | None, otherwise: float) -> Tensor:
        if tensor is None:
            return conv.weight.new_full((conv.out_channels,), otherwise, dtype=torch.float64)
        return tensor.double()

    scale = wide(args.weight, 1) * (args.running_var.double() + args.eps).rsqrt()
    bias = wide(args.bias, 0) + scale * (wide(conv.bias, 0) - args.running_mean)
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias=True,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(conv.weight)
    folded.weight = nn.Parameter(weight.contiguous(memory_format=_format(conv.weight)), False)
    folded.bias = nn.Parameter(bias.to(conv.weight), False)
    return folded.train(conv.training)


def _format(weight: Tensor) -> torch.memory_format:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
