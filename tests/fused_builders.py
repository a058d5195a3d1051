"""A pytest plugin for other packages' own tests: whatever their builders return is fused.

The packages' builders are replaced before their tests import them. ``FUSED_BUILDERS=0`` leaves the
models as they are, for comparison.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import resnest_fused as rf

fused_modules = 0


def fuse(model: Any) -> Any:
    global fused_modules
    if isinstance(model, nn.Module) and os.environ.get("FUSED_BUILDERS") != "0":
        fused_modules += len(rf.fuse(model))
    return model


def fusing(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def built(*args: Any, **kwargs: Any) -> Any:
        return fuse(build(*args, **kwargs))

    return built


def replace_timm() -> None:
    package = importlib.import_module("timm")
    package.create_model = package.models.create_model = fusing(package.create_model)


def replace_segmentation_models() -> None:
    """Its models get a ResNeSt for the encoder that its tests download."""
    package = importlib.import_module("segmentation_models_pytorch")
    package.encoders.get_encoder = fusing(package.encoders.get_encoder)
    create = package.create_model

    def create_with_resnest(arch: str, encoder_name: str = "", **options: Any) -> Any:
        options["encoder_weights"] = None
        return fuse(create(arch, "timm-resnest14d", **options))

    package.create_model = create_with_resnest


def replace_official() -> None:
    """Its networks get no weights, whose links are dead."""
    package = importlib.import_module("resnest.torch")
    for name, build in inspect.getmembers(package, inspect.isfunction):
        setattr(package, name, lambda *_, build=build, **__: fuse(build()))
    kind = importlib.import_module("resnest.torch.models.splat").SplAtConv2d
    initialise = kind.__init__

    @functools.wraps(initialise)
    def initialise_and_fuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        fuse(self)

    kind.__init__ = initialise_and_fuse


# By a folder that is at the root of the package's sources.
REPLACE = {
    "timm": replace_timm,
    "segmentation_models_pytorch": replace_segmentation_models,
    "resnest": replace_official,
}


def pytest_configure(config: pytest.Config) -> None:
    for folder, replace in REPLACE.items():
        if (config.rootpath / folder).is_dir():
            replace()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    print(f"\nfused modules: {fused_modules}")
