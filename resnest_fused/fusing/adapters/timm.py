"""timm: its ``SplitAttn`` and its networks."""

from __future__ import annotations

from torch import Tensor

from resnest_fused.fusing.adapters.base import (
    BLOCK,
    STEM,
    Adapter,
    Network,
    PeerAttention,
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


def _build(name: str) -> Network:
    timm = import_peer("timm", "timm")
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}")
    model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    return Network(model, config["input_size"][-1], timm.data.create_transform(**config))


__getattr__ = fused_classes(__name__, _ATTENTIONS, TimmForward)
ADAPTER = Adapter("timm", _ATTENTIONS, __getattr__, _FOLDS, _build)
