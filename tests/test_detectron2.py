"""fuse on detectron2's ResNeSt, from sources; run with ``-m sources --sources=FOLDER``.

detectron2 is on no package index, and its ResNeSt is in the official repository. Nothing of either
is compiled for it.
"""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from test_packages import error, tame
from torch import nn

import resnest_fused as rf

pytestmark = pytest.mark.sources


@pytest.fixture
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Makes a backbone with a norm of detectron2's."""
    sources = request.config.getoption("--sources")
    if sources is None:
        pytest.fail("--sources: expected the folder with the packages' sources")
    for name in list(sys.modules):  # other tests' stand-ins
        if name.partition(".")[0] in ("detectron2", "resnest"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("detectron2", "ResNeSt"):
        monkeypatch.syspath_prepend(str(Path(sources, name).resolve()))
    config = importlib.import_module("detectron2.config")
    resnest = importlib.import_module("resnest.d2")
    shape = importlib.import_module("detectron2.layers").ShapeSpec(channels=3)

    def build(norm: str, depth: int = 50) -> nn.Module:
        cfg = config.get_cfg()
        resnest.add_resnest_config(cfg)
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.RESNETS.update(DEPTH=depth, NORM=norm, OUT_FEATURES=["res2", "res5"])
        cfg.MODEL.RESNETS.update(STEM_OUT_CHANNELS=64, RES2_OUT_CHANNELS=256)
        return resnest.build_resnest_backbone(cfg, shape)

    return build


@pytest.mark.parametrize(
    ("norm", "depth", "modules"),
    [("BN", 50, 16), ("BN", 101, 33), ("FrozenBN", 50, 16), ("GN", 50, 16)],
)
def test_whole_backbones(build, norm, depth, modules):
    torch.manual_seed(0)
    plain = tame(build(norm, depth)).double()
    # The last maps have four pixels: normalising few numbers amplifies rounding.
    network, x = copy.deepcopy(plain), torch.randn(8, 3, 48, 48).double()
    report = rf.fuse(network)
    assert len(report) == modules and not report.left_alone, report
    assert all(entry.proven for entry in report.entries)
    for training in (False, True):
        network.train(training)
        plain.train(training)
        expected, found = plain(x), network(x)
        for name, truth in expected.items():
            assert error(found[name], truth) <= 1e-12, name
    plain.load_state_dict(network.state_dict())


def test_folding(build):
    plain = tame(build("BN")).double().eval()
    network, x = copy.deepcopy(plain), torch.randn(2, 3, 32, 32).double()
    with torch.no_grad():
        expected = plain(x)["res5"]
        assert rf.fuse(network, fold=True).folded_norms == 71  # all
        assert error(network(x)["res5"], expected) <= 1e-12
        rf.unfuse(network)
        assert torch.equal(network(x)["res5"], expected)
