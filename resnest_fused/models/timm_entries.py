"""Enters the family into timm's registry, as ``fused_NAME``, as soon as timm is imported.

timm is imported by its users only: it takes seconds and needs a torchvision. So an import hook
waits for it, and ``import resnest_fused`` is enough for ``timm.create_model("fused_resnest50d")``.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections import deque
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import nn

from resnest_fused.models.resnest import ResNeSt
from resnest_fused.models.variants import VARIANTS, Variant

_HOME = "timm.models"
# What timm's own builders of these networks set, or do.
_DEFAULTS = {"dilation_style": "timm", "drop_block_style": "timm", "zero_init_last": True}

# timm reads these two from the module of an entry.
__all__: list[str] = []
default_cfgs: dict[str, Any] = {}


class _WaitForTimm(MetaPathFinder):
    """Finds timm's models as always, but once they are imported adds ours."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _HOME:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_timm() -> None:
    """Enter the family into timm's registry, now or when timm is imported.

    Example::

        import resnest_fused, timm

        model = timm.create_model("fused_resnest50d", features_only=True)
    """
    if _HOME in sys.modules:
        _register()
    elif not any(isinstance(finder, _WaitForTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForTimm())


def _register() -> None:
    timm: Any = sys.modules[_HOME]
    for variant in VARIANTS.values():
        name = f"fused_{variant.timm}"
        if timm.is_model(name):
            continue
        # A fused network takes timm's weights for the unfused one.
        if timm.is_model(variant.timm):
            cfg = timm.get_pretrained_cfg(variant.timm)
        else:
            size = {"input_size": (3, variant.size, variant.size), "first_conv": "conv1.0"}
            cfg = timm.PretrainedCfg(**size, pool_size=(variant.size // 32,) * 2, classifier="fc")
        cfg, tag = dataclasses.replace(cfg, architecture=name), cfg.tag or ""
        default_cfgs[name] = timm.DefaultCfg(tags=deque([tag]), cfgs={tag: cfg})
        timm.register_model(_entry(name, variant))


def _entry(name: str, variant: Variant) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        models, layers = (importlib.import_module(f"timm.{part}") for part in ("models", "layers"))
        if "act_layer" in options:
            options["act_layer"] = layers.get_act_layer(options["act_layer"])
        if "norm_layer" in options:
            options["norm_layer"] = layers.get_norm_layer(options["norm_layer"])
        # Where timm's own models make their parameters, and of what type.
        place = torch.device(options.pop("device", None) or torch.get_default_device())
        dtype = options.pop("dtype", None)
        options = _DEFAULTS | variant.options | options
        with place:
            model = models.build_model_with_cfg(ResNeSt, name, pretrained, **options)
        return model.to(dtype=dtype)

    build.__name__ = build.__qualname__ = name
    return build
