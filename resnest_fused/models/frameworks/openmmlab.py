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

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from resnest_fused.models import registry
from resnest_fused.models.checkpoints import Checkpoint, load_checkpoint, read_checkpoint
from resnest_fused.models.options import check_out_indices
from resnest_fused.models.registry import Weights


@MODELS.register_module()
class FusedResNeSt(nn.Module):
    """A backbone of the family, by OpenMMLab's conventions.

    Args:
        name: one of :func:`resnest_fused.models.list_models`.
        weights: a checkpoint of any layout, read when the framework initialises its weights.
        out_indices: of the stages whose maps are returned, from 0 on.
        norm_eval: whether norms stay in eval mode in training.
        sha256, leave_out: as of :func:`resnest_fused.models.create`.
        init_cfg: None, or the framework's own way to name ``weights``:
            ``dict(type="Pretrained", checkpoint=FILE)``, with ``prefix`` if it has one.
        options: those of :class:`resnest_fused.models.ResNeSt`; ``dilation_style`` is "mm". With
            ``in_chans`` the checkpoint's first convolution is adapted.

    Raises:
        ValueError: an argument has a wrong value; the message names it.
    """

    def __init__(
        self,
        name: str = "resnest50",
        weights: Weights | None = None,
        out_indices: Sequence[int] = (3,),
        norm_eval: bool = False,
        *,
        sha256: str | None = None,
        leave_out: Sequence[str] = (),
        init_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(out_indices, Mapping):
            raise ValueError(f"out_indices: expected numbers of stages, got {out_indices!r}")
        indices = tuple(index + 1 for index in check_out_indices(out_indices, range(4)))
        options = {"dilation_style": "mm"} | options
        self.body = registry.backbone(name, out_indices=indices, **options)
        self.weights, self.prefix = weights, None
        if init_cfg is not None:
            if weights is not None:
                raise ValueError("init_cfg: expected None beside weights")
            self.weights, self.prefix = _pretrained(init_cfg)
        self.sha256 = sha256
        self.leave_out = leave_out
        self.in_chans = options.get("in_chans")
        self.norm_eval = norm_eval

    def init_weights(self) -> None:
        """Load the checkpoint; the framework calls it once, before training.

        Raises:
            CheckpointError: the file cannot be read or does not fit.
        """
        checkpoint = self.weights
        if checkpoint is None:
            return
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = read_checkpoint(checkpoint, sha256=self.sha256, prefix=self.prefix)
        load_checkpoint(self.body, checkpoint, leave_out=self.leave_out, in_chans=self.in_chans)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(B, in_chans, H, W)`` to the maps of ``out_indices``."""
        return tuple(self.body(x))

    def train(self, mode: bool = True) -> FusedResNeSt:
        """Set training mode, but for frozen stages and, with ``norm_eval``, norms."""
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _pretrained(init_cfg: Any) -> tuple[str, str | None]:
    """The file that MMEngine's config of an initialisation names, and the prefix in it."""
    given = dict(init_cfg) if isinstance(init_cfg, Mapping) else {}
    kind, checkpoint, prefix = (given.pop(key, None) for key in ("type", "checkpoint", "prefix"))
    given.pop("map_location", None)  # weights are copied to where the network is
    if kind != "Pretrained" or checkpoint is None or given:
        raise ValueError(
            f"init_cfg: expected None or dict(type='Pretrained', checkpoint=FILE), got {init_cfg!r}"
        )
    return checkpoint, None if prefix is None else f"{prefix.removesuffix('.')}."
