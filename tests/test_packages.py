"""fuse on whole networks of other packages, as they are installed; run with ``-m peers``.

They run in float64, where nothing but rounding may differ. detectron2 is on no package index:
its layers are a stand-in of ours, inside a copy of the official split attention.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_ins import DETECTRON2_CONV, FrozenBatchNorm2d, define, stub_mmcv
from test_any_class import OFFICIAL, assert_proven, pasted
from test_fuse import assert_folds, features, randomise
from torch import Tensor, nn

import resnest_fused as rf

pytestmark = pytest.mark.peers
stub_mmcv()


def mmpretrain(depth: int) -> nn.Module:
    return importlib.import_module("mmpretrain.models.backbones").ResNeSt(depth)


def mmdet(depth: int) -> nn.Module:
    backbones = importlib.import_module("mmdet.models.backbones")
    return backbones.ResNeSt(depth=depth, stem_channels=64, norm_eval=False)


def pytorchcv(name: str) -> nn.Module:
    network = importlib.import_module("pytorchcv.model_provider").get_model(name, num_classes=10)
    network.features.final_pool = nn.AdaptiveAvgPool2d(1)  # some are for images of one size
    return network


def segmentation(encoder: str) -> nn.Module:
    return importlib.import_module("segmentation_models_pytorch").Unet(
        encoder, encoder_weights=None
    )


def of_timm(name: str) -> nn.Module:
    return importlib.import_module("timm").create_model(name, num_classes=10, drop_rate=0)


def torchvision(name: str) -> nn.Module:
    return getattr(importlib.import_module("torchvision.models"), name)(num_classes=10)


def mmpretrain_se() -> nn.Module:
    return importlib.import_module("mmpretrain.models.backbones").SEResNet(50)


# How many modules are fused, whether they are proven, and how many of all norms are folded.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, bool, tuple[int, int]]] = {
    "mmpretrain-50": (lambda: mmpretrain(50), 16, True, (71, 71)),
    "mmpretrain-101": (lambda: mmpretrain(101), 33, True, (139, 139)),
    "mmdet-50": (lambda: mmdet(50), 16, True, (71, 71)),
    "mmdet-101": (lambda: mmdet(101), 33, True, (139, 139)),
    "pytorchcv-resnesta18": (lambda: pytorchcv("resnesta18"), 8, True, (30, 30)),
    "pytorchcv-resnesta50": (lambda: pytorchcv("resnesta50"), 16, True, (71, 71)),
    # Squeeze-and-excitation, alone and with the norm in front, and selective kernels.
    "timm-seresnet50": (lambda: of_timm("seresnet50"), 16, True, (5, 53)),
    "timm-seresnext50": (lambda: of_timm("seresnext50_32x4d"), 16, True, (5, 53)),
    "timm-legacy_seresnet18": (lambda: of_timm("legacy_seresnet18"), 8, True, (4, 20)),
    "timm-regnety_002": (lambda: of_timm("regnety_002"), 13, True, (44, 44)),
    "timm-semnasnet": (lambda: of_timm("semnasnet_050"), 8, True, (49, 49)),
    "timm-skresnet50": (lambda: of_timm("skresnet50"), 16, True, (85, 85)),
    "torchvision-regnet_y_400mf": (lambda: torchvision("regnet_y_400mf"), 16, True, (16, 53)),
    "pytorchcv-seresnet18": (lambda: pytorchcv("seresnet18"), 8, True, (20, 20)),
    "pytorchcv-sknet50": (lambda: pytorchcv("sknet50"), 16, True, (85, 85)),
    "mmpretrain-seresnet50": (mmpretrain_se, 16, True, (4, 53)),
    "segmentation-models": (lambda: segmentation("timm-resnest14d"), 4, False, (22, 33)),
}


def tame(network: nn.Module) -> nn.Module:
    """Norms with small weights, as trained ones are: else a hundred layers amplify rounding."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data *= 0.3
    return network


