"""pytorchcv, whose ``SAConvBlock`` is proven like any other class."""

from __future__ import annotations

from resnest_fused.fusing.adapters.base import Adapter

ADAPTER = Adapter(
    name="pytorchcv",
    folds={"pytorchcv.models.common.conv.ConvBlock": (("conv", "bn"),)},
)
