"""The files that register the family with OpenMMLab's frameworks and with detectron2.

Stand-ins take the frameworks' place: they have what the files use of them.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from test_family import SMALL, small
from torch import nn

from resnest_fused import models
from resnest_fused.models import registry


class Registry(dict[str, Any]):
    """As both frameworks' registries: a decorator that enters a class or a function."""

    def __call__(self) -> Callable[[Any], Any]:
        return lambda entry: self.setdefault(entry.__name__, entry)

    register = register_module = __call__


class ShapeSpec(NamedTuple):
    channels: int
    stride: int = 1


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    while name:
        module = ModuleType(name)
        vars(module).update(contents)
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, module)
        name, contents = name.rpartition(".")[0], {}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """resnest50 is a narrow network of one block a stage."""
    options = {"planes": SMALL["planes"]}
    monkeypatch.setitem(
        registry.BUILDERS, "resnest50", lambda **given: models.resnest14(**options | given)
    )
    for framework in ("openmmlab", "detectron2"):
        name = f"resnest_fused.models.frameworks.{framework}"
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_openmmlab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = Registry()
    stand_in(monkeypatch, "mmengine.registry", MODELS=entries)
    importlib.import_module("resnest_fused.models.frameworks.openmmlab")
    whole = small(seed=4)
    models.save_checkpoint(whole, tmp_path / "mm.pth", "mm")
    build = entries["FusedResNeSt"]
    indices = (0, 1, 2, 3)
    body = build("resnest50", tmp_path / "mm.pth", indices, norm_eval=True, frozen_stages=1)
    body.init_weights()
    assert torch.equal(body.body.layer4[0].bn3.weight, whole.layer4[0].bn3.weight)
    x = torch.randn(2, 3, 64, 64)
    maps = body.eval()(x)
    assert type(maps) is tuple and [m.shape[1:] for m in maps] == [
        (32, 16, 16),
        (64, 8, 8),
        (128, 4, 4),
        (256, 2, 2),
    ]
    torch.testing.assert_close(maps[3], whole.eval().forward_features(x))
    body.train()
    assert body.training and not any(
        m.training for m in body.modules() if isinstance(m, nn.BatchNorm2d)
    )
    assert not body.body.conv1[0].weight.requires_grad and body.body.layer2[0].training
    dilated = build("resnest50", output_stride=8).body
    assert dilated.layer4[0].conv2.conv.dilation == (4, 4)  # by OpenMMLab's rule


def test_openmmlab_s_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a backbone's own arguments are, and what the framework's configs give every backbone."""
    entries = Registry()
    stand_in(monkeypatch, "mmengine.registry", MODELS=entries)
    importlib.import_module("resnest_fused.models.frameworks.openmmlab")
    build = entries["FusedResNeSt"]
    whole, path = small(seed=4), tmp_path / "whole.pth"
    models.save_checkpoint(whole, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    body = build("resnest50", path, sha256=digest, leave_out=("layer4",), in_chans=1)
    body.init_weights()
    stem = whole.conv1[0].weight.sum(dim=1, keepdim=True)
    assert torch.equal(body.body.conv1[0].weight, stem)
    assert not torch.equal(body.body.layer4[0].conv1.weight, whole.layer4[0].conv1.weight)
    wrong = build("resnest50", path, sha256="0" * 8)
    with pytest.raises(models.CheckpointError, match="expected the sha256 00000000"):
        wrong.init_weights()
    # As a whole classifier is saved, and a detector.
    state = {f"backbone.body.{k}": v for k, v in body.body.state_dict().items()}
    torch.save({"state_dict": state | {"neck.bias": torch.ones(1)}}, tmp_path / "detector.pth")
    for prefix in ("backbone", "backbone.body."):
        config = {"type": "Pretrained", "checkpoint": f"{tmp_path}/detector.pth", "prefix": prefix}
        again = build("resnest50", init_cfg=config, in_chans=1)
        again.init_weights()
        found = again.body.state_dict()
        assert all(torch.equal(value, found[key]) for key, value in body.body.state_dict().items())
    assert build("resnest50", init_cfg=None).weights is None
    kaiming = {"type": "Kaiming", "layer": "Conv2d"}
    for wrong_config in (kaiming, [kaiming], {"type": "Pretrained"}):
        with pytest.raises(
            ValueError, match=r"^init_cfg: expected None or dict\(type='Pretrained'"
        ):
            build("resnest50", init_cfg=wrong_config)
    with pytest.raises(ValueError, match=r"^init_cfg: expected None beside weights$"):
        build("resnest50", path, init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    for indices in (3, (4,), (-1,), (1.0,), {3: "out"}):
        with pytest.raises(ValueError, match=r"^out_indices: expected .*, got "):
            build("resnest50", out_indices=indices)


def test_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    entries, made = Registry(), {}
    stand_in(monkeypatch, "detectron2.layers", ShapeSpec=ShapeSpec)
    stand_in(monkeypatch, "detectron2.modeling", BACKBONE_REGISTRY=entries, Backbone=nn.Module)
    stand_in(
        monkeypatch,
        "detectron2.modeling.backbone.fpn",
        FPN=lambda **options: made.update(options),
        LastLevelMaxPool=lambda: "pool",
    )
    importlib.import_module("resnest_fused.models.frameworks.detectron2")
    features = ["res3", "res5"]
    config = SimpleNamespace(
        MODEL=SimpleNamespace(
            BACKBONE=SimpleNamespace(FREEZE_AT=2),
            RESNETS=SimpleNamespace(DEPTH=50, OUT_FEATURES=features, RES5_DILATION=2),
            FPN=SimpleNamespace(IN_FEATURES=features, OUT_CHANNELS=64, NORM="", FUSE_TYPE="sum"),
        )
    )
    body = entries["build_fused_resnest_backbone"](config, ShapeSpec(3))
    assert body.output_shape() == {"res3": ShapeSpec(64, 8), "res5": ShapeSpec(256, 16)}
    maps = body(torch.randn(2, 3, 64, 64))
    assert {n: m.shape[1:] for n, m in maps.items()} == {"res3": (64, 8, 8), "res5": (256, 4, 4)}
    frozen = {n for n, p in body.body.named_parameters() if not p.requires_grad}
    assert all(n.startswith(("conv1", "bn1", "layer1")) for n in frozen) and len(frozen) > 9
    entries["build_fused_resnest_fpn_backbone"](config, ShapeSpec(3))
    assert made.pop("bottom_up").output_shape() == body.output_shape()
    assert made == {
        "in_features": features,
        "out_channels": 64,
        "norm": "",
        "top_block": "pool",
        "fuse_type": "sum",
    }
