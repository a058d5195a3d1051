"""The network of a run: built, fused, and placed as the options say."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from resnest_fused import models
from resnest_fused.backends import choose
from resnest_fused.fusing import fuse
from resnest_fused.models.variants import VARIANTS
from resnest_fused.training.config import Config, ConfigError

# Of the network's options those that the run has under a name of its own, and that name.
_OWN = {
    "num_classes": "classes",
    "fused": "fuse",
    "drop_rate": "dropout",
    "drop_path_rate": "drop_path",
    "drop_block_rate": "drop_block",
    "zero_init_last": "zero_gamma",
    "frozen_stages": "frozen_stages",
}


def build_network(config: Config, classes: int, device: torch.device) -> models.ResNeSt:
    """The network in training mode, seeded by ``config.seed``.

    Raises:
        ConfigError: there is no such network, an option does not fit it or the device, or the
            weights cannot be read or do not fit.
    """
    if config.model not in models.list_models():
        known = ", ".join(models.list_models())
        raise ConfigError(f"model: expected one of {known}, got {config.model!r}")
    for name in config.options:
        if name in _OWN:
            raise ConfigError(f"options: {name} is set by the option {_OWN[name]}")
    options = {
        "num_classes": classes,
        "fused": False,
        "drop_rate": config.dropout,
        "drop_path_rate": config.drop_path,
        "drop_block_rate": config.drop_block,
        # Where the scripts have it that trained the published weights.
        "drop_block_style": "gluon",
        "zero_init_last": config.zero_gamma,
        "frozen_stages": config.frozen_stages,
        **config.options,
    }
    weights: models.Checkpoint | None = None
    leave_out: tuple[str, ...] = ()
    if config.weights:
        try:
            weights = models.read_checkpoint(config.weights)
        except models.CheckpointError as error:
            raise ConfigError(f"weights: {error}") from error
        head = weights.state.get("fc.weight")
        if head is None or head.shape[0] != classes:
            leave_out = ("fc",)
    torch.manual_seed(config.seed)
    try:
        network = models.create(config.model, weights, leave_out=leave_out, **options)
    except models.CheckpointError as error:
        raise ConfigError(f"weights: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"options: {error}") from error
    assert isinstance(network, models.ResNeSt)
    network.set_grad_checkpointing(config.checkpointing)
    fuse_as_asked(network, config, device)
    if config.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if config.channels_last:
        # Unpacked, as some torches have no type for a memory format alone.
        placed: dict[str, Any] = {"memory_format": torch.channels_last}
        network.to(**placed)
    return network.to(device).train()


def fuse_as_asked(network: nn.Module, config: Config, device: torch.device) -> None:
    """Fuse a network that is to run on a device, if the options say so.

    Raises:
        ConfigError: there is no such backend, or it cannot run there.
    """
    if config.fuse:
        try:
            choose(config.backend, torch.empty(1, device=device))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(str(error)) from error
        fuse(network, backend=config.backend)


def evaluation_size(config: Config) -> int:
    """Pixels of the side of pictures in evaluation: as asked for, or as published."""
    if config.eval_crop:
        return config.eval_crop
    variant = VARIANTS.get(config.model)
    return config.crop if variant is None else variant.size
