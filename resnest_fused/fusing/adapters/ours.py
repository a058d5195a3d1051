"""This package's own modules, whose fused classes are in ``modules.py``."""

from __future__ import annotations

from resnest_fused.fusing.adapters.base import BLOCK, STEM, Adapter

ADAPTER = Adapter(
    name="ours",
    attentions=(
        "resnest_fused.reference.SplitAttention",
        "resnest_fused.reference.SplitAttentionConv2d",
    ),
    folds={
        "resnest_fused.models.resnest.Bottleneck": BLOCK,
        "resnest_fused.models.resnest.ResNeSt": STEM,
    },
)
