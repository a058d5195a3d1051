"""The family beside the official package's networks and timm's; run with ``-m peers``."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys

import pytest
import torch
from test_fuse import randomise
from torch import nn

import resnest_fused as rf
from resnest_fused import models
from resnest_fused.models.random_norms import randomize_norms
from resnest_fused.models.variants import VARIANTS

pytestmark = pytest.mark.peers

OFFICIAL = [name for name in VARIANTS if name not in ("resnest14", "resnest26", "resnest152")]
TIMM = [
    *("resnest14", "resnest26", "resnest50", "resnest101", "resnest200", "resnest269"),
    *("resnest50_fast_4s2x40d", "resnest50_fast_1s4x24d"),
]


# How the official package is asked for an output stride.
STRIDES = {32: {}, 16: {"dilation": 2}, 8: {"dilated": True}}


def official(name: str, stride: int = 32) -> nn.Module:
    return getattr(importlib.import_module("resnest.torch"), name)(**STRIDES[stride])


def timm(name: str, stride: int = 32) -> nn.Module:
    create = importlib.import_module("timm").create_model
    return create(VARIANTS[name].timm, output_stride=stride)


def take_over(name: str, peer: nn.Module, **options: object) -> models.ResNeSt:
    """Our network with the peer's weights, loaded strictly both ways."""
    with torch.device("meta"):
        ours = models.create(name, fused=False, **options)
    ours.load_state_dict(peer.state_dict(), strict=True, assign=True)
    assert list(ours.state_dict()) == list(peer.state_dict())
    peer.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval()


@torch.no_grad()
def assert_equal(name: str, peer: nn.Module, **options: object) -> None:
    """Logits relative to the largest one, unfused and fused, in float32 and in float64.

    Norms get statistics to match. Without them resnest200 and 269 amplify rounding without bounds.
    """
    randomize_norms(peer, 64, seed=0)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    singles = [peer.eval()(x.float()).double()]
    ours = take_over(name, peer, **options)
    singles.append(ours(x.float()).double())
    assert rf.fuse(ours)
    singles.append(ours(x.float()).double())
    rf.unfuse(ours)
    expected = peer.double()(x)
    scale = expected.abs().max()
    # Other sums than the peer's round otherwise, by no more than its own do.
    rounding = (singles[0] - expected).abs().max()
    assert (singles[1] - singles[0]).abs().max() <= max(1e-6 * scale, rounding)
    assert (singles[2] - singles[0]).abs().max() <= 1e-5 * scale
    assert (ours.double()(x) - expected).abs().max() <= 1e-11 * scale
    rf.fuse(ours)
    assert (ours(x) - expected).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", OFFICIAL)
def test_official(name: str, stride: int) -> None:
    assert_equal(name, official(name, stride), output_stride=stride)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, stride: int) -> None:
    assert_equal(name, timm(name, stride), output_stride=stride, dilation_style="timm")


