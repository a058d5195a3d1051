"""How good a network is on pictures with labels: accuracy, confusion and calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)


class Scores(NamedTuple):
    """What an evaluation found.

    Attributes:
        loss: mean cross-entropy, without smoothing.
        top1, top5: share of the pictures, in percent, whose class was the likeliest, or among the
            five likeliest.
        calibration_error: mean distance of confidence and accuracy over 15 bins of confidence, in
            percent (arXiv:1706.04599).
        confusion: ``(C, C)`` counts: true classes by row, the likeliest ones by column.
        complaints: of this process's pictures that cannot be decoded, one for each.
    """

    loss: float
    top1: float
    top5: float
    calibration_error: float
    confusion: Tensor
    complaints: list[str]

    def by_class(self) -> Tensor:
        """top1 of each class ``(C,)``, in percent; NaN for a class without pictures."""
        return 100 * self.confusion.diagonal() / self.confusion.sum(dim=1)


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Sequence[str]]],
    classes: int,
    device: torch.device,
    memory_format: torch.memory_format = torch.contiguous_format,
    amp: torch.dtype | None = None,
) -> Scores:
    """Run a network over batches, in eval mode, and score it over the batches of all processes.

    Args:
        network: to logits ``(B, classes)``; its mode is as before afterwards.
        batches: of pictures, labels and complaints, which may be empty; processes may have
            different numbers of them.
        classes: how many.
        device: where the network is.
        memory_format: of the pictures.
        amp: what autocast computes in; None for none.
    """
    options: dict[str, Any] = {"num_classes": classes, "validate_args": False}
    metrics = MetricCollection(
        {
            "top1": MulticlassAccuracy(average="micro", **options),
            "top5": MulticlassAccuracy(average="micro", top_k=min(5, classes), **options),
            "calibration_error": MulticlassCalibrationError(n_bins=15, **options),
            "confusion": MulticlassConfusionMatrix(**options),
        },
        compute_groups=False,
    ).to(device)
    losses = MeanMetric(nan_strategy="disable").to(device)
    before = network.training
    network.eval()
    complaints: dict[str, None] = {}
    for pictures, labels, said in batches:
        complaints |= dict.fromkeys(filter(None, "\n".join(said).split("\n")))
        pictures = pictures.to(device, memory_format=memory_format, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            logits = network(pictures).float()
        losses.update(F.cross_entropy(logits, labels, reduction="none"))
        metrics.update(logits.softmax(dim=1), labels)
    network.train(before)
    found = metrics.compute()
    return Scores(
        loss=float(losses.compute()),
        top1=100 * float(found["top1"]),
        top5=100 * float(found["top5"]),
        calibration_error=100 * float(found["calibration_error"]),
        confusion=found["confusion"].cpu(),
        complaints=list(complaints),
    )
