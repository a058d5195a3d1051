"""The ResNeSt models, by function or by name, and checkpoints from local files."""

from resnest_fused.models.checkpoints import CheckpointError, load_checkpoint
from resnest_fused.models.registry import create, list_models
from resnest_fused.models.resnest import ResNeSt, resnest50

__all__ = [
    "CheckpointError",
    "ResNeSt",
    "create",
    "list_models",
    "load_checkpoint",
    "resnest50",
]
