"""Checkpoints: how files are read and written, and one file for each layout of keys."""

from resnest_fused.models.checkpoints.files import CheckpointError
from resnest_fused.models.checkpoints.loading import (
    LAYOUTS,
    Checkpoint,
    convert_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from resnest_fused.models.checkpoints.official import adapt_input, num_classes

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointError",
    "adapt_input",
    "convert_checkpoint",
    "load_checkpoint",
    "num_classes",
    "read_checkpoint",
    "save_checkpoint",
]
