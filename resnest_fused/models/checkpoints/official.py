"""The official package's layout of keys, which timm's ResNeSts and this package's share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def num_classes(state: Mapping[str, Tensor]) -> int | None:
    """How many classes the classifier in a state_dict knows; None if it has no such classifier.

    Example::

        num_classes(models.resnest50(num_classes=10).state_dict())  # 10
    """
    weight = state.get("fc.weight")
    return len(weight) if weight is not None and weight.dim() == 2 and len(weight) else None
