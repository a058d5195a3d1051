"""The networks of the family, each by a function: the table's options, and any other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from resnest_fused.models.options import OutIndices, check_known
from resnest_fused.models.resnest import ResNeSt
from resnest_fused.models.variants import VARIANTS, Variant

_EVERY_MAP = (0, 1, 2, 3, 4)
_KNOWN = tuple(inspect.signature(ResNeSt).parameters)


def _builder(variant: Variant) -> Callable[..., ResNeSt]:
    def build(
        num_classes: int = 1000,
        *,
        features_only: bool = False,
        out_indices: OutIndices | None = None,
        fused: bool = True,
        **options: Any,
    ) -> ResNeSt:
        check_known(options, _KNOWN)
        if features_only and out_indices is None:
            out_indices = _EVERY_MAP
        options = variant.options | options
        return ResNeSt(num_classes=num_classes, out_indices=out_indices, fused=fused, **options)

    published = f", published top-1 {variant.top1:.2f} %" if variant.top1 else ""
    build.__name__ = build.__qualname__ = variant.name
    build.__doc__ = f"""{variant.name}: {variant.parameters / 1e6:.2f} M parameters, \
{variant.macs / 1e9:.2f} GMACs at {variant.size} pixels{published}.

    The layout is the official package's: its checkpoints load strictly, and the other way round.
    ``fused`` changes neither parameters nor state_dict.

    Example::

        model = {variant.name}(num_classes=10)
        logits = model.eval()(torch.randn(1, 3, 224, 224))

    Args:
        num_classes: number of logits.
        features_only: a backbone that returns the maps of ``out_indices``, by default all five.
        out_indices: which maps, as of :class:`ResNeSt`; makes it a backbone too.
        fused: True runs each split attention as one op (:class:`FusedSplitAttentionConv2d`), until
            ``resnest_fused.unfuse``; False builds the plain PyTorch reference, which
            ``resnest_fused.fuse`` can fuse later.
        options: those of :class:`ResNeSt`, in place of the table's.

    Returns:
        The model, freshly initialised, in training mode.

    Raises:
        ValueError: there is no such option, or it has a wrong value; the message names it.
    """
    return build


BUILDERS = {name: _builder(variant) for name, variant in VARIANTS.items()}

resnest14 = BUILDERS["resnest14"]
resnest26 = BUILDERS["resnest26"]
resnest50 = BUILDERS["resnest50"]
resnest101 = BUILDERS["resnest101"]
resnest152 = BUILDERS["resnest152"]
resnest200 = BUILDERS["resnest200"]
resnest269 = BUILDERS["resnest269"]
resnest50_fast_1s1x64d = BUILDERS["resnest50_fast_1s1x64d"]
resnest50_fast_2s1x64d = BUILDERS["resnest50_fast_2s1x64d"]
resnest50_fast_4s1x64d = BUILDERS["resnest50_fast_4s1x64d"]
resnest50_fast_1s2x40d = BUILDERS["resnest50_fast_1s2x40d"]
resnest50_fast_2s2x40d = BUILDERS["resnest50_fast_2s2x40d"]
resnest50_fast_4s2x40d = BUILDERS["resnest50_fast_4s2x40d"]
resnest50_fast_1s4x24d = BUILDERS["resnest50_fast_1s4x24d"]
