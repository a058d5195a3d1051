"""timm: its ``SplitAttn`` and its networks."""

from __future__ import annotations

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

# Of MobileNets and EfficientNets.
_DEPTHWISE = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
_INVERTED = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))

_FOLDS = {
    "timm.models.resnest.ResNestBottleneck": BLOCK,
    "timm.models.resnet.ResNet": STEM,
    "timm.layers.conv_bn_act.ConvNormAct": (("conv", "bn"),),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": _DEPTHWISE,
    "timm.models._efficientnet_blocks.InvertedResidual": _INVERTED,
    "timm.models.efficientnet.EfficientNet": (("conv_stem", "bn1"), ("conv_head", "bn2")),
}


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


ADAPTER = Adapter(
    name="timm",
    attentions=("timm.layers.split_attn.SplitAttn",),
    r_softmaxes=("timm.layers.split_attn.RadixSoftmax",),
    folds=_FOLDS,
    networks=_Networks,
)
