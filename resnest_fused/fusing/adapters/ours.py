"""This package's own modules, whose fused classes are in ``modules.py``."""

from __future__ import annotations

from functools import partial

from resnest_fused import modules
from resnest_fused.fusing.adapters.base import BLOCK, STEM, Adapter

ADAPTER = Adapter(
    name="ours",
    attentions={
        "FusedSplitAttention": "resnest_fused.reference.SplitAttention",
        "FusedSplitAttentionConv2d": "resnest_fused.reference.SplitAttentionConv2d",
    },
    fused_class=partial(getattr, modules),
    folds={
        "resnest_fused.models.resnest.Bottleneck": BLOCK,
        "resnest_fused.models.resnest.ResNeSt": STEM,
    },
)
