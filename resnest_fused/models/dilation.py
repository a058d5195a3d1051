"""What the stages of a network do in place of a stride, by the rules of its different authors."""

from __future__ import annotations

from typing import NamedTuple

from resnest_fused.models.options import check_choice

STYLES = ("official", "timm", "mm")
OUTPUT_STRIDES = (8, 16, 32)


class StagePlan(NamedTuple):
    """How one stage keeps or halves the size of the map.

    Attributes:
        stride: of its first block.
        first_dilation: of the 3x3 convolution of its first block.
        dilation: of those of its other blocks.
        avd: whether the first block has the average pooling beside its attention.
        same_pool: whether the first block's shortcut is smoothed by a 2x2 pooling with stride 1.
    """

    stride: int
    first_dilation: int
    dilation: int
    avd: bool
    same_pool: bool


def plan_stages(output_stride: int, style: str) -> list[StagePlan]:
    """The plans of the four stages, so that the last one has this stride towards the input.

    A stage that has to keep the map's size doubles the dilation of its convolutions. Three rules
    for its first block are in use. The weights are the same, the logits are not:

    - "official": the dilation before, a 3x3 average pooling with stride 1, a plain shortcut.
    - "timm": the dilation before, no such pooling, a shortcut with a 2x2 average pooling.
    - "mm", for MMPretrain, MMDetection and detectron2: the new dilation, no such pooling, a plain
      shortcut.

    Example::

        plan_stages(16, "official")[3]  # StagePlan(stride=1, first_dilation=1, dilation=2, ...)

    Raises:
        ValueError: there is no such stride or style.
    """
    check_choice(OUTPUT_STRIDES, output_stride=output_stride)
    check_choice(STYLES, dilation_style=style)
    plans = [StagePlan(1, 1, 1, avd=False, same_pool=False)]
    reached, dilation = 4, 1
    for _ in range(3):
        if reached < output_stride:
            reached *= 2
            plans.append(StagePlan(2, 1, 1, avd=True, same_pool=False))
            continue
        before, dilation = dilation, 2 * dilation
        first = dilation if style == "mm" else before
        plans.append(
            StagePlan(1, first, dilation, avd=style == "official", same_pool=style == "timm")
        )
    return plans
