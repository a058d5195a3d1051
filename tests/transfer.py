"""Trains torchvision's detector and segmenter over a resnest14 on drawn shapes, from scratch.

This trains both, fused and unfused, and keeps their losses and a plot of them for each::

    python tests/transfer.py --out benchmarks/results/transfer
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from shapes import CLASSES, Picture, draw_many
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabV3
from torchvision.ops import FeaturePyramidNetwork

from resnest_fused import models

_TEST_SEED = 1_000_000  # of the pictures that no training sees


class Run(NamedTuple):
    """One training: its loss by step, its mark on fresh pictures, and CPU-seconds."""

    losses: list[float]
    mark: float
    seconds: float


def detector(fused: bool, side: int) -> nn.Module:
    """Faster R-CNN with a narrow feature pyramid and anchors of the shapes' sizes."""
    body = models.backbone("resnest14", out_indices={2: "0", 3: "1", 4: "2"}, fused=fused)
    channels = [info["num_chs"] for info in body.feature_info[2:]]
    backbone = nn.Sequential(OrderedDict(body=body, pyramid=FeaturePyramidNetwork(channels, 64)))
    backbone.out_channels = 64
    sizes = tuple((side * share,) for share in (0.2, 0.3, 0.4))
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, ((1.0,),) * 3),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 5, 2),
        box_head=TwoMLPHead(64 * 5 * 5, 128),
        box_predictor=FastRCNNPredictor(128, len(CLASSES)),
        min_size=side,
        max_size=side,
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=50,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=32,
        rpn_batch_size_per_image=64,
        box_detections_per_img=10,
    )


def segmenter(fused: bool) -> nn.Module:
    """DeepLabV3 with stride 8 and a narrow head."""
    body = models.backbone("resnest14", out_indices={4: "out"}, output_stride=8, fused=fused)
    head = nn.Sequential(ASPP(body.num_features, (2, 4), 64), nn.Conv2d(64, len(CLASSES), 1))
    return DeepLabV3(body, head)


def _target(picture: Picture) -> dict[str, Tensor]:
    return {"boxes": picture.boxes, "labels": picture.labels}


def _detection_loss(model: nn.Module, batch: list[Picture]) -> Tensor:
    losses = model([p.image for p in batch], [_target(p) for p in batch])
    return torch.stack(list(losses.values())).sum()


def _segmentation_loss(model: nn.Module, batch: list[Picture]) -> Tensor:
    logits = model(torch.stack([p.image for p in batch]) - 0.4)["out"]
    return F.cross_entropy(logits, torch.stack([p.mask for p in batch]))


@torch.inference_mode()
def _box_ap50(model: nn.Module, pictures: list[Picture]) -> float:
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(iou_thresholds=[0.5])
    for picture in pictures:
        metric.update(model([picture.image]), [_target(picture)])
    return float(metric.compute()["map_50"])


@torch.inference_mode()
def _mean_iou(model: nn.Module, pictures: list[Picture]) -> float:
    from torchmetrics.classification import MulticlassJaccardIndex

    metric = MulticlassJaccardIndex(len(CLASSES))
    for picture in pictures:
        metric.update(model(picture.image[None] - 0.4)["out"].argmax(1), picture.mask[None])
    return float(metric.compute())


def _train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, list[Picture]], Tensor],
    mark_of: Callable[[nn.Module, list[Picture]], float],
    side: int,
    steps: int,
    batch: int,
    rate: float,
    taken: int | None,
) -> Run:
    started = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    losses = []
    for step in range(steps if taken is None else taken):
        loss = loss_of(model.train(), draw_many(batch, side, step * batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    mark = mark_of(model.eval(), draw_many(64, side, _TEST_SEED))
    return Run(losses, mark, time.process_time() - started)


def train_detector(
    fused: bool, steps: int = 300, side: int = 96, seed: int = 0, taken: int | None = None
) -> Run:
    """Box AP50 of a Faster R-CNN, after the steps or, if fewer are to be taken, after those."""
    torch.manual_seed(seed)
    model = detector(fused, side)
    return _train(model, _detection_loss, _box_ap50, side, steps, 8, 1e-3, taken)


def train_segmenter(
    fused: bool, steps: int = 150, side: int = 96, seed: int = 0, taken: int | None = None
) -> Run:
    """Mean IoU of a DeepLabV3, as above."""
    torch.manual_seed(seed)
    model = segmenter(fused)
    return _train(model, _segmentation_loss, _mean_iou, side, steps, 8, 1e-3, taken)


TRAININGS = {"detector": train_detector, "segmenter": train_segmenter}
MARKS = {"detector": "box AP50", "segmenter": "mean IoU"}


def draw_curves(folder: Path, model: str) -> None:
    """A plot, ``MODEL.png``, of all the model's runs in the folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for path in sorted(folder.glob(f"{model}_*.json")):
        run = Run(**json.loads(path.read_text()))
        label = path.stem.removeprefix(f"{model}_").replace("_seed", ", seed ")
        axes.plot(run.losses, label=f"{label}: {MARKS[model]} {run.mark:.3f}", linewidth=0.8)
    axes.set(title=model, xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(folder / f"{model}.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for losses and curves")
    parser.add_argument("--only", choices=TRAININGS, help="train one of the models")
    parser.add_argument("--kinds", nargs="+", default=["fused", "unfused"])
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, train in TRAININGS.items():
        if arguments.only not in (None, name):
            continue
        for kind in arguments.kinds:
            run = train(kind == "fused", seed=arguments.seed)
            path = arguments.out / f"{name}_{kind}_seed{arguments.seed}.json"
            path.write_text(json.dumps(run._asdict()))
            print(f"{name}, {kind}: {MARKS[name]} {run.mark:.3f}, {run.seconds:.0f} CPU-s")
            draw_curves(arguments.out, name)
