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


def mmpretrain(depth: int) -> nn.Module:
    package = importlib.import_module("mmpretrain.models")
    backbone = {"type": "ResNeSt", "depth": depth, "out_indices": (3,), "style": "pytorch"}
    if depth != 50:
        backbone["stem_channels"] = 128
    head = {"type": "LinearClsHead", "num_classes": 1000, "in_channels": 2048}
    neck = {"type": "GlobalAveragePooling"}
    return package.ImageClassifier(backbone=backbone, neck=neck, head=head)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnest50", "resnest101", "resnest152"])
def test_mmpretrain(name: str, tmp_path: Path) -> None:
    """The whole network, classifier and all, there and back; depth 152 is theirs alone."""
    ours = models.create(name, fused=False)
    randomize_norms(ours, 64, seed=0)
    models.save_checkpoint(ours, tmp_path / "mm.pth", "mm")
    theirs = mmpretrain(int(name.removeprefix("resnest")))
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


@torch.no_grad()
def test_mmdet(tmp_path: Path) -> None:
    """A backbone, there and back, whose maps are ours."""
    ours = models.backbone("resnest50", fused=False)
    randomize_norms(ours, 64, seed=0)
    models.save_checkpoint(ours, tmp_path / "mmdet.pth", "mmdet")
    package = importlib.import_module("mmdet.models.backbones")
    theirs = package.ResNeSt(depth=50, stem_channels=64, norm_eval=False)
    theirs.load_state_dict(torch.load(tmp_path / "mmdet.pth"), strict=True)
    theirs.eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for found, expected in zip(ours.double().eval()(x), theirs.double()(x), strict=True):
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    torch.save({"state_dict": theirs.float().state_dict()}, tmp_path / "theirs.pth")
    again = models.backbone("resnest50", tmp_path / "theirs.pth").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.float().state_dict().items())
