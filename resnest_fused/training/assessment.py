"""The scores of any checkpoint on any data: of a run's with its options, of others' by name."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnest_fused import models
from resnest_fused.models import registry
from resnest_fused.training import checkpoints
from resnest_fused.training.augmentation import evaluation_transform
from resnest_fused.training.config import Config, ConfigError, make_config
from resnest_fused.training.datasets import find_evaluation_data
from resnest_fused.training.distributed import World
from resnest_fused.training.evaluation import Scores, evaluate
from resnest_fused.training.loading import evaluation_batches
from resnest_fused.training.loop import AMP
from resnest_fused.training.network import evaluation_size, fuse_as_asked


class Assessment(NamedTuple):
    """What was evaluated, and what came of it.

    Attributes:
        config: the options that counted.
        entry: which weights of the file; None for what it has by itself.
        classes: names of the data's classes.
        scores: of the network on the data.
    """

    config: Config
    entry: str | None
    classes: list[str]
    scores: Scores


def assess(
    weights: str,
    options: Mapping[str, Any],
    *,
    entry: str | None = None,
    device: torch.device | None = None,
) -> Assessment:
    """Evaluate a checkpoint.

    Example::

        found = assess("runs/digits/checkpoints/best.pt", {})
        found = assess("resnest50.pth", {"model": "resnest50", "data": "imagenet/val"})

    Args:
        weights: a checkpoint of a run, whose options count then; or one of any layout.
        options: of :class:`Config`, over those of the run; ``model`` may also be a peer's network,
            as of :func:`resnest_fused.models.create`.
        entry: which weights of the file, such as "model"; by default a run's moving average, if it
            has one.
        device: where; the CPU by default.

    Raises:
        ConfigError, CheckpointError: as the message says.
    """
    known = _options_of_run(weights)
    config = make_config(options={**known, **options})
    if entry is None and config.ema and known:
        entry = "ema"
    place = device or torch.device("cpu")
    checkpoint = models.read_checkpoint(weights, entry=entry)
    source, classes = find_evaluation_data(config)
    try:
        network = models.create(config.model, checkpoint, **config.options)
    except models.CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error
    fuse_as_asked(network, config, place)
    if config.model in models.list_models() or config.eval_crop:
        transform = evaluation_transform(evaluation_size(config), config.eval_ratio)
    else:
        transform = registry.preprocessing(config.model, network).transform
    memory = torch.channels_last if config.channels_last else torch.contiguous_format
    loader = evaluation_batches(source, transform, config, World(0, 1, place, False))
    count = models.checkpoints.num_classes(checkpoint.state) or len(classes)
    if count < len(classes):
        raise ConfigError(f"data: {len(classes)} classes, and the network has {count}")
    if count < 2:
        raise ConfigError("data: expected 2 classes or more, got 1")
    network.to(place, memory_format=memory)  # type: ignore[call-overload]
    scores = evaluate(network, loader, count, place, memory, AMP[config.amp])
    return Assessment(config, entry, classes, scores)


def _options_of_run(weights: str) -> dict[str, Any]:
    """The options of the run that wrote a checkpoint; none for other files.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not zipfile.is_zipfile(weights):
        return {}  # safetensors, torch's older format, a URL, or no checkpoint at all
    checkpoints.verify(Path(weights))
    try:
        found = checkpoints.read(Path(weights))["config"]
    except models.CheckpointError:
        return {}
    names = {field.name for field in dataclasses.fields(Config)}
    return {name: value for name, value in found.items() if name in names}
