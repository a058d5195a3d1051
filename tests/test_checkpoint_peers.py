"""What we save, in the networks of the frameworks whose layouts it has; run with ``-m peers``."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from stand_ins import stub_mmcv
from torch import nn

from resnest_fused import models
from resnest_fused.models.random_norms import randomize_norms

pytestmark = pytest.mark.peers
stub_mmcv()


# The strides and dilations of OpenMMLab's stages, by the output stride.
DILATED = {
    32: {},
    16: {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)},
    8: {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
}


def mmpretrain(depth: int, stride: int) -> nn.Module:
    package = importlib.import_module("mmpretrain.models")
    backbone = {"type": "ResNeSt", "depth": depth, "out_indices": (3,), **DILATED[stride]}
    if depth != 50:
        backbone["stem_channels"] = 128
    head = {"type": "LinearClsHead", "num_classes": 1000, "in_channels": 2048}
    neck = {"type": "GlobalAveragePooling"}
    return package.ImageClassifier(backbone=backbone, neck=neck, head=head)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("resnest50", 32),
        ("resnest50", 16),
        ("resnest50", 8),
        ("resnest101", 32),
        ("resnest152", 32),
    ],
)
def test_mmpretrain(name: str, stride: int, tmp_path: Path) -> None:
    """The whole network, classifier and all, there and back; depth 152 is theirs alone."""
    options = {"output_stride": stride, "dilation_style": "mm"}
    ours = models.create(name, fused=False, **options)
    randomize_norms(ours, 64, seed=0)
    models.save_checkpoint(ours, tmp_path / "mm.pth", "mm")
    theirs = mmpretrain(int(name.removeprefix("resnest")), stride)
    theirs.load_state_dict(torch.load(tmp_path / "mm.pth"), strict=True)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    theirs.eval()  # which returns None
    features = theirs.double().extract_feat(x)
    expected = theirs.head.fc(features[-1])
    found = ours.double().eval()(x)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    torch.save({"state_dict": theirs.float().state_dict()}, tmp_path / "theirs.pth")
    again = models.create(name, tmp_path / "theirs.pth").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.float().state_dict().items())


def test_a_classifier_trained_in_mmpretrain_over_our_backbone(tmp_path: Path) -> None:
    importlib.import_module("resnest_fused.models.frameworks.openmmlab")
    package = importlib.import_module("mmpretrain.models")
    whole = models.create("resnest14", num_classes=3)
    models.save_checkpoint(whole, tmp_path / "ours.pth")
    weights = {"type": "Pretrained", "checkpoint": f"{tmp_path}/ours.pth"}
    classifier = package.ImageClassifier(
        backbone={"type": "FusedResNeSt", "name": "resnest14", "init_cfg": weights},
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": 3, "in_channels": 2048},
    )
    classifier.init_weights()
    assert torch.equal(classifier.backbone.body.conv1[0].weight, whole.conv1[0].weight)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "trained.pth")
    again = models.create("resnest14", tmp_path / "trained.pth")
    assert torch.equal(again.fc.weight, classifier.head.fc.weight)
    assert torch.equal(again.layer4[0].bn3.weight, whole.layer4[0].bn3.weight)


@pytest.mark.parametrize("stride", [16, 8])
def test_dilated_networks_of_others_are_written_for_mmpretrain(stride: int, tmp_path: Path) -> None:
    option = {16: {"dilation": 2}, 8: {"dilated": True}}[stride]
    timm = importlib.import_module("timm").create_model("resnest50d", output_stride=stride)
    official = importlib.import_module("resnest.torch").resnest50(**option)
    expected = set(mmpretrain(50, stride).state_dict())
    for network in (timm, official):
        models.save_checkpoint(network, tmp_path / "mm.pth", "mm")
        assert set(torch.load(tmp_path / "mm.pth")) == expected


@torch.no_grad()
@pytest.mark.parametrize("stride", DILATED)
def test_mmdet(stride: int, tmp_path: Path) -> None:
    """A backbone, there and back, whose maps are ours."""
    options = {"output_stride": stride, "dilation_style": "mm"}
    ours = models.backbone("resnest50", fused=False, **options)
    randomize_norms(ours, 64, seed=0)
    models.save_checkpoint(ours, tmp_path / "mmdet.pth", "mmdet")
    package = importlib.import_module("mmdet.models.backbones")
    theirs = package.ResNeSt(depth=50, stem_channels=64, norm_eval=False, **DILATED[stride])
    theirs.load_state_dict(torch.load(tmp_path / "mmdet.pth"), strict=True)
    theirs.eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for found, expected in zip(ours.double().eval()(x), theirs.double()(x), strict=True):
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    torch.save({"state_dict": theirs.float().state_dict()}, tmp_path / "theirs.pth")
    again = models.backbone("resnest50", tmp_path / "theirs.pth").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.float().state_dict().items())
