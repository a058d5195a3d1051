"""ResNeSt in its official layout: the same state_dict keys, order, shapes and numbers."""

# No annotations as strings here: pickle wants their objects in a network that torch.fx traced.

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_fused.modules import FusedSplitAttentionConv2d
from resnest_fused.reference import NormLayer, SplitAttentionConv2d
from resnest_fused.tracing import as_one_node, is_traced

_EXPANSION = 4


class _AvgPool2d(torch.autograd.Function):
    """3x3 average pooling with padding 1, which saves its input's shape and not the input.

    It is for contiguous maps only, because the gradient has the input's memory format.
    """

    @staticmethod
    def forward(x: Tensor, stride: int) -> Tensor:
        return F.avg_pool2d(x, 3, stride, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.stride = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        # ATen's backward reads nothing of the input but its shape.
        shaped = dout.new_empty(()).expand(ctx.shape)
        dx = torch.ops.aten.avg_pool2d_backward(
            dout, shaped, [3, 3], [ctx.stride] * 2, [1, 1], False, True, None
        )
        return dx, None


class _Avd(nn.Module):
    """The average pooling behind the attention of a strided block."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, ceil(H/stride), ceil(W/stride))``."""
        if is_traced(x):
            return as_one_node(self, x)
        if x.is_contiguous():
            return _AvgPool2d.apply(x, self.stride)
        return F.avg_pool2d(x, 3, self.stride, padding=1)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class Bottleneck(nn.Module):
    """1x1 conv -> 3x3 split attention -> average pool -> 1x1 conv, added to the shortcut.

    ``(B, in_channels, H, W)`` to ``(B, 4*planes, ceil(H/stride), ceil(W/stride))``. The pooling
    behind the attention has the stride, not the convolution. With stride 1 there is no pooling.

    Example::

        block = Bottleneck(256, 64, FusedSplitAttentionConv2d, nn.BatchNorm2d)

    Args:
        in_channels: channels of the input.
        planes: width of the block inside.
        attention: :class:`FusedSplitAttentionConv2d` or :class:`SplitAttentionConv2d`.
        norm_layer: called with a number of features to make each norm.
        stride: of the whole block.
        downsample: the shortcut's map to the output's shape; None for the identity.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        attention: type[SplitAttentionConv2d],
        norm_layer: NormLayer,
        stride: int = 1,
        downsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = norm_layer(planes)
        self.conv2 = attention(planes, planes, 3, padding=1, norm_layer=norm_layer)
        self.avd_layer = _Avd(stride) if stride > 1 else None
        self.conv3 = nn.Conv2d(planes, planes * _EXPANSION, 1, bias=False)
        self.bn3 = norm_layer(planes * _EXPANSION)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, 4*planes, ceil(H/stride), ceil(W/stride))``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        if self.avd_layer is not None:
            out = self.avd_layer(out)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNeSt(nn.Module):
    """A ResNeSt classifier (arXiv:2004.08955): deep stem, four stages, global pooling, one FC.

    ``(B, 3, H, W)`` to logits ``(B, num_classes)``. Radix is 2 and cardinality 1. The changes to
    ResNet are those that the paper adopts: three 3x3 convolutions as the stem, and average pooling
    in strided blocks and in their shortcuts. Convolutions start normal with variance 2/fan_out, so
    one seed gives the official model's initial weights.

    Example::

        model = ResNeSt((3, 4, 6, 3), stem_width=32, num_classes=10)

    Args:
        layers: blocks in each of the four stages.
        stem_width: channels of the stem's first two convolutions; the third has twice as many.
        num_classes: number of logits.
        norm_layer: called with a number of features to make each norm.
        fused: whether the attention runs as one op, see :func:`resnest50`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        stem_width: int,
        num_classes: int = 1000,
        *,
        norm_layer: NormLayer = nn.BatchNorm2d,
        fused: bool = True,
    ) -> None:
        super().__init__()
        attention = FusedSplitAttentionConv2d if fused else SplitAttentionConv2d
        channels = 2 * stem_width
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, stem_width, 3, stride=2, padding=1, bias=False),
            norm_layer(stem_width),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False),
            norm_layer(stem_width),
            nn.ReLU(inplace=True),
            nn.Conv2d(stem_width, channels, 3, padding=1, bias=False),
        )
        self.bn1 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        def stage(blocks: int, planes: int, stride: int) -> nn.Sequential:
            nonlocal channels
            made = []
            for index in range(blocks):
                first = index == 0
                made.append(
                    Bottleneck(
                        channels,
                        planes,
                        attention,
                        norm_layer,
                        stride if first else 1,
                        _shortcut(channels, planes, norm_layer, stride) if first else None,
                    )
                )
                channels = planes * _EXPANSION
            return nn.Sequential(*made)

        self.layer1 = stage(layers[0], 64, stride=1)
        self.layer2 = stage(layers[1], 128, stride=2)
        self.layer3 = stage(layers[2], 256, stride=2)
        self.layer4 = stage(layers[3], 512, stride=2)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _shortcut(in_channels: int, planes: int, norm_layer: NormLayer, stride: int) -> nn.Sequential:
    # The official layout pools at stride 1, too, by 1x1. So the keys begin at 1 there as well.
    return nn.Sequential(
        nn.Identity()
        if stride == 1
        else nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(in_channels, planes * _EXPANSION, 1, bias=False),
        norm_layer(planes * _EXPANSION),
    )


def resnest50(
    num_classes: int = 1000, *, norm_layer: NormLayer = nn.BatchNorm2d, fused: bool = True
) -> ResNeSt:
    """ResNeSt-50: 27.5 M parameters, 5.4 GMACs at 224 pixels, published top-1 81.03 %.

    The layout is the official ``resnest50``'s: its checkpoints load strictly, and the other way
    round. ``fused`` changes neither parameters nor state_dict.

    Example::

        model = resnest50(num_classes=10)
        logits = model.eval()(torch.randn(1, 3, 224, 224))

    Args:
        num_classes: number of logits.
        norm_layer: called with a number of features to make each norm.
        fused: True runs each split attention as one op (:class:`FusedSplitAttentionConv2d`);
            False builds the plain PyTorch reference, which ``resnest_fused.fuse`` can fuse later.

    Returns:
        The model, freshly initialised, in training mode.
    """
    return ResNeSt((3, 4, 6, 3), 32, num_classes, norm_layer=norm_layer, fused=fused)
