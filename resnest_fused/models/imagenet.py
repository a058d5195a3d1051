"""The names of ImageNet's 1000 classes, in the order in which networks number them."""

from __future__ import annotations

import functools
from importlib import resources


@functools.cache
def class_names() -> tuple[str, ...]:
    """The names, of which some classes share one ("crane", "maillot").

    They are those of torchvision; its licence is in the first lines of ``imagenet_classes.txt``.

    Example::

        class_names()[985]  # 'daisy'
    """
    text = resources.files("resnest_fused.models").joinpath("imagenet_classes.txt").read_text()
    return tuple(line for line in text.splitlines() if not line.startswith("#"))
