"""Folds batch normalisation into the convolution in front of it, for inference, and unfolds it.

In eval mode ``bn(conv(x))`` is a convolution itself. With scale = gamma / sqrt(var + eps)::

    weight' = scale * weight        bias' = beta + scale * (bias - mean)
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Mapping, Set
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.linear import Identity

from resnest_fused.children import (
    FoldedNorm,
    batch_norm_args,
    calls_a_norm,
    intercepted,
    is_conv,
    is_sequence,
    own_method,
)
from resnest_fused.fusing import registry
from resnest_fused.layout import Layout, Path, read
from resnest_fused.reference import BatchNormArgs


class _Pair(NamedTuple):
    """A convolution and the norm after it, each given by its parent and its name there.

    The norm may be the convolution's own child.
    """

    conv_parent: nn.Module
    conv_name: str
    norm_parent: nn.Module
    norm_name: str

    @property
    def conv(self) -> Any:
        return self.conv_parent._modules[self.conv_name]

    @property
    def norm(self) -> Any:
        return self.norm_parent._modules[self.norm_name]


def shared_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that are children in several places of ``model``."""
    places = Counter(child for module in model.modules() for child in module._modules.values())
    return {module for module, count in places.items() if module is not None and count > 1}


def fold_attention(module: nn.Module, shared: Set[nn.Module]) -> list[str]:
    """Fold a split-attention module's ``bn0`` into ``conv`` and ``bn1`` into ``fc1``.

    Both children are replaced; :func:`unfold` puts them back.

    Args:
        module: the split-attention module.
        shared: the :func:`shared_modules` of the model that it is in.

    Returns:
        The reasons of those that could not be folded; empty when all are folded.
    """
    layout: Layout = type(module)._layout  # type: ignore[attr-defined]
    reasons = []
    for conv, norm in ((layout.conv, layout.bn0), (layout.fc1, layout.bn1)):
        pair = _pair(module, conv, norm)
        reason = pair and _fold(pair, shared)
        if reason is not None:
            reasons.append(f"{'.'.join(norm or ())} not folded: {reason}")
    return reasons


def fold_network(model: nn.Module) -> None:
    """Fold the other norms of ``model``, where possible.

    These are the norms behind convolutions in ResNeSt's blocks and stem, where nobody replaced
    their forward, and in every ``nn.Sequential``, which runs its children in order.
    """
    shared = shared_modules(model)
    for module in list(model.modules()):
        for pair in _pairs_of_network(module):
            _fold(pair, shared)


def unfold(model: nn.Module) -> None:
    """Put the original layers back, on the model's device, and in its dtype if that changed."""
    for parent in list(model.modules()):
        for name, folded in list(parent._modules.items()):
            if isinstance(folded, FoldedNorm):
                conv_parent, conv_name = folded.place
                conv: Any = conv_parent._modules[conv_name]
                for original in folded.originals:
                    original.to(conv.weight.device).train(folded.training)
                    if conv.weight.dtype != folded.dtype:
                        original.to(conv.weight.dtype)
                conv_parent._modules[conv_name], parent._modules[name] = folded.originals


def count_folded(model: nn.Module) -> int:
    """The number of folded norms in ``model``."""
    return sum(isinstance(module, FoldedNorm) for module in model.modules())


def _pair(module: nn.Module, conv: Path | None, norm: Path | None) -> _Pair | None:
    """The convolution and the norm at these paths; None if one of them is not there."""
    places = [_place(module, path) if path else None for path in (conv, norm)]
    if places[0] is None or places[1] is None:
        return None
    (conv_parent, conv_name), norm_place = places[0], places[1]
    inner: Any = conv_parent._modules[conv_name]
    # A stem of several convolutions ends in the one that the norm follows.
    if is_sequence(inner) and len(inner) and intercepted(inner) is None:
        conv_parent, conv_name = inner, list(inner._modules)[-1]
    return _Pair(conv_parent, conv_name, *norm_place)


def _place(module: nn.Module, path: Path) -> tuple[nn.Module, str] | None:
    """The parent of the child at a path, and its name there, which a property may give another."""
    parent, child = read(module, path[:-1], None), read(module, path, None)
    if not isinstance(parent, nn.Module) or child is None:
        return None
    return next(((parent, name) for name, each in parent._modules.items() if each is child), None)


