"""The family in timm's registry, as ``fused_NAME``, as soon as timm is imported.

timm is imported by its users only: it takes seconds and needs a torchvision. ``import
resnest_fused`` is enough for ``timm.create_model("fused_resnest50d")``, before or after it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnest_fused.importing import when_imported
from resnest_fused.models.resnest import STAGES, ResNeSt
from resnest_fused.models.variants import VARIANTS, Variant

# What timm's own builders of these networks set, or do.
_DEFAULTS = {"dilation_style": "timm", "drop_block_style": "timm", "zero_init_last": True}

# timm reads these two from the module of an entry.
__all__: list[str] = []
default_cfgs: dict[str, Any] = {}


class TimmResNeSt(ResNeSt):
    """A network of the family with the methods that timm calls on its own models.

    Example::

        from timm.optim import create_optimizer_v2

        model = timm.create_model("fused_resnest50d")
        optimizer = create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.7)
        maps = model.forward_intermediates(x, indices=(1, 3), intermediates_only=True)
    """

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of names, by which timm groups parameters: the stem, each block or stage."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": blocks}

    def get_classifier(self, name_only: bool = False) -> Any:
        """The layer that makes the logits, or its name."""
        return "fc" if name_only else super().get_classifier()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """``(B, in_chans, H, W)`` to the last map and a list of those asked for, 0 the stem's.

        Args:
            x: the pictures.
            indices: of the maps; a number for so many last ones, None for all five.
            norm: nothing here, as each map is behind its norm.
            stop_early: whether stages behind the last map asked for are not run.
            output_fmt: "NCHW".
            intermediates_only: whether only the list is returned.

        Raises:
            ValueError: another ``output_fmt``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        taken, last = _take(len(self.feature_info), indices)
        maps = []
        for index in range(last + 1 if stop_early else len(self.feature_info)):
            x = self._run(index, x)
            if index in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Take away what the maps do not need, and the classifier; returns the maps' indices."""
        taken, last = _take(len(self.feature_info), indices)
        for name in STAGES[last:]:
            setattr(self, name, nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()
        if last < len(STAGES):
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < len(STAGES):
            self.reset_classifier(0, "")
        return taken


def _take(count: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """The indices that timm's own models would take of so many, and the largest."""
    features = importlib.import_module("timm.models._features")
    return features.feature_take_indices(count, indices)


def register_with_timm() -> None:
    """Enter the family into timm's registry, now or when timm is imported.

    Example::

        import resnest_fused, timm

        model = timm.create_model("fused_resnest50d", features_only=True)
    """
    when_imported("timm.models", _register)


def _register(timm: Any) -> None:
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
            model = models.build_model_with_cfg(TimmResNeSt, name, pretrained, **options)
        return model.to(dtype=dtype)

    build.__name__ = build.__qualname__ = name
    return build
