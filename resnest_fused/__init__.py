"""Fused Split-Attention for ResNeSt (arXiv:2004.08955): one op, forward and backward."""

from resnest_fused import models
from resnest_fused.backends import BackendStatus, backends, use_backend
from resnest_fused.functional import split_attention
from resnest_fused.fusing import FuseEntry, FuseReport, VerifyReport, fuse, unfuse, verify
from resnest_fused.modules import FusedSplitAttention, FusedSplitAttentionConv2d
from resnest_fused.reference import BatchNormArgs, SplitAttention, SplitAttentionConv2d

__all__ = [
    "BackendStatus",
    "BatchNormArgs",
    "FuseEntry",
    "FuseReport",
    "FusedSplitAttention",
    "FusedSplitAttentionConv2d",
    "SplitAttention",
    "SplitAttentionConv2d",
    "VerifyReport",
    "backends",
    "fuse",
    "models",
    "split_attention",
    "unfuse",
    "use_backend",
    "verify",
]
__version__ = "0.1.0"
