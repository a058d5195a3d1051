"""Split attention in plain PyTorch, line by line as in the paper; it runs on every device.

Symbols: B batch, R radix, K cardinality, C channels, I inter_channels. Source: arXiv:2004.08955.

    z[b,r,c,p] = x, relu(x) or relu(bn0(x))      splits, radix-major    (B, R, C, H, W)
    gap[b,c]   = mean_p sum_r z[b,r,c,p]                                (B, C)
    logits     = fc2(relu(bn1(fc1(gap))))        cardinality-major      (B, K, R, C/K)
    a[b,r,c]   = softmax over r of logits        attention, radix-major (B, R, C); R = 1: sigmoid
    out[b,c,p] = sum_r a[b,r,c] z[b,r,c,p]                              (B, C, H, W)
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_fused import sync
from resnest_fused.tracing import as_one_node, is_traced

NormLayer = Callable[[int], nn.Module]
ConvLayer = Callable[..., nn.Module]
IntOrPair = int | tuple[int, int]


class BatchNormArgs(NamedTuple):
    """The arguments of one batch normalisation, as in ``torch.nn.functional.batch_norm``.

    ::

        bn = nn.BatchNorm2d(32)
        bn1 = rf.BatchNormArgs(bn.weight, bn.bias, bn.running_mean, bn.running_var, eps=bn.eps)

    Attributes:
        weight: gamma, shape ``(features,)``, or None for 1.
        bias: beta, shape ``(features,)``, or None for 0.
        running_mean: shape ``(features,)``; updated in place when batch statistics are used.
        running_var: shape ``(features,)``; updated with the unbiased variance.
        momentum: the weight of the batch statistics when running ones are updated. None for
            1 / num_batches_tracked, which makes them a cumulative average.
        eps: added to the variance.
        batch_stats: True for batch statistics, False for the running ones. None follows the
            call's ``training``.
        process_group: the name of a ``torch.distributed`` process group. Batch statistics are then
            over the batches of all its processes, as in ``nn.SyncBatchNorm``.
        num_batches_tracked: one number; counted up in place when batch statistics are used.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    batch_stats: bool | None = None
    process_group: str | None = None
    num_batches_tracked: Tensor | None = None

    def uses_batch_stats(self, training: bool) -> bool:
        """Whether the call uses batch statistics; it always does if there are no running ones."""
        if self.running_mean is None:
            return True
        return training if self.batch_stats is None else self.batch_stats