def test_another_style_gives_other_logits() -> None:
    peer = official("resnest50", 8)
    randomize_norms(peer, 64, seed=0)
    other = take_over("resnest50", peer, output_stride=8, dilation_style="mm")
    x = torch.randn(2, 3, 48, 48)
    assert (other(x) - peer.eval()(x)).abs().max() > 1e-3 * peer(x).abs().max()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"radix": 0}, {"radix": 0}),
        ({"radix": 4, "cardinality": 2}, {"radix": 4, "groups": 2}),
        ({"deep_stem": False, "avg_down": False}, {"deep_stem": False, "avg_down": False}),
        ({"avd": False, "num_classes": 7}, {"avd": False, "num_classes": 7}),
    ],
)
def test_official_options(ours: dict[str, object], theirs: dict[str, object]) -> None:
    network = importlib.import_module("resnest.torch.resnet")
    options = {"radix": 2, "deep_stem": True, "stem_width": 32, "avg_down": True, "avd": True}
    peer = network.ResNet(network.Bottleneck, [1, 1, 1, 1], **options | theirs)
    randomize_norms(peer, 64, seed=0)
    peer.double()
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.device("meta"):
        model = models.resnest14(**ours, fused=False)
    model.load_state_dict(peer.state_dict(), strict=True, assign=True)
    found, expected = model.eval()(x), peer.eval()(x)
    assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_timm_s_registry_builds_ours() -> None:
    import timm as package

    assert len(package.list_models("fused_resnest*")) == len(VARIANTS)
    for stride in (32, 8):
        peer = randomise(package.create_model("resnest14d", output_stride=stride)).eval()
        ours = package.create_model("fused_resnest14d", output_stride=stride).eval()
        assert ours.head_hidden_size == peer.head_hidden_size
        assert isinstance(ours, models.ResNeSt) and not any(
            b.bn3.weight.any() for b in ours.blocks()
        )
        ours.load_state_dict(peer.state_dict(), strict=True)
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-4)
        config = package.data.resolve_model_data_config
        assert config(ours) == config(peer)
    for name in ("fused_resnest14d", "resnest14d"):
        body = package.create_model(name, features_only=True, out_indices=(1, 3))
        assert body.feature_info.channels() == [256, 1024]
        assert [m.shape[1:] for m in body.eval()(x)] == [(256, 16, 16), (1024, 4, 4)]
    options = {"num_classes": 3, "in_chans": 1, "drop_path_rate": 0.1, "act_layer": "silu"}
    model = package.create_model("fused_resnest50d_1s4x24d", **options)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 3)
    assert isinstance(model.layer1[0].conv2.act0, nn.SiLU)
    model = package.create_model("fused_resnest14d", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert copy.deepcopy(model).pretrained_cfg["classifier"] == "fc"
    model = package.create_model("fused_resnest14d", device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}


@torch.no_grad()
def test_timm_s_methods() -> None:
    """What timm calls on its own models gives the same on ours."""
    import timm as package

    peer = randomise(package.create_model("resnest14d")).eval()
    ours = package.create_model("fused_resnest14d").eval()
    ours.load_state_dict(peer.state_dict(), strict=True)
    for coarse in (False, True):
        groups = [
            package.models.group_parameters(model, model.group_matcher(coarse))
            for model in (ours, peer)
        ]
        assert groups[0] == groups[1] and len(groups[0]) == 6
    assert ours.get_classifier(name_only=True) == "fc" and ours.get_classifier() is ours.fc
    rates = [
        [group["lr_scale"] for group in optimizer.param_groups]
        for optimizer in (
            importlib.import_module("timm.optim").create_optimizer_v2(
                model, "sgd", lr=0.1, layer_decay=0.7
            )
            for model in (ours, peer)
        )
    ]
    assert rates[0] == rates[1] and len(set(rates[0])) > 3
    x = torch.randn(1, 3, 64, 64)
    for options in ({}, {"indices": 2}, {"indices": (0, 2), "stop_early": True}):
        found, expected = (model.forward_intermediates(x, **options) for model in (ours, peer))
        for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(ours.forward_intermediates(x, (0, 2), intermediates_only=True)) == 2
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW', got 'NLC'"):
        ours.forward_intermediates(x, output_fmt="NLC")
    for indices in ((1, 2), (0,), 1):
        pruned = [copy.deepcopy(model) for model in (ours, peer)]
        assert len({tuple(m.prune_intermediate_layers(indices)) for m in pruned}) == 1
        assert list(pruned[0].state_dict()) == list(pruned[1].state_dict())
        assert pruned[0].num_features == pruned[1].num_features
        torch.testing.assert_close(pruned[0](x), pruned[1](x), rtol=1e-4, atol=1e-4)


IMPORT = """
import sys
import resnest_fused
assert not {"timm", "torchvision", "PIL", "numpy.random", "resnest"} & set(sys.modules)
import timm
assert "fused_resnest269e" in timm.list_models()
"""


def test_timm_is_not_imported_with_us() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
