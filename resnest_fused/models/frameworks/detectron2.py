"""Registers the family's backbones with detectron2, plain and with a feature pyramid.

After ``import resnest_fused.models.frameworks.detectron2``::

    MODEL:
      BACKBONE: {NAME: "build_fused_resnest_fpn_backbone", FREEZE_AT: 2}
      RESNETS: {DEPTH: 50, OUT_FEATURES: ["res2", "res3", "res4", "res5"]}
      FPN: {IN_FEATURES: ["res2", "res3", "res4", "res5"]}

Weights of a backbone alone are loaded after ``model = build_model(cfg)``, from any layout, by
``resnest_fused.models.load_checkpoint(model.backbone.bottom_up.body, "resnest50.pth")``.
"""

from __future__ import annotations

from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor

from resnest_fused.models import registry

_FEATURES = ("stem", "res2", "res3", "res4", "res5")


class FusedResNeStBackbone(Backbone):
    """A backbone of the family with detectron2's names for its maps.

    Args:
        name: one of :func:`resnest_fused.models.list_models`.
        out_features: of "stem" (stride 2) and "res2" to "res5".
        options: those of :class:`resnest_fused.models.ResNeSt`; ``dilation_style`` is "mm".
    """

    def __init__(self, name: str, out_features: list[str], **options: Any) -> None:
        super().__init__()
        indices = {_FEATURES.index(feature): feature for feature in out_features}
        options = {"dilation_style": "mm"} | options
        self.body = registry.backbone(name, out_indices=indices, **options)
        self._out_features = list(out_features)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``(B, 3, H, W)`` to maps by their names."""
        return self.body(x)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        found = {}
        for index, feature in enumerate(_FEATURES):
            if feature in self._out_features:
                info = self.body.feature_info[index]
                found[feature] = ShapeSpec(channels=info["num_chs"], stride=info["reduction"])
        return found


@BACKBONE_REGISTRY.register()
def build_fused_resnest_backbone(cfg: Any, input_shape: ShapeSpec) -> FusedResNeStBackbone:
    """From a config: depth, features and dilation of ``MODEL.RESNETS``, and ``FREEZE_AT``."""
    resnets = cfg.MODEL.RESNETS
    return FusedResNeStBackbone(
        f"resnest{resnets.DEPTH}",
        list(resnets.OUT_FEATURES),
        in_chans=input_shape.channels,
        output_stride=32 // resnets.RES5_DILATION,
        # detectron2 counts the stem as the first stage, the other peers as number 0.
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT - 1,
    )


@BACKBONE_REGISTRY.register()
def build_fused_resnest_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> FPN:
    """The same below a feature pyramid: also ``MODEL.FPN``."""
    fpn = cfg.MODEL.FPN
    return FPN(
        bottom_up=build_fused_resnest_backbone(cfg, input_shape),
        in_features=list(fpn.IN_FEATURES),
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )
