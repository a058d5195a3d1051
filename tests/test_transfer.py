"""The family as backbones of torchvision's detector and segmenter, with the extra ``transfer``.

One test is among those of the peers. The long ones train on small pictures for a minute each; those
of ``-m transfer`` longer, fused and unfused.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from shapes import CLASSES
from torch import Tensor, nn

from resnest_fused import models
from resnest_fused.models import images

CHINA = Path(sklearn.datasets.__file__).parent / "images/china.jpg"


def faster_rcnn(fused: bool = True, name: str = "resnest14", **options: Any) -> nn.Module:
    """torchvision's Faster R-CNN with a feature pyramid over our backbone."""
    detection = importlib.import_module("torchvision.models.detection")
    ops = importlib.import_module("torchvision.ops")
    indices = {1: "0", 2: "1", 3: "2", 4: "3"}
    body = models.backbone(name, out_indices=indices, fused=fused)
    channels = [info["num_chs"] for info in body.feature_info[1:]]
    last = ops.feature_pyramid_network.LastLevelMaxPool()
    pyramid = ops.FeaturePyramidNetwork(channels, options.pop("width", 256), last)
    backbone = nn.Sequential(OrderedDict(body=body, fpn=pyramid))
    backbone.out_channels = pyramid.layer_blocks[0][0].out_channels
    return detection.FasterRCNN(backbone, num_classes=len(CLASSES), **options)


def deeplab(fused: bool = True, name: str = "resnest14", stride: int = 16) -> nn.Module:
    """torchvision's DeepLabV3 over our dilated backbone."""
    segmentation = importlib.import_module("torchvision.models.segmentation.deeplabv3")
    body = models.backbone(name, out_indices={4: "out"}, output_stride=stride, fused=fused)
    head = segmentation.DeepLabHead(body.num_features, len(CLASSES))
    return segmentation.DeepLabV3(body, head)


def photo(side: int) -> Tensor:
    return images.preprocess(images.read_image(CHINA), side)


@pytest.mark.peers
def test_a_photo_through_torchvision_s_detector_and_segmenter() -> None:
    torch.manual_seed(0)
    size = {"min_size": 96, "max_size": 96}
    detector, segmenter = faster_rcnn(**size), deeplab()
    target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
    losses = detector([photo(96), photo(96).flip(-1)], [target, target])
    sum(losses.values()).backward()
    out = segmenter(torch.stack([photo(96), photo(96).flip(-1)]))["out"]
    assert out.shape == (2, len(CLASSES), 96, 96)
    F.cross_entropy(out, torch.zeros(2, 96, 96, dtype=torch.long)).backward()
    unfused = faster_rcnn(fused=False, **size), deeplab(fused=False)
    for model, plain in zip((detector, segmenter), unfused, strict=True):
        body = model.backbone.body if model is detector else model.backbone
        assert all(p.grad is not None and p.grad.isfinite().all() for p in body.parameters())
        plain.load_state_dict(model.state_dict())
        plain.eval()
        fused = model.eval()
        if model is detector:
            (a,), (b,) = plain([photo(96)]), fused([photo(96)])
            assert set(a) == {"boxes", "labels", "scores"}
            torch.testing.assert_close(a["boxes"], b["boxes"], rtol=1e-3, atol=1e-2)
        else:
            x = photo(96)[None]
            torch.testing.assert_close(plain(x)["out"], fused(x)["out"], rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "steps", "least"), [("train_detector", 140, 0.6), ("train_segmenter", 120, 0.7)]
)
def test_resnest14_reaches_its_mark_on_small_pictures(name: str, steps: int, least: float) -> None:
    """Fused, and it begins as unfused."""
    train = getattr(importlib.import_module("transfer"), name)
    fused, plain = train(True, steps, 64), train(False, steps, 64, taken=2)
    assert fused.mark >= least
    assert fused.losses[:2] == pytest.approx(plain.losses, rel=1e-3)
    assert fused.losses[0] > 2 * sum(fused.losses[-30:]) / 30


@pytest.mark.transfer
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "least"), [("train_detector", 0.6), ("train_segmenter", 0.7)])
def test_resnest14_learns_shapes_in_torchvision_s_models(name: str, least: float) -> None:
    """Fused and unfused reach the mark, and their losses fall alike."""
    train = getattr(importlib.import_module("transfer"), name)
    fused, plain = (train(fused=fused) for fused in (True, False))
    assert min(fused.mark, plain.mark) >= least
    # The first steps are the same but for rounding, which training then amplifies.
    assert fused.losses[:2] == pytest.approx(plain.losses[:2], rel=1e-3)
    late = [sum(run.losses[-30:]) / 30 for run in (fused, plain)]
    assert late[0] == pytest.approx(late[1], rel=0.5)
    assert fused.losses[0] > 2 * late[0]
