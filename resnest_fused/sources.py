"""Builds the network that the command line names: ours, the official package's or timm's."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from resnest_fused import images, models

# Evaluation crops of the official models; all others use 224 pixels.
_OFFICIAL_SIZES = {"resnest101": 256, "resnest200": 320, "resnest269": 416}


class Source(NamedTuple):
    """A network, what turns an RGB picture into its input ``(3, size, size)``, and that size."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    size: int


def build(name: str, seed: int) -> Source:
    """Build a network from seeded random weights, its split attention unfused.

    Args:
        name: "resnest50", or another of ``models.list_models()``; "official:resnest50" and the like
            from the ``resnest`` package; "timm:resnest50d" and the like from timm.
        seed: of the initial weights.

    Raises:
        ValueError: no such model, or its package cannot be imported.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(name)


def _build(name: str) -> Source:
    origin, colon, rest = name.partition(":")
    if not colon:
        if name not in models.list_models():
            raise ValueError(
                f"unknown model {name!r}; known are {', '.join(models.list_models())}, "
                "official:NAME and timm:NAME"
            )
        return _ours(models.create(name, fused=False), 224)
    if origin == "official":
        # Both the PyPI release and the repository's later layout export the builders here.
        package = _import("resnest.torch", "--no-deps resnest==0.0.5")
        builder = getattr(package, rest, None)
        if not rest.startswith("resnest") or not inspect.isfunction(builder):
            raise ValueError(f"the official package has no model {rest!r}")
        return _ours(builder(), _OFFICIAL_SIZES.get(rest, 224))
    if origin == "timm":
        timm = _import("timm", "timm")
        if not timm.is_model(rest):
            raise ValueError(f"timm {timm.__version__} has no model {rest!r}")
        model = timm.create_model(rest)
        config = timm.data.resolve_model_data_config(model)
        return Source(model, timm.data.create_transform(**config), config["input_size"][-1])
    raise ValueError(f"unknown source {origin!r} in {name!r}; known are official and timm")


def _ours(model: nn.Module, size: int) -> Source:
    return Source(model, partial(images.preprocess, size=size), size)


def _import(module: str, requirement: str) -> Any:
    try:
        return importlib.import_module(module)
    # RuntimeError is what timm's import gives with a torchvision for another torch.
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"package {package} cannot be imported ({error}); try pip install {requirement}"
        ) from error


@torch.no_grad()
def randomize_norms(model: nn.Module, size: int, seed: int) -> None:
    """Give every BatchNorm2d seeded random parameters, and running statistics to match.

    As initialised, a network says little about its attention: running statistics are not those of
    its activations, and a zero gamma (timm's last norm in a block) hides the attention altogether.
    Here gamma is uniform in [0.5, 1.5] and beta normal with a standard deviation of 0.2. The
    running statistics are the mean and variance over all features of what reaches the norm when a
    random picture runs through, which keeps the differences between features, and makes the network
    as sensitive to a wrong attention as it is insensitive to rounding.

    Args:
        model: a network on (B, 3, size, size); left in eval mode.
        size: pixels of the random picture's side.
        seed: of the parameters and of the picture.
    """
    generator = torch.Generator().manual_seed(seed)

    def calibrate(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0])
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(variance)

    handles = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.2, generator=generator)
            handles.append(module.register_forward_pre_hook(calibrate))
    model.eval()(images.random_images(1, size, seed))
    for handle in handles:
        handle.remove()