def default_inter_channels(channels: int, radix: int, reduction: int = 4) -> int:
    """The official width of the hidden layer between the two FCs."""
    return max(channels * radix // reduction, 32)


def as_splits(x: Tensor, radix: int) -> tuple[Tensor, ...]:
    """The splits of ``(B, R*C, H, W)``: R views of ``(B, C, H, W)``.

    These views keep x's memory format. A 5-dimensional view with R would not, and PyTorch would
    then be several times slower on channels_last maps.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    features = x.shape[1]
    if features % radix:
        raise ValueError(f"x: expected channels divisible by radix={radix}, got {features}")
    return x.split(features // radix, dim=1)


def pool(splits: tuple[Tensor, ...]) -> Tensor:
    """gap = mean over pixels of the sum over radix: ``(B, C, 1, 1)``."""
    total = splits[0]
    for split in splits[1:]:
        total = total + split
    return total.mean(dim=(2, 3), keepdim=True)


def r_softmax(logits: Tensor, radix: int, cardinality: int) -> Tensor:
    """Cardinality-major logits ``(B, R*C, 1, 1)`` to radix-major attention ``(B, R, C, 1, 1)``."""
    batch, features = logits.shape[:2]
    if radix == 1:
        return logits.sigmoid().reshape(batch, 1, features, 1, 1)
    grouped = logits.reshape(batch, cardinality, radix, features // (radix * cardinality))
    attention = grouped.softmax(dim=2).transpose(1, 2)
    return attention.reshape(batch, radix, features // radix, 1, 1)


def recombine(splits: tuple[Tensor, ...], attention: Tensor) -> Tensor:
    """out = sum over radix of attention times splits."""
    out = attention[:, 0] * splits[0]
    for r in range(1, len(splits)):
        out = out + attention[:, r] * splits[r]
    return out


def batch_norm(x: Tensor, args: BatchNormArgs, training: bool) -> Tensor:
    """``F.batch_norm`` with the arguments that ``args`` holds."""
    batch_stats = args.uses_batch_stats(training)

    def beside_x(tensor: Tensor | None) -> Tensor | None:
        # F.batch_norm takes float32 beside a 16-bit x, but not beside a float64 one.
        return tensor.double() if tensor is not None and x.dtype == torch.float64 else tensor

    if batch_stats and args.process_group is not None:
        return _sync_batch_norm(x, args, args.process_group)
    running = args.running_mean, args.running_var
    mean, var = beside_x(args.running_mean), beside_x(args.running_var)
    counter = args.num_batches_tracked if batch_stats else None
    momentum = args.momentum
    if momentum is None:
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    out = F.batch_norm(
        x,
        mean,
        var,
        beside_x(args.weight),
        beside_x(args.bias),
        batch_stats,
        momentum,
        args.eps,
    )
    if counter is not None:
        counter.add_(1)
    for kept, updated in zip(running, (mean, var), strict=True):
        if kept is not None and updated is not None and updated is not kept:
            kept.copy_(updated)
    return out


def _sync_batch_norm(x: Tensor, args: BatchNormArgs, process_group: str) -> Tensor:
    """Normalise with the statistics of all processes; the gradient flows through them."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, _, height, width = x.shape
    count = batch * height * width
    mean = wide.sum(dim=(0, 2, 3)) / max(count, 1)
    var = (wide - mean.view(-1, 1, 1)).square().sum(dim=(0, 2, 3)) / max(count, 1)
    mean, var, total = sync.combine_statistics(mean, var, count, process_group)
    update_running_statistics(args, mean, var, total)
    scale = (var + args.eps).rsqrt()
    if args.weight is not None:
        scale = scale * args.weight
    out = (wide - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    if args.bias is not None:
        out = out + args.bias.view(-1, 1, 1)
    return out.to(x.dtype)


@torch.no_grad()
def update_running_statistics(
    bn: BatchNormArgs, mean: Tensor, var: Tensor, count: int | Tensor
) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance.

    ``var`` is the biased variance of ``count`` elements. An empty batch is only counted.
    """
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if bn.running_mean is None or bn.running_var is None:
        return
    if not isinstance(count, Tensor) and count == 0:
        return
    # Detached as well: an exported program records these ops, but not no_grad().
    mean, var = mean.detach(), var.detach()
    unbiased = var * (count / (count - 1))
    momentum: float | Tensor | None = bn.momentum
    if momentum is None:
        assert bn.num_batches_tracked is not None
        momentum = 1 / bn.num_batches_tracked.to(mean.dtype)
    for running, batch in ((bn.running_mean, mean), (bn.running_var, unbiased)):
        # In the statistics' own dtype, so that 16-bit running ones are rounded once.
        kept = running.to(batch.dtype)
        running.copy_((1 - momentum) * kept + momentum * batch)


def prologue(x: Tensor, bn0: BatchNormArgs | None, relu: bool, training: bool) -> Tensor:
    """z = relu(bn0(x)) when bn0 is given, else relu(x) or x."""
    if bn0 is not None:
        x = batch_norm(x, bn0, training)
    return F.relu(x) if relu or bn0 is not None else x


def attend(x: Tensor, attention_of: Callable[[Tensor], Tensor], radix: int) -> Tensor:
    """Split attention with any map from gap to attention."""
    splits = as_splits(x, radix)
    attention = attention_of(pool(splits))
    # Under autocast the FCs may run in a narrower dtype than x's; out keeps x's.
    return recombine(splits, attention.to(x.dtype))


def split_attention(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    radix: int,
    cardinality: int = 1,
    bn0: BatchNormArgs | None = None,
    bn1: BatchNormArgs | None = None,
    relu: bool = False,
    training: bool = False,
) -> Tensor:
    """Split attention over tensors in plain PyTorch; see ``resnest_fused.split_attention``.

    If ``x`` and a parameter differ in dtype, (B, C)-sized data are computed in the wider one.
    """
    x = prologue(x, bn0, relu, training)
    mlp = plain_mlp(
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, bn1, cardinality=cardinality, training=training
    )
    return attend(x, lambda gap: r_softmax(mlp(gap), radix, cardinality), radix)


def plain_mlp(
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    bn1: BatchNormArgs | None,
    *,
    cardinality: int,
    training: bool,
) -> Callable[[Tensor], Tensor]:
    """fc2(relu(bn1(fc1(gap)))) as a function of gap."""

    def fc(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = torch.promote_types(inputs.dtype, weight.dtype)
        bias = None if bias is None else bias.to(wide)
        return F.conv2d(inputs.to(wide), weight.to(wide), bias, groups=cardinality)

    def mlp(gap: Tensor) -> Tensor:
        h = fc(gap, fc1_weight, fc1_bias)
        if bn1 is not None:
            h = batch_norm(h, bn1, training)
        return fc(F.relu(h), fc2_weight, fc2_bias)

    return mlp


class _AttentionModule(nn.Module):
    """The common part of both modules: ``fc1``, ``bn1``, ``fc2``, and gap to attention."""

    channels: int
    radix: int
    cardinality: int
    inter_channels: int
    bn1: nn.Module | None
    act1: nn.Module | None

    def _add_attention(
        self,
        channels: int,
        radix: int,
        cardinality: int,
        inter_channels: int | None,
        reduction: int,
        norm_layer: NormLayer | None,
        act_layer: Callable[[], nn.Module] | None = None,
    ) -> None:
        channels, radix, cardinality = _check_counts(
            channels=channels, radix=radix, cardinality=cardinality
        )
        if inter_channels is None:
            (reduction,) = _check_counts(reduction=reduction)
            inter_channels = default_inter_channels(channels, radix, reduction)
        (inter_channels,) = _check_counts(inter_channels=inter_channels)
        for name, features in (("channels", channels), ("inter_channels", inter_channels)):
            if features % cardinality:
                raise ValueError(
                    f"cardinality must divide {name}, got cardinality={cardinality} and "
                    f"{name}={features}"
                )
        self.channels = channels
        self.radix = radix
        self.cardinality = cardinality
        self.inter_channels = inter_channels
        self.fc1 = nn.Conv2d(channels, inter_channels, 1, groups=cardinality)
        self.bn1 = None if norm_layer is None else norm_layer(inter_channels)
        self.act1 = None if act_layer is None else act_layer()
        self.fc2 = nn.Conv2d(inter_channels, channels * radix, 1, groups=cardinality)

    def _attention(self, gap: Tensor) -> Tensor:
        h = self.fc1(gap)
        if self.bn1 is not None:
            h = self.bn1(h)
        h = F.relu(h) if self.act1 is None else self.act1(h)
        return r_softmax(self.fc2(h), self.radix, self.cardinality)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, radix={self.radix}, cardinality={self.cardinality}"


def _check_counts(**counts: int) -> list[int]:
    """The counts as plain integers; NumPy's integers are converted."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(f"{name} must be an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    return [int(count) for count in counts.values()]


class SplitAttention(_AttentionModule):
    """Split attention over an already convolved, normalised and activated feature map.

    ::

        attention = rf.SplitAttention(channels=64, radix=2)
        out = attention(torch.randn(8, 128, 56, 56))  # (8, 64, 56, 56)

    The input is ``(B, radix*channels, H, W)``, radix-major. The output is ``(B, channels, H, W)``.
    The head of this file has the equations (arXiv:2004.08955, equations 1 to 3). Its children are
    ``fc1``, ``bn1`` and ``fc2``.

    Args:
        channels: channels of the output.
        radix: splits per cardinal group, at least 1.
        cardinality: cardinal groups, at least 1; divides ``channels`` and ``inter_channels``.
        inter_channels: width between the FCs; None for ``max(channels*radix//reduction, 32)``.
        reduction: used when ``inter_channels`` is None.
        norm_layer: called with ``inter_channels`` to make ``bn1``; None for no normalisation.

    Raises:
        ValueError: when a count is below 1 or ``cardinality`` does not divide.
        TypeError: when a count is no integer.
    """

    def __init__(
        self,
        channels: int,
        radix: int = 2,
        cardinality: int = 1,
        inter_channels: int | None = None,
        reduction: int = 4,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self._add_attention(channels, radix, cardinality, inter_channels, reduction, norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, radix*channels, H, W)`` to ``(B, channels, H, W)``."""
        if is_traced(x):
            return as_one_node(self, x)
        return attend(x, self._attention, self.radix)


class SplitAttentionConv2d(_AttentionModule):
    """conv -> bn0 -> ReLU -> split attention, the block that replaces ResNet's 3x3 convolution.

    ::

        block = rf.SplitAttentionConv2d(64, 64, kernel_size=3, padding=1)
        out = block(torch.randn(8, 64, 56, 56))  # (8, 64, 56, 56)

    The input is ``(B, in_channels, H, W)``, the output ``(B, channels, H', W')``. The convolution
    has ``channels*radix`` outputs and ``groups=cardinality*radix``. Its children are ``conv``,
    ``bn0``, ``fc1``, ``bn1`` and ``fc2``, with the names and the order of the official code.

    Args:
        in_channels, channels, kernel_size, stride, padding, dilation, bias: as ``nn.Conv2d``'s,
            with ``channels`` the output's channels.
        cardinality, radix, reduction, inter_channels: as in :class:`SplitAttention`.
        norm_layer: makes ``bn0`` and ``bn1``; None for neither.
        conv_layer: makes ``conv``; called as ``nn.Conv2d`` is.
        act_layer: called without arguments to make ``act0``, in the ReLU's place behind ``bn0``,
            and ``act1``, in that between the FCs; None for ReLU, which has no child.
        drop_layer: called without arguments to make ``drop``, between ``bn0`` and the activation,
            such as DropBlock; None for none.

    Raises:
        ValueError: when a count is below 1 or ``cardinality`` does not divide.
        TypeError: when a count is no integer.
    """

    bn0: nn.Module | None
    drop: nn.Module | None
    act0: nn.Module | None

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: IntOrPair,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        cardinality: int = 1,
        bias: bool = False,
        radix: int = 2,
        reduction: int = 4,
        inter_channels: int | None = None,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        conv_layer: ConvLayer = nn.Conv2d,
        act_layer: Callable[[], nn.Module] | None = None,
        drop_layer: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        in_channels, channels, radix, cardinality = _check_counts(
            in_channels=in_channels, channels=channels, radix=radix, cardinality=cardinality
        )
        self.conv = conv_layer(
            in_channels,
            channels * radix,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=cardinality * radix,
            bias=bias,
        )
        self.bn0 = None if norm_layer is None else norm_layer(channels * radix)
        self.drop = None if drop_layer is None else drop_layer()
        self.act0 = None if act_layer is None else act_layer()
        self._add_attention(
            channels, radix, cardinality, inter_channels, reduction, norm_layer, act_layer
        )

    def _prologue(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn0 is not None:
            x = self.bn0(x)
        if self.drop is not None:
            x = self.drop(x)
        return F.relu(x, inplace=True) if self.act0 is None else self.act0(x)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, channels, H', W')``."""
        if is_traced(x):
            return as_one_node(self, x)
        return attend(self._prologue(x), self._attention, self.radix)
