"""The official ``resnest`` package: its ``SplAtConv2d`` and its networks."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from resnest_fused.fusing.adapters.base import (
    BLOCK,
    STEM,
    Adapter,
    Networks,
    PeerAttention,
    Transform,
    fused_classes,
    import_peer,
)
from resnest_fused.modules import fused_attention

# The release on PyPI has the first of two paths, the repository's later layout the second.
_ATTENTIONS = {
    "FusedSplAtConv2d": "resnest.torch.splat.SplAtConv2d",
    "FusedModelsSplAtConv2d": "resnest.torch.models.splat.SplAtConv2d",
}
_FOLDS = {
    "resnest.torch.resnet.Bottleneck": BLOCK,
    "resnest.torch.models.resnet.Bottleneck": BLOCK,
    "resnest.torch.resnet.ResNet": STEM,
    "resnest.torch.models.resnet.ResNet": STEM,
}
# The crops that the models are evaluated on; 224 pixels for all others.
_SIZES = {"resnest101": 256, "resnest200": 320, "resnest269": 416}


class OfficialForward(PeerAttention):
    """The forward of ``SplAtConv2d``, by the fused op."""

    r_softmaxes = ("resnest.torch.splat.rSoftMax", "resnest.torch.models.splat.rSoftMax")
    cardinality: int
    use_bn: bool
    dropblock_prob: float
    relu: nn.Module

    def _fused_forward(self, x: Tensor) -> Tensor:
        return fused_attention(
            self.conv(x),
            bn0=self.bn0 if self.use_bn else None,
            drop=self.dropblock if self.dropblock_prob > 0 else None,
            act0=self.relu,
            fc1=self.fc1,
            bn1=self.bn1 if self.use_bn else None,
            act1=self.relu,
            fc2=self.fc2,
            softmax=self.rsoftmax,
            r_softmaxes=self.r_softmaxes,
            radix=self.radix,
            cardinality=self.cardinality,
            backend=self.backend,
        )


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


__getattr__ = fused_classes(__name__, _ATTENTIONS, OfficialForward)
ADAPTER = Adapter("official", _ATTENTIONS, __getattr__, _FOLDS, _Networks)