def _pairs_of_network(module: nn.Module) -> list[_Pair]:
    children = module._modules.items()
    found: list[_Pair | None] = [
        _Pair(module, name, child, "norm")
        for name, child in children
        if child is not None and calls_a_norm(child)
    ]
    if is_sequence(module):
        found += [_Pair(module, a, module, b) for a, b in itertools.pairwise(module._modules)]
    else:
        # The forward of a fused block runs all that is not in its op.
        kind = vars(module).get("_unfused_class", type(module))
        pairs = registry.fold_pairs(module, kind)
        if pairs and _runs_as_written(module, kind):
            found += [_pair(module, tuple(a.split(".")), tuple(b.split("."))) for a, b in pairs]
    return [pair for pair in found if pair is not None]


def _runs_as_written(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nobody replaced the methods that say in which order the children run."""
    return all(
        name not in vars(module) and own_method(kind, name) is not None
        for name in ("forward", "forward_features")
        if hasattr(kind, name)
    )


def _fold(pair: _Pair, shared: Set[nn.Module]) -> str | None:
    """Fold one pair, or return why not; None also without a norm."""
    conv, norm = pair.conv, pair.norm
    if norm is None or isinstance(norm, Identity):  # which a folded norm is too
        return None
    reason = _obstacle(pair, shared)
    if reason is None:
        folded = _folded_conv(conv, norm)
        placeholder = FoldedNorm(conv, norm, pair.conv_parent, pair.conv_name)
        norm_parent = pair.norm_parent
        if norm_parent is conv:  # whose forward calls the norm, and then an activation
            norm_parent = folded = _of_the_class_of(conv, folded)
        pair.conv_parent._modules[pair.conv_name] = folded
        norm_parent._modules[pair.norm_name] = placeholder
    return reason


def _of_the_class_of(conv: Any, folded: nn.Conv2d) -> nn.Conv2d:
    """``folded`` with the class, attributes and children of ``conv``."""
    made = copy.copy(conv)
    vars(made).update(vars(folded), _modules=dict(conv._modules))
    return made


def _args_of(norm: nn.Module) -> BatchNormArgs | None:
    """The batch normalisation of ``norm``, which may call its children behind it."""
    return batch_norm_args(norm) or batch_norm_args(norm, activated=True)


def _obstacle(pair: _Pair, shared: Set[nn.Module]) -> str | None:
    conv, norm = pair.conv, pair.norm
    args = _args_of(norm)
    if args is None:
        return intercepted(norm) or f"expected a batch normalisation, got {type(norm).__name__}"
    if args.batch_stats:
        return "it normalises with the batch's statistics"
    if not (is_conv(conv) or conv is pair.norm_parent):
        return f"{pair.conv_name}: expected a Conv2d, got {type(conv).__name__}"
    if intercepted(conv) is not None:
        return f"{pair.conv_name}: {intercepted(conv)}"
    if args.running_mean is None or args.running_mean.shape[0] != conv.out_channels:
        return f"it does not have the {conv.out_channels} features of {pair.conv_name}"
    if pair.norm_parent not in (conv, pair.conv_parent) and pair.conv_parent in shared:
        return f"{pair.conv_name}: its Sequential is used elsewhere too"
    return None


@torch.no_grad()
def _folded_conv(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    args = _args_of(norm)
    assert args is not None and args.running_mean is not None and args.running_var is not None

    def wide(tensor: Tensor | None, otherwise: float) -> Tensor:
        if tensor is None:
            return conv.weight.new_full((conv.out_channels,), otherwise, dtype=torch.float64)
        return tensor.double()

    scale = wide(args.weight, 1) * (args.running_var.double() + args.eps).rsqrt()
    bias = wide(args.bias, 0) + scale * (wide(conv.bias, 0) - args.running_mean)
    options: dict[str, Any] = {
        name: getattr(conv, name)
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    }
    folded = Conv2d(conv.in_channels, conv.out_channels, **options, device="meta")
    weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).to(conv.weight)
    folded.weight = nn.Parameter(weight.contiguous(memory_format=_format(conv.weight)), False)
    folded.bias = nn.Parameter(bias.to(conv.weight), False)
    folded.register_state_dict_pre_hook(_refuse_to_save)
    folded.register_load_state_dict_pre_hook(_refuse_to_load)
    return folded.train(conv.training)


def _refuse_to_save(conv: nn.Module, prefix: str, keep_vars: bool) -> None:
    # A state_dict with keep_vars is no checkpoint: exporters read a model's tensors by it.
    if not keep_vars:
        _refuse(prefix)


def _refuse_to_load(conv: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    _refuse(prefix)


def _refuse(prefix: str) -> NoReturn:
    name = prefix.removesuffix(".") or "this layer"
    raise RuntimeError(
        f"{name} is folded: unfuse first, with resnest_fused.unfuse(model), then save or load; "
        "checkpoints hold the original convolution and batch normalisation"
    )


def _format(weight: Tensor) -> torch.memory_format:
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
