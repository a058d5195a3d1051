"""Drawn pictures of shapes, seeded, with their boxes and masks: small data for transfer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = ("background", "disc", "square", "triangle")


class Picture(NamedTuple):
    """One drawn picture.

    Attributes:
        image: ``(3, side, side)`` in [0, 1].
        boxes: ``(N, 4)`` as x1, y1, x2, y2.
        labels: ``(N,)``, numbers of ``CLASSES`` from 1 on.
        mask: ``(side, side)``, the class of each pixel.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    mask: Tensor


def draw(seed: int, side: int) -> Picture:
    """One to three shapes of random place, size, kind and colour over a noisy background."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    image = uniform(0, 0.4, 3, 1, 1) + 0.1 * torch.randn(3, side, side, generator=generator)
    mask = torch.zeros(side, side, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    boxes, labels = [], []
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        kind = int(torch.randint(1, 4, (), generator=generator))
        radius = float(uniform(0.1, 0.2, 1)) * side
        y, x = uniform(radius, side - radius, 2).tolist()
        down, right = (rows - y) / radius, (columns - x) / radius
        inside = {
            1: down**2 + right**2 <= 1,
            2: (down.abs() <= 0.85) & (right.abs() <= 0.85),
            3: (down <= 0.8) & (right.abs() <= (down + 1) / 1.8),
        }[kind]
        inside &= down.abs() <= 1
        if (mask[inside] > 0).any() or not inside.any():
            continue  # shapes do not overlap
        mask[inside] = kind
        colour = uniform(0.5, 1, 3, 1)
        image[:, inside] = colour + 0.05 * torch.randn(3, 1, generator=generator)
        found = inside.nonzero()
        low, high = found.amin(0), found.amax(0) + 1
        boxes.append([low[1], low[0], high[1], high[0]])
        labels.append(kind)
    return Picture(
        image.clamp(0, 1), torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(labels), mask
    )


def draw_many(count: int, side: int, seed: int = 0) -> list[Picture]:
    """``count`` pictures of different seeds from ``seed`` on."""
    return [draw(seed + index, side) for index in range(count)]
