"""The official ``resnest`` package: its ``SplAtConv2d`` and its networks."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from resnest_fused.fusing.adapters.base import (
    BLOCK,
    STEM,
    Adapter,
    Networks,
    Transform,
    import_peer,
)

# The release on PyPI has the first of two paths, the repository's later layout the second.
_ATTENTIONS = ("resnest.torch.splat.SplAtConv2d", "resnest.torch.models.splat.SplAtConv2d")
_R_SOFTMAXES = ("resnest.torch.splat.rSoftMax", "resnest.torch.models.splat.rSoftMax")
_FOLDS = {
    "resnest.torch.resnet.Bottleneck": BLOCK,
    "resnest.torch.models.resnet.Bottleneck": BLOCK,
    "resnest.torch.resnet.ResNet": STEM,
    "resnest.torch.models.resnet.ResNet": STEM,
}
# The crops that the models are evaluated on; 224 pixels for all others.
_SIZES = {"resnest101": 256, "resnest200": 320, "resnest269": 416}


class _Networks(Networks):
    def __init__(self) -> None:
        # Both layouts export the builders here.
        self._package = import_peer("resnest.torch", "--no-deps resnest==0.0.5")

    def title(self) -> str:
        return "the official package"

    def names(self) -> list[str]:
        functions = inspect.getmembers(self._package, inspect.isfunction)
        return [name for name, _ in functions if name.startswith("resnest")]

    def build(self, name: str, options: dict[str, Any]) -> nn.Module:
        return getattr(self._package, name)(**options)

    def preprocessing(self, name: str, model: nn.Module) -> tuple[int, Transform | None]:
        return _SIZES.get(name, 224), None


ADAPTER = Adapter("official", _ATTENTIONS, _R_SOFTMAXES, _FOLDS, _Networks)
