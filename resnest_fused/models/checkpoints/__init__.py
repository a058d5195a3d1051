"""Checkpoints from local files: how files are read, and one file for each layout of keys."""

from resnest_fused.models.checkpoints.files import (
    CheckpointError,
    load_checkpoint,
    load_state,
    read_checkpoint,
)
from resnest_fused.models.checkpoints.official import adapt_input, num_classes

__all__ = [
    "CheckpointError",
    "adapt_input",
    "load_checkpoint",
    "load_state",
    "num_classes",
    "read_checkpoint",
]
