"""The ResNeSt models, by function or by name, and checkpoints of every layout."""

from resnest_fused.models.checkpoints import (
    Checkpoint,
    CheckpointError,
    convert_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from resnest_fused.models.family import (
    resnest14,
    resnest26,
    resnest50,
    resnest50_fast_1s1x64d,
    resnest50_fast_1s2x40d,
    resnest50_fast_1s4x24d,
    resnest50_fast_2s1x64d,
    resnest50_fast_2s2x40d,
    resnest50_fast_4s1x64d,
    resnest50_fast_4s2x40d,
    resnest101,
    resnest152,
    resnest200,
    resnest269,
)
from resnest_fused.models.registry import backbone, create, list_models
from resnest_fused.models.resnest import ResNeSt
from resnest_fused.models.timm_entries import register_with_timm

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ResNeSt",
    "backbone",
    "convert_checkpoint",
    "create",
    "list_models",
    "load_checkpoint",
    "read_checkpoint",
    "resnest14",
    "resnest26",
    "resnest50",
    "resnest50_fast_1s1x64d",
    "resnest50_fast_1s2x40d",
    "resnest50_fast_1s4x24d",
    "resnest50_fast_2s1x64d",
    "resnest50_fast_2s2x40d",
    "resnest50_fast_4s1x64d",
    "resnest50_fast_4s2x40d",
    "resnest101",
    "resnest152",
    "resnest200",
    "resnest269",
    "save_checkpoint",
]

register_with_timm()
