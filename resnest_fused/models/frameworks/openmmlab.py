"""Registers the family with MMEngine, and so with MMDetection, MMPretrain and MMSegmentation.

In a config::

    custom_imports = dict(imports=["resnest_fused.models.frameworks.openmmlab"])
    model = dict(
        backbone=dict(
            _delete_=True,
            type="FusedResNeSt",
            name="resnest50",
            weights="resnest50-528c19ca.pth",
            out_indices=(0, 1, 2, 3),
            frozen_stages=1,
        ),
    )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from resnest_fused.models import registry
from resnest_fused.models.checkpoints import load_checkpoint
from resnest_fused.models.registry import Weights


@MODELS.register_module()
class FusedResNeSt(nn.Module):
    """A backbone of the family, by OpenMMLab's conventions.

    Args:
        name: one of :func:`resnest_fused.models.list_models`.
        weights: a checkpoint of any layout, read when the framework initialises its weights.
        out_indices: of the stages whose maps are returned, from 0 on.
        norm_eval: whether norms stay in eval mode in training.
        options: those of :class:`resnest_fused.models.ResNeSt`; ``dilation_style`` is "mm".
    """

    def __init__(
        self,
        name: str = "resnest50",
        weights: Weights | None = None,
        out_indices: Sequence[int] = (3,),
        norm_eval: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        indices = tuple(index + 1 for index in out_indices)
        options = {"dilation_style": "mm"} | options
        self.body = registry.backbone(name, out_indices=indices, **options)
        self.weights = weights
        self.norm_eval = norm_eval

    def init_weights(self) -> None:
        """Load the checkpoint; the framework calls it once, before training."""
        if self.weights is not None:
            load_checkpoint(self.body, self.weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` to the maps of ``out_indices``."""
        return tuple(self.body(x))

    def train(self, mode: bool = True) -> FusedResNeSt:
        """Set training mode, but for frozen stages and, with ``norm_eval``, norms."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self
