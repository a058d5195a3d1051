"""The learning rate at each step: linear warm-up from 0, then a cosine to 0."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def lr_factor(step: int, warmup: int, total: int) -> float:
    """The learning rate at a step, as a factor of its peak.

    ::

        step / warmup                                                 while step < warmup
        (1 + cos(pi * (step - warmup) / (total - warmup))) / 2        from then on

    Source: arXiv:2004.08955, section 5.1, and "Bag of Tricks", arXiv:1812.01187.

    Example::

        >>> lr_factor(0, 10, 110), lr_factor(10, 10, 110), lr_factor(60, 10, 110)
        (0.0, 1.0, 0.5)

    Args:
        step: optimiser's steps that are done.
        warmup: steps of the warm-up.
        total: steps of the whole run.
    """
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2


def peak_lr(lr: float, samples: int) -> float:
    """The linear scaling rule: ``lr * samples / 256`` for so many samples in a step."""
    return lr * samples / 256


def make_scheduler(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> LRScheduler:
    """The schedule for an optimizer whose learning rates are the peaks; stepped once a step.

    It is stepped where the optimizer leaves a step out, too, as fp16 does when scaled gradients are
    infinite: a learning rate belongs to a place in the run. There must be no gradients yet.
    """
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total))
    # Changes nothing without gradients. LambdaLR warns if the optimizer did not step before it,
    # and the first step may be left out.
    optimizer.step()
    return scheduler