def last(outputs: Any) -> Tensor:
    """The network's output, or the last of several."""
    return outputs[-1] if isinstance(outputs, list | tuple) else outputs


def results(network: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    network.train(training)
    network.zero_grad()
    out = last(network(x))
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=out.dtype))
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients, **{n: b.clone() for n, b in network.named_buffers()}}


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("make", "modules", "proven", "folded"), NETWORKS.values(), ids=NETWORKS)
def test_whole_networks(make, modules, proven, folded):
    torch.manual_seed(0)
    plain = tame(randomise(make())).double()
    network, x = copy.deepcopy(plain), torch.randn(8, 3, 32, 32).double()
    report = rf.fuse(network)
    assert len(report) == modules and not report.left_alone, report
    assert all(entry.proven == proven for entry in report.entries)
    for training in (False, True):
        found, expected = (results(each, x, training) for each in (network, plain))
        assert found.keys() == expected.keys()
        assert error(found["out"], expected["out"]) <= 1e-12
        for name, truth in expected.items():
            if not truth.is_floating_point():
                assert torch.equal(found[name], truth), name
            elif truth.dim() > 1:  # vectors may be zero but for rounding
                assert error(found[name], truth) <= 1e-9, name
    plain.load_state_dict(network.state_dict())
    network.eval()  # OpenMMLab's returns None
    plain.eval()
    with torch.no_grad():
        expected = last(plain(x[:2]))
        report = rf.fuse(network, fold=True)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
        assert (report.folded_norms, norms) == folded
        assert error(last(network(x[:2])), expected) <= 1e-12
        rf.unfuse(network)
        assert torch.equal(last(network(x[:2])), expected)
    assert [type(module) for module in network.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torchvision("efficientnet_b0"), "its activation is SiLU: the op would be slower"),
        (lambda: torchvision("mobilenet_v3_small"), "its gate is Hardsigmoid, expected a sigmoid"),
        (lambda: of_timm("efficientnet_b0"), "its activation is SiLU: the op would be slower"),
        (lambda: of_timm("mobilenetv3_small_050"), "its gate is Hardsigmoid, expected a sigmoid"),
    ],
)
def test_squeeze_and_excitation_that_is_left_alone(make, reason):
    report = rf.fuse(make())
    assert report.left_alone and not report.fused
    assert all(entry.reason.startswith(reason) for entry in report.left_alone)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "gmixer_12_224"])
def test_networks_without_any(name):
    assert not rf.fuse(of_timm(name)).entries


def test_mmcv_s_other_orders_are_not_folded():
    make = importlib.import_module("mmcv.cnn").ConvModule
    for options, folded in (({}, 1), ({"order": ("norm", "conv", "act")}, 0)):
        module = randomise(make(8, 8, 3, norm_cfg={"type": "BN"}, **options)).double().eval()
        x = features(2, 8, 5, 5).double()
        expected = module(x)
        assert rf.fuse(module, fold=True).folded_norms == folded
        torch.testing.assert_close(module(x), expected)


def test_what_openmmlab_s_eval_returns():
    with pytest.raises(TypeError, match=r"got NoneType; OpenMMLab's eval\(\) and train\(\) return"):
        rf.fuse(mmpretrain(50).eval())


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN"])
@pytest.mark.parametrize("groups", [1, 2])
def test_openmmlab_s_norms(norm, groups):
    make = importlib.import_module("mmpretrain.models.backbones.resnest").SplitAttentionConv2d
    config = {"type": norm} | ({"num_groups": 4} if norm == "GN" else {})
    module = randomise(make(8, 8, 3, padding=1, groups=groups, norm_cfg=config))
    if norm == "SyncBN":  # does not run on a CPU; it does as what MMEngine makes of it there
        assert len(rf.fuse(module)) == 1
        rf.unfuse(module)
        revert = importlib.import_module("mmengine.model").revert_sync_batchnorm
        module = revert(module)
        assert type(module.bn0).__name__ == "_BatchNormXd"
    assert_proven(module, features(8, 8, 5, 4))


