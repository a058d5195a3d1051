"""MMPretrain and MMDetection, whose ``SplitAttentionConv2d`` is proven like any other class."""

from __future__ import annotations

from resnest_fused.fusing.adapters.base import Adapter, Pairs

# Properties, since each norm is a child named by its type.
_BLOCK: Pairs = (("conv1", "norm1"), ("conv3", "norm3"))

ADAPTER = Adapter(
    name="openmmlab",
    folds={
        "mmpretrain.models.backbones.resnest.Bottleneck": _BLOCK,
        "mmdet.models.backbones.resnest.Bottleneck": _BLOCK,
    },
)
