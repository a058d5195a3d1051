"""timm: its ``SplitAttn`` and its networks."""

from __future__ import annotations

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

_ATTENTIONS = {"FusedSplitAttn": "timm.layers.split_attn.SplitAttn"}
_FOLDS = {
    "timm.models.resnest.ResNestBottleneck": BLOCK,
    "timm.models.resnet.ResNet": STEM,
}


class TimmForward(PeerAttention):
    """The forward of ``SplitAttn``, by the fused op."""

    r_softmaxes = ("timm.layers.split_attn.RadixSoftmax",)

    def _fused_forward(self, x: Tensor) -> Tensor:
        return fused_attention(
            self.conv(x),
            bn0=self.bn0,
            drop=self.drop,
            act0=self.act0,
            fc1=self.fc1,
            bn1=self.bn1,
            act1=self.act1,
            fc2=self.fc2,
            softmax=self.rsoftmax,
            r_softmaxes=self.r_softmaxes,
            radix=self.radix,
            # Only timm's own softmax holds it, and only with that softmax is it used.
            cardinality=getattr(self.rsoftmax, "cardinality", 1),
            backend=self.backend,
        )


class _Networks(Networks):
    def __init__(self) -> None:
        self._package = import_peer("timm", "timm")

    def title(self) -> str:
        return f"timm {self._package.__version__}"

    def names(self) -> list[str]:
        return self._package.list_models()

    def has(self, name: str) -> bool:
        # Names may have a tag for pretrained weights, which the list leaves out.
        return self._package.is_model(name)

    def build(self, name: str, options: dict[str, Any]) -> nn.Module:
        return self._package.create_model(name, **options)

    def preprocessing(self, name: str, model: nn.Module) -> tuple[int, Transform | None]:
        data = self._package.data
        config = data.resolve_model_data_config(model)
        return config["input_size"][-1], data.create_transform(**config)


__getattr__ = fused_classes(__name__, _ATTENTIONS, TimmForward)
ADAPTER = Adapter("timm", _ATTENTIONS, __getattr__, _FOLDS, _Networks)