@pytest.mark.parametrize(("dimensions", "size"), [(1, (7,)), (2, (5, 4)), (3, (3, 2, 4))])
def test_monai_s_squeeze_and_excitation(dimensions, size):
    """With linear layers, over maps of any dimensions; another gate is another function."""
    make = importlib.import_module("monai.networks.blocks").ChannelSELayer
    module = make(dimensions, 8, r=2, acti_type_1="relu", acti_type_2="sigmoid")
    assert_proven(randomise(module), torch.randn(6, 8, *size))
    residual = importlib.import_module("monai.networks.blocks").ResidualSELayer(dimensions, 8)
    assert not rf.fuse(residual)


def timm(**options: Any) -> nn.Module:
    make = importlib.import_module("timm.layers.split_attn").SplitAttn
    return randomise(make(8, **{"norm_layer": nn.BatchNorm2d} | options))


OPTIONS: dict[str, dict[str, Any]] = {
    "radix 1": {"radix": 1},
    "radix 4, two groups": {"radix": 4, "groups": 2},
    "another size": {
        "out_channels": 16,
        "kernel_size": 5,
        "stride": 2,
        "dilation": 2,
        "bias": True,
    },
    "rd_ratio": {"rd_ratio": 0.5, "rd_divisor": 4},
    "rd_channels": {"rd_channels": 6},
    "activation": {"act_layer": nn.SiLU},
    "no norm": {"norm_layer": None},
    "group norm": {"norm_layer": lambda features, **_: nn.GroupNorm(4, features)},
    "drop": {"drop_layer": nn.Identity},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_timm_s_options(options):
    module = timm(**options)
    plain = type("Plain", (type(module),), {})
    module.__class__ = plain  # a subclass is proven, timm's own class is trusted
    assert_proven(module, features(8, 8, 6, 5))


def test_timm_s_feature_extraction():
    """By torch.fx, which sees a fused module as one node and needs no list of leaves."""
    extract = importlib.import_module("timm.models._features_fx").create_feature_extractor
    network = importlib.import_module("timm").create_model("resnest14d").eval()
    images = torch.randn(1, 3, 64, 64)
    rf.fuse(network)
    found = extract(network, ["layer1.0.conv2", "layer4"])(images)
    assert torch.equal(found["layer4"], network.forward_features(images))
    assert found["layer1.0.conv2"].shape == (1, 64, 16, 16)


def test_detectron2_s_layout():
    """By stand-ins of detectron2's layers, since the package itself is on no index."""
    layers = define("detectron2.layers.wrappers", DETECTRON2_CONV)
    file = pasted(OFFICIAL, ("Conv2d, Module", "Module"), ("class SplAt", f"{IMPORT}class SplAt"))
    for groups in (1, 2):
        module = file.SplAtConv2d(
            8, 8, 3, padding=1, groups=groups, bias=False, norm_layer=nn.BatchNorm2d
        )
        assert type(module.fc1) is layers.Conv2d
        assert_proven(randomise(module), features(8, 8, 6, 5))
    called: list[int] = []
    rf.fuse(module)
    module.fc1.activation = lambda x: called.append(1) or x
    module(features(8, 8, 6, 5).double())
    assert called  # its forward is another one then


def test_detectron2_s_norms_fold():
    """They are children of their convolutions, which may have an activation, too."""
    make = define("detectron2.layers.wrappers", DETECTRON2_CONV).Conv2d
    model = randomise(
        nn.Sequential(
            make(4, 8, 3, norm=nn.BatchNorm2d(8), activation=torch.tanh),
            make(8, 8, 1, bias=False, norm=FrozenBatchNorm2d(8)),
            make(8, 4, 1, norm=nn.GroupNorm(2, 4)),
        )
    )
    assert_folds(model.double(), features(2, 4, 6, 5).double(), norms=2)


IMPORT = "from detectron2.layers.wrappers import Conv2d\n"
