"""MMPretrain and MMDetection, whose ``SplitAttentionConv2d`` is proven like any other class."""

from __future__ import annotations

from typing import Any

from resnest_fused.fusing.adapters.base import Adapter, Pairs

# Properties, since each norm is a child named by its type.
_BLOCK: Pairs = (("conv1", "norm1"), ("conv3", "norm3"))


def _of_conv_module(module: Any) -> Pairs:
    """MMCV's convolution with a norm, in MMPretrain's stem, unless another order is asked for."""
    in_order = module.order == ("conv", "norm", "act")
    # This option lets the convolution read the norm's statistics.
    return (("conv", "norm"),) if in_order and not module.efficient_conv_bn_eval_forward else ()


ADAPTER = Adapter(
    name="openmmlab",
    folds={
        "mmpretrain.models.backbones.resnest.Bottleneck": _BLOCK,
        "mmdet.models.backbones.resnest.Bottleneck": _BLOCK,
        "mmcv.cnn.bricks.conv_module.ConvModule": _of_conv_module,
    },
)
