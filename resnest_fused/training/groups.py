"""Which parameters decay and at what learning rate they train, by their modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from resnest_fused.training.config import ConfigError

# Those of timm and others derive from these, or have none of the weights' names.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


def decays(module: nn.Module, name: str) -> bool:
    """Whether a module's own parameter has weight decay: no bias, and nothing of a norm.

    The module's type decides. Names do not tell: the norms of the stem and of the shortcuts are
    called ``conv1.1`` and ``downsample.2`` in the official layout.
    """
    return name != "bias" and not isinstance(module, NORMS)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_of: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The optimizer's groups: all trained parameters, by weight decay and learning rate.

    Example::

        optimizer = torch.optim.SGD(parameter_groups(model, 0.1, 1e-4, {"fc": 10}), momentum=0.9)

    Args:
        model: parameters that need no gradient are left out; shared ones count once.
        lr: the learning rate of what no part names.
        weight_decay: of the parameters that :func:`decays` tells of.
        lr_of: factors of ``lr`` by the name of a module; the longest name that fits counts.

    Returns:
        Groups with ``params``, ``names``, ``lr`` and ``weight_decay``, in the order of the model.

    Raises:
        ConfigError: the model has no such part.
    """
    factors = dict(lr_of or {})
    modules = dict(model.named_modules())
    for part in factors:
        if part not in modules:
            raise ConfigError(f"lr_of: the network has no part {part!r}")
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    seen = set()
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full = f"{prefix}.{name}".removeprefix(".")
            fits = [part for part in factors if f"{full}.".startswith(f"{part}.")]
            factor = factors[max(fits, key=len)] if fits else 1.0
            key = decays(module, name), factor
            empty = {
                "params": [],
                "names": [],
                "lr": lr * factor,
                "weight_decay": weight_decay if key[0] else 0.0,
            }
            group = groups.setdefault(key, empty)
            group["params"].append(parameter)
            group["names"].append(full)
    return list(groups.values())
