"""What happens to pictures on their way into the network, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from resnest_fused.models import images
from resnest_fused.training.config import Config

Transform = Callable[[Image.Image], Tensor]
Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_POLICIES: dict[str, Callable[..., nn.Module]] = {
    "autoaugment": v2.AutoAugment,
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
}


class Lighting(nn.Module):
    """PCA lighting (AlexNet, NIPS 2012, section 4.1): colours shift along ImageNet's main axes.

    ::

        out = x + V (a * w),   a ~ N(0, deviation^2), three numbers for a picture

    with the eigenvectors V and eigenvalues w of the covariance of ImageNet's pixels in [0, 1].
    ``(3, H, W)`` in [0, 1] to the same shape and dtype; values may leave [0, 1].

    Args:
        deviation: of the three factors; the published recipe has 0.1.
    """

    values = (0.2175, 0.0188, 0.0045)
    vectors = (
        (-0.5675, 0.7192, 0.4009),
        (-0.5808, -0.0045, -0.8140),
        (-0.5836, -0.6948, 0.4203),
    )

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        """``(3, H, W)`` to the same shape."""
        factors = torch.randn(3) * self.deviation * torch.tensor(self.values)
        return x + (torch.tensor(self.vectors) @ factors).to(x.dtype)[:, None, None]


def mix_seeds(*numbers: int) -> int:
    """A seed from several numbers, such that neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def apply_seeded(transform: Transform, image: Image.Image, *numbers: int) -> Tensor:
    """A picture's transform, with random numbers that depend on these numbers alone."""
    before = torch.get_rng_state()
    # Not torch.manual_seed, which also seeds GPUs.
    torch.default_generator.manual_seed(mix_seeds(*numbers))
    try:
        return transform(image)
    finally:
        torch.set_rng_state(before)


def training_transform(config: Config) -> Transform:
    """An RGB picture to ``(3, crop, crop)``, float32: random, by the published recipe.

    The policy, a crop of ``least_area`` to all of the picture resized bicubically, the mirror, the
    jitter of colours, lighting, and ImageNet's normalisation, in this order.
    """
    parts: list[nn.Module] = []
    bicubic = v2.InterpolationMode.BICUBIC
    if config.policy != "none":
        parts.append(_POLICIES[config.policy](interpolation=v2.InterpolationMode.BILINEAR))
    scale = (config.least_area, 1.0)
    parts.append(v2.RandomResizedCrop(config.crop, scale=scale, interpolation=bicubic))
    if config.flip:
        parts.append(v2.RandomHorizontalFlip(config.flip))
    if config.jitter:
        parts.append(v2.ColorJitter(config.jitter, config.jitter, config.jitter))
    parts += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    if config.lighting:
        parts.append(Lighting(config.lighting))
    parts.append(v2.Normalize(images.MEAN.tolist(), images.STD.tolist(), inplace=True))
    return v2.Compose(parts)


def evaluation_transform(size: int, ratio: float) -> Transform:
    """An RGB picture to ``(3, size, size)``, float32: as the official evaluation feeds it.

    Args:
        size: pixels of the side.
        ratio: the share of the shorter side that is seen; 0 for size/(size+32).
    """
    return partial(images.preprocess, size=size, ratio=ratio or None)


def make_mixing(config: Config, classes: int) -> Mixing | None:
    """Mixup and CutMix of a batch ``(B, 3, H, W)`` with its labels ``(B,)``; None for neither.

    Targets become ``(B, classes)``: ``t * onehot(a) + (1 - t) * onehot(b)``. The loss smooths them
    afterwards, which is the same as to mix smoothed targets, since smoothing is affine and the
    shares sum to 1.
    """
    choices: list[Any] = []
    if config.mixup:
        choices.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
    if config.cutmix:
        choices.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
    if not choices:
        return None
    return choices[0] if len(choices) == 1 else v2.RandomChoice(choices)


def make_loss(smoothing: float) -> nn.Module:
    """Cross-entropy with smoothed targets, of logits ``(B, C)`` and labels or shares of classes.

    ::

        target = (1 - smoothing) * share + smoothing / C
        loss   = mean over B of -sum over C of target * log softmax(logits)
    """
    return nn.CrossEntropyLoss(label_smoothing=smoothing)
