"""ResNeSt in its official layout: the same state_dict keys, order, shapes and numbers."""

# No annotations as strings here: pickle wants their objects in a network that torch.fx traced.

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from resnest_fused.fusing import fuse
from resnest_fused.models import options
from resnest_fused.models.checkpointing import run_saving_memory
from resnest_fused.models.dilation import StagePlan, plan_stages
from resnest_fused.models.drop import DropBlock2d, DropPath
from resnest_fused.models.options import OutIndices
from resnest_fused.models.pooling import GLOBAL_POOLS, Avd, GlobalPool, SameAvgPool2d
from resnest_fused.reference import ConvLayer, NormLayer, SplitAttentionConv2d

ActLayer = Callable[[], nn.Module]

_EXPANSION = 4
STAGES = ("layer1", "layer2", "layer3", "layer4")

DROP_BLOCK_STYLES = ("official", "gluon", "timm")
# Of the last two stages: the side of a block, and the factor of its rate.
_DROP_BLOCKS = {"timm": ((5, 0.25), (3, 1.0))}


class Bottleneck(nn.Module):
    """1x1 conv -> 3x3 split attention -> average pool -> 1x1 conv, added to the shortcut.

    ``(B, in_channels, H, W)`` to ``(B, 4*planes, ceil(H/stride), ceil(W/stride))``. The pooling
    beside the attention has the stride, not the convolution.

    Example::

        block = Bottleneck(256, 64, nn.BatchNorm2d)

    Args:
        in_channels: channels of the input.
        planes: width of the block inside, for cardinality 1 and bottleneck_width 64.
        norm_layer: called with a number of features to make each norm.
        stride: of the whole block.
        downsample: the shortcut's map to the output's shape; None for the identity.
        radix, cardinality, bottleneck_width: as of :class:`ResNeSt`.
        dilation: of the 3x3 convolution.
        avd: whether a pooling takes over the stride; None for whether that is not 1.
        avd_first: whether it stands in front of the attention instead of behind it.
        conv_layer, act_layer: as of :class:`ResNeSt`.
        drop_block: called without arguments to make each DropBlock; None for none.
        drop_block_style: where they are, as of :class:`ResNeSt`.
        drop_path: the probability with which a sample skips the block in training.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        norm_layer: NormLayer,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        radix: int = 2,
        cardinality: int = 1,
        bottleneck_width: int = 64,
        dilation: int = 1,
        avd: bool | None = None,
        avd_first: bool = False,
        conv_layer: ConvLayer = nn.Conv2d,
        act_layer: ActLayer | None = None,
        drop_block: Callable[[], nn.Module] | None = None,
        drop_block_style: str = "official",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        width = _width(planes, bottleneck_width, cardinality)
        pools = stride > 1 if avd is None else avd
        everywhere = drop_block if drop_block_style != "timm" else None
        inside = drop_block if drop_block_style != "gluon" else None
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.drop_block1 = None if everywhere is None else everywhere()
        geometry: dict[str, Any] = {
            "stride": 1 if pools else stride,
            "padding": dilation,
            "dilation": dilation,
        }
        self.bn2: nn.Module | None = None
        self.drop_block2: nn.Module | None = None
        self.act2: nn.Module | None = None
        if radix:
            self.conv2: nn.Module = SplitAttentionConv2d(
                width,
                width,
                3,
                **geometry,
                cardinality=cardinality,
                radix=radix,
                norm_layer=norm_layer,
                conv_layer=conv_layer,
                act_layer=act_layer,
                drop_layer=inside,
            )
            if drop_block is not None and inside is None:
                self.drop_block2 = drop_block()
        else:
            self.conv2 = conv_layer(width, width, 3, **geometry, groups=cardinality, bias=False)
            self.bn2 = norm_layer(width)
            self.drop_block2 = None if drop_block is None else drop_block()
            self.act2 = _activation(act_layer)
        self.avd_layer = Avd(stride) if pools else None
        self.avd_first = avd_first
        self.conv3 = nn.Conv2d(width, planes * _EXPANSION, 1, bias=False)
        self.bn3 = norm_layer(planes * _EXPANSION)
        self.drop_block3 = None if everywhere is None else everywhere()
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.act = _activation(act_layer)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, 4*planes, ceil(H/stride), ceil(W/stride))``."""
        out = self.bn1(self.conv1(x))
        if self.drop_block1 is not None:
            out = self.drop_block1(out)
        out = self.act(out)
        if self.avd_layer is not None and self.avd_first:
            out = self.avd_layer(out)
        out = self.conv2(out)
        for module in (self.bn2, self.drop_block2, self.act2):
            if module is not None:
                out = module(out)
        if self.avd_layer is not None and not self.avd_first:
            out = self.avd_layer(out)
        out = self.bn3(self.conv3(out))
        for module in (self.drop_block3, self.drop_path):
            if module is not None:
                out = module(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.act(out)


class ResNeSt(nn.Module):
    """A ResNeSt (arXiv:2004.08955): stem, four stages, global pooling, one FC.

    ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``; with ``out_indices`` to maps. The
    defaults are the options of the published networks of 50 layers. Convolutions start normal with
    variance 2/fan_out, so one seed gives the official model's initial weights.

    Example::

        model = ResNeSt((3, 4, 6, 3), stem_width=32, num_classes=10)
        backbone = ResNeSt((3, 4, 6, 3), out_indices=(1, 2, 3, 4))

    Args:
        layers: blocks in each of the four stages.
        stem_width: channels of the stem's first two convolutions; the third has twice as many.
        num_classes: number of logits; 0 for the pooled features ``(B, 2048)``.
        radix: splits of each cardinal group; 0 for a plain 3x3 convolution, norm and activation.
        cardinality: cardinal groups.
        bottleneck_width: channels of a group for 64 planes.
        planes: the width of each stage's blocks; their output has four times as many channels.
        deep_stem: three 3x3 convolutions, or one of 7x7 with 64 channels.
        avg_down: whether shortcuts have their stride in an average pooling, not in the convolution.
        avd: whether blocks have theirs in one, too.
        avd_first: whether that pooling stands in front of the attention.
        output_stride: 32, 16 or 8: the input's size over the last map's. The stages that keep the
            size are dilated.
        dilation_style: by whose rules: "official", "timm", or "mm" for MMPretrain's, MMDetection's
            and detectron2's; see :func:`resnest_fused.models.dilation.plan_stages`.
        in_chans: channels of the input.
        global_pool: "avg", "max", "avgmax" for the mean of both, or "" for none, which takes
            ``num_classes=0``.
        drop_rate: of the dropout in front of the FC.
        drop_path_rate: of stochastic depth in the last block; from 0 it grows linearly with depth.
        drop_block_rate: of DropBlock in the last two stages, at the end of its schedule; see
            :meth:`set_drop_block`.
        drop_block_style: "official": behind a block's first and last norm and, in the attention,
            between bn0 and the activation; blocks of 3x3. "gluon", which trained the published
            weights: the second one behind the attention. "timm": in the attention only, in the
            third stage blocks of 5x5 at a quarter of the rate.
        zero_init_last: whether the last norm of each block starts with gamma 0, so that the block
            starts as its shortcut.
        conv_layer: makes the convolutions of the stem and the 3x3 ones of the blocks; called as
            ``nn.Conv2d`` is. One for all, or five: for the stem and each stage. What they make
            keeps its own initial weights, unless it is an ``nn.Conv2d``.
        norm_layer: called with a number of features to make each norm.
        act_layer: called without arguments to make each activation, those in the attention too;
            None for ReLU.
        out_indices: makes it a backbone without a classifier: which maps it returns, 0 the stem's
            with stride 2, 1 to 4 the stages'. Stages behind the last one are left out. A sequence
            gives a list of maps; a mapping to names, such as ``{4: "out"}``, a dictionary.
        frozen_stages: -1 for none, 0 for the stem, N for the stem and N stages: their parameters
            need no gradient, and their norms stay in eval mode.
        fused: whether the attention runs as one op, see :func:`resnest50`.

    Attributes:
        feature_info: of the stem and each stage a dictionary of ``num_chs``, ``reduction`` (the
            stride) and ``module`` (its name).
        num_features: channels of the last map.
        head_hidden_size: channels of what goes into the FC, by timm's name: the same.

    Raises:
        ValueError: an option has a wrong value; the message names it.
    """

    def __init__(
        self,
        layers: Sequence[int],
        stem_width: int = 32,
        num_classes: int = 1000,
        *,
        radix: int = 2,
        cardinality: int = 1,
        bottleneck_width: int = 64,
        planes: Sequence[int] = (64, 128, 256, 512),
        deep_stem: bool = True,
        avg_down: bool = True,
        avd: bool = True,
        avd_first: bool = False,
        output_stride: int = 32,
        dilation_style: str = "official",
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        drop_block_style: str = "official",
        zero_init_last: bool = False,
        conv_layer: ConvLayer | Sequence[ConvLayer] = nn.Conv2d,
        norm_layer: NormLayer = nn.BatchNorm2d,
        act_layer: ActLayer | None = None,
        out_indices: OutIndices | None = None,
        frozen_stages: int = -1,
        fused: bool = True,
    ) -> None:
        super().__init__()
        plans = plan_stages(output_stride, dilation_style)
        options.check_integers(num_classes=num_classes, radix=radix, least=0)
        options.check_integers(cardinality=cardinality, bottleneck_width=bottleneck_width, least=1)
        options.check_integers(stem_width=stem_width, in_chans=in_chans, least=1)
        options.check_four_integers(layers=layers, least=0)
        options.check_four_integers(planes=planes, least=1)
        options.check_widths(
            (_width(each, bottleneck_width, cardinality) for each in planes), radix, cardinality
        )
        options.check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        options.check_rates(drop_block_rate=drop_block_rate)
        options.check_choice(DROP_BLOCK_STYLES, drop_block_style=drop_block_style)
        options.check_choice(range(-1, 5), frozen_stages=frozen_stages)
        options.check_head(num_classes, global_pool, GLOBAL_POOLS)
        layers_of = _check_conv_layers(conv_layer)
        options.check_makers(norm_layer=norm_layer, act_layer=act_layer or nn.ReLU)
        made: list[nn.Module] = []
        convs = [functools.partial(_make_conv, made, each) for each in layers_of]
        self.out_names = None if out_indices is None else options.check_out_indices(out_indices)
        self.num_classes = 0 if out_indices is not None else num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.frozen_stages = frozen_stages
        self.drop_block_rate = drop_block_rate

        channels = 2 * stem_width if deep_stem else 64
        self.conv1 = _make_stem(in_chans, stem_width, deep_stem, convs[0], norm_layer, act_layer)
        self.bn1 = norm_layer(channels)
        self.act = _activation(act_layer)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": 2, "module": "act"}
        ]

        last = 4 if self.out_names is None else max(self.out_names)
        blocks, reduction = 0, 4
        for index in range(last):
            drop_block = None
            if drop_block_rate and index >= 2:
                size, scale = _DROP_BLOCKS.get(drop_block_style, ((3, 1.0), (3, 1.0)))[index - 2]
                drop_block = functools.partial(DropBlock2d, drop_block_rate, size, scale)
            plan, width = plans[index], planes[index]
            stage = []
            for number in range(layers[index]):
                shortcut = None
                if number == 0 and (plan.stride > 1 or channels != width * _EXPANSION):
                    shortcut = _make_shortcut(channels, width, norm_layer, plan, avg_down)
                stage.append(
                    Bottleneck(
                        channels,
                        width,
                        norm_layer,
                        plan.stride if number == 0 else 1,
                        shortcut,
                        radix=radix,
                        cardinality=cardinality,
                        bottleneck_width=bottleneck_width,
                        dilation=plan.dilation if number else plan.first_dilation,
                        avd=avd and number == 0 and plan.avd,
                        avd_first=avd_first,
                        conv_layer=convs[1 + index],
                        act_layer=act_layer,
                        drop_block=drop_block,
                        drop_block_style=drop_block_style,
                        drop_path=drop_path_rate * blocks / max(sum(layers) - 1, 1),
                    )
                )
                channels = width * _EXPANSION
                blocks += 1
            reduction *= plan.stride if stage else 1
            self.add_module(STAGES[index], nn.Sequential(*stage))
            info = {"num_chs": channels, "reduction": reduction, "module": STAGES[index]}
            self.feature_info.append(info)
        self.num_features = self.head_hidden_size = channels
        if self.out_names is None:
            self.global_pool = GlobalPool(global_pool)
            self.drop = nn.Dropout(drop_rate) if drop_rate else None
            self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self._initialise(made, zero_init_last)
        if frozen_stages >= 0:
            for module in self._frozen():
                module.requires_grad_(False)
            self.train()
        if fused:
            fuse(self)

    def _initialise(self, made: Sequence[nn.Module], zero_init_last: bool) -> None:
        """Draw the weights of all convolutions but those inside of what ``conv_layer`` made."""
        foreign = [conv for conv in made if not isinstance(conv, nn.Conv2d)]
        kept = {inner for conv in foreign for inner in conv.modules()}
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in kept:
                fan_out = module.out_channels * math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if zero_init_last:
            for block in self.blocks():
                if getattr(block.bn3, "weight", None) is not None:
                    nn.init.zeros_(block.bn3.weight)

    @property
    def absent_modules(self) -> tuple[str, ...]:
        """What a backbone or features lack of the whole network, which its checkpoints may hold."""
        stages = STAGES[len(self.feature_info) - 1 :]
        return stages if self.num_classes else (*stages, "fc")

    def stages(self) -> list[nn.Sequential]:
        """The stages, first to last; a backbone has those that its maps need."""
        return [getattr(self, name) for name in STAGES[: len(self.feature_info) - 1]]

    def blocks(self) -> list[Any]:
        """The blocks of all stages, first to last."""
        return [block for stage in self.stages() for block in stage]

    def forward(self, x: Tensor) -> Any:
        """``(B, in_chans, H, W)`` to logits ``(B, num_classes)``, or to a list or dict of maps."""
        if self.out_names is None:
            return self.forward_head(self.forward_features(x))
        maps = {}
        for index in range(len(self.feature_info)):
            x = self._run(index, x)
            if index in self.out_names:
                maps[index] = x
        if any(self.out_names.values()):
            return {name: maps[index] for index, name in self.out_names.items()}
        return [maps[index] for index in self.out_names]

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` to the last map, ``(B, num_features, H/32, W/32)``."""
        for index in range(len(self.feature_info)):
            x = self._run(index, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or to what goes into the FC."""
        x = self.global_pool(x)
        if self.drop is not None:
            x = self.drop(x)
        return x if pre_logits else self.fc(x)

    def _run(self, index: int, x: Tensor) -> Tensor:
        """The stem for index 0, the first stage and the pooling before it for 1, and so on."""
        if index == 0:
            return self.act(self.bn1(self.conv1(x)))
        if index == 1:
            x = self.maxpool(x)
        stage = getattr(self, STAGES[index - 1])
        if not (self.grad_checkpointing and self.training):
            return stage(x)
        for block in stage:
            x = run_saving_memory(block, x)
        return x

    def train(self, mode: bool = True) -> "ResNeSt":
        """Set training mode, but for the frozen stages."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.conv1, self.bn1, *self.stages()[: self.frozen_stages]]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes into each block in training, and compute the rest again in backward.

        Gradients and running statistics are the same to the bit.
        """
        self.grad_checkpointing = enable

    def set_drop_block(self, progress: float) -> None:
        """Set DropBlock's rate to ``progress * drop_block_rate``: the linear schedule.

        Example::

            for epoch in range(epochs):
                model.set_drop_block(epoch / (epochs - 1))

        Args:
            progress: the part of the training that is over, from 0 to 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: expected a number from 0 to 1, got {progress!r}")
        for module in self.modules():
            if isinstance(module, DropBlock2d):
                module.rate.fill_(progress * self.drop_block_rate)

    def get_classifier(self) -> nn.Module:
        """The layer that makes the logits."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, random FC for another number of classes in the place of the old one.

        Raises:
            ValueError: an argument has a wrong value, or this is a backbone, which has no FC.
        """
        if self.out_names is not None:
            raise ValueError("reset_classifier: a backbone has no classifier")
        options.check_integers(num_classes=num_classes, least=0)
        if global_pool is not None:
            options.check_head(num_classes, global_pool, GLOBAL_POOLS)
            self.global_pool = GlobalPool(global_pool)
        place = next(self.conv1.parameters())
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc.to(place.device, place.dtype).train(self.training)


def _check_conv_layers(conv_layer: ConvLayer | Sequence[ConvLayer]) -> Sequence[ConvLayer]:
    """Those of the stem and of each stage."""
    if not isinstance(conv_layer, (list, tuple)):
        options.check_makers(conv_layer=conv_layer)
        return [cast(ConvLayer, conv_layer)] * 5
    if len(conv_layer) != 5:
        raise ValueError(f"conv_layer: expected one or five, got {len(conv_layer)}")
    for each in conv_layer:
        options.check_makers(conv_layer=each)
    return conv_layer


def _width(planes: int, bottleneck_width: int, cardinality: int) -> int:
    """The channels of a block's attention."""
    return int(planes * (bottleneck_width / 64)) * cardinality


def _activation(act_layer: ActLayer | None) -> nn.Module:
    return nn.ReLU(inplace=True) if act_layer is None else act_layer()


def _make_conv(
    made: list[nn.Module], conv_layer: ConvLayer, *args: Any, **options: Any
) -> nn.Module:
    """A convolution, which is also noted in ``made``."""
    made.append(conv_layer(*args, **options))
    return made[-1]


def _make_stem(
    in_chans: int,
    width: int,
    deep: bool,
    conv_layer: ConvLayer,
    norm_layer: NormLayer,
    act_layer: ActLayer | None,
) -> nn.Module:
    if not deep:
        return conv_layer(in_chans, 64, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(
        conv_layer(in_chans, width, 3, stride=2, padding=1, bias=False),
        norm_layer(width),
        _activation(act_layer),
        conv_layer(width, width, 3, stride=1, padding=1, bias=False),
        norm_layer(width),
        _activation(act_layer),
        conv_layer(width, 2 * width, 3, stride=1, padding=1, bias=False),
    )


def _make_shortcut(
    in_channels: int, planes: int, norm_layer: NormLayer, plan: StagePlan, avg_down: bool
) -> nn.Sequential:
    stride = 1 if avg_down else plan.stride
    conv = nn.Conv2d(in_channels, planes * _EXPANSION, 1, stride=stride, bias=False)
    norm = norm_layer(planes * _EXPANSION)
    if not avg_down:
        return nn.Sequential(conv, norm)
    # The official layout pools at stride 1, too, by 1x1. So the keys begin at 1 there as well.
    pool: nn.Module = nn.Identity()
    if plan.stride > 1:
        pool = nn.AvgPool2d(plan.stride, plan.stride, ceil_mode=True, count_include_pad=False)
    elif plan.same_pool:
        pool = SameAvgPool2d()
    return nn.Sequential(pool, conv, norm)
