"""The family: published sizes, every option, backbones, and what training needs."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import Tensor, nn

from resnest_fused import models
from resnest_fused.children import is_nothing
from resnest_fused.models import registry
from resnest_fused.models.drop import DropBlock2d, DropPath
from resnest_fused.models.pooling import Avd, GlobalPool
from resnest_fused.models.random_norms import randomize_norms
from resnest_fused.models.resnest import Bottleneck
from resnest_fused.models.variants import VARIANTS

# Millions of parameters and GMACs, as printed by timm's table and by the official repository.
TIMM = {
    "resnest14": (10.61, 2.76),
    "resnest26": (17.07, 3.64),
    "resnest50": (27.48, 5.40),
    "resnest101": (48.28, 13.38),
    "resnest200": (70.20, 35.69),
    "resnest269": (110.93, 77.69),
    "resnest50_fast_4s2x40d": (30.42, 4.40),
    "resnest50_fast_1s4x24d": (25.68, 4.43),
}
OFFICIAL = {
    "resnest50_fast_1s1x64d": (26.3, 4.34),
    "resnest50_fast_2s1x64d": (27.5, 4.34),
    "resnest50_fast_4s1x64d": (31.9, 4.35),
    "resnest50_fast_1s2x40d": (25.9, 4.38),
    "resnest50_fast_2s2x40d": (26.9, 4.38),
    "resnest50_fast_4s2x40d": (30.4, 4.41),
    "resnest50_fast_1s4x24d": (25.7, 4.42),
}
# Two of them are not those of the official package's own networks, which are as large as ours.
UNEXPLAINED = {26.3: 26.2, 4.41: 4.38}

# A narrow network, whose blocks are as those of the others.
SMALL = {"planes": (8, 16, 32, 64), "num_classes": 10}


def small(seed: int = 0, **options: object) -> models.ResNeSt:
    torch.manual_seed(seed)
    return models.resnest14(**SMALL | options)


def pictures(count: int = 2, side: int = 64, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, side, side, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_are_the_published_ones(name: str) -> None:
    """By tensors without content, whose shapes are all that counts.

    timm adds two operations for each element of a norm. The official repository counted by a tool
    for MXNet, which adds one for each bias, each element in a pooling's window, and each element of
    a ReLU; not, by these figures, of those in the attention.
    """
    variant = VARIANTS[name]
    with torch.device("meta"):
        model = models.create(name, fused=False).eval()
        x = torch.zeros(1, 3, variant.size, variant.size)
    macs = of_norms = of_others = 0
    windows = {nn.MaxPool2d: 9, Avd: 9, nn.AvgPool2d: 4, nn.Identity: 1, nn.ReLU: 1}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal macs, of_norms, of_others
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            macs += out.numel() * module.weight[0].numel()
            of_others += 0 if module.bias is None else out.numel()
        elif isinstance(module, nn.BatchNorm2d):
            of_norms += 2 * out.numel()
        elif isinstance(module, GlobalPool):
            of_others += inputs[0].numel()
        else:
            of_others += windows.get(type(module), 0) * out.numel()

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(x)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, macs) == (variant.parameters, variant.macs)
    if name in TIMM:
        found = round(parameters / 1e6, 2), round((macs + of_norms) / 1e9, 2)
        assert found == TIMM[name]
    if name in OFFICIAL:
        found = round(parameters / 1e6, 1), round((macs + of_others) / 1e9, 2)
        assert found == tuple(UNEXPLAINED.get(figure, figure) for figure in OFFICIAL[name])
    assert name in {**TIMM, **OFFICIAL, "resnest152": None}


def test_every_variant_has_a_function_and_a_name() -> None:
    assert models.list_models() == list(VARIANTS)
    assert {
        name for name in dir(models) if name.startswith("resnest") and name != "resnest"
    } == set(VARIANTS)
    assert registry.preprocessing("resnest269", nn.Identity()).size == 416
    assert "27.48 M parameters" in str(models.resnest50.__doc__)


OPTIONS = {
    "plain convolution": {"radix": 0},
    "radix 1": {"radix": 1, "avd_first": True},
    "radix 4": {"radix": 4, "cardinality": 2, "bottleneck_width": 32},
    "SiLU": {"act_layer": nn.SiLU, "avd": False},
    "ResNet's stem and shortcuts": {"deep_stem": False, "avg_down": False, "in_chans": 5},
    "no norms to fuse": {"norm_layer": functools.partial(nn.GroupNorm, 4), "global_pool": "avgmax"},
    "dilated, official": {"output_stride": 8},
    "dilated, timm": {"output_stride": 16, "dilation_style": "timm", "global_pool": "max"},
    "dilated, mm": {"output_stride": 8, "dilation_style": "mm"},
    "dropped": {
        "drop_rate": 0.2,
        "drop_path_rate": 0.3,
        "drop_block_rate": 0.2,
    },
    "dropped behind": {"drop_block_rate": 0.2, "drop_block_style": "gluon", "radix": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fused_equals_reference(options: dict[str, object]) -> None:
    """In eval and in a training step, with the same random drops."""
    plain = small(**options, fused=False)
    if "in_chans" not in options:
        randomize_norms(plain, 64, seed=0)
    fused = small(**options)
    fused.load_state_dict(plain.state_dict(), strict=True)
    x = pictures(4, 40, plain.in_chans)
    for training in (False, True):
        found = []
        for model in (plain, fused):
            model.double().train(training).zero_grad()
            torch.manual_seed(2)
            with torch.set_grad_enabled(training):
                logits = model(x)
            if training:
                logits.logsumexp(1).sum().backward()
            found.append([logits, *(p.grad for p in model.parameters() if training)])
        for name, a, b in zip(
            ("logits", *(n for n, _ in plain.named_parameters())), *found, strict=False
        ):
            # bn1 removes the gradient of fc1's bias.
            scale = 0.0 if name.endswith("fc1.bias") else float(a.detach().abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * scale + 1e-12, msg=name)
    for a, b in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("style", ["official", "timm", "mm"])
def test_dilation_keeps_weights_and_size(style: str, stride: int) -> None:
    model = small(output_stride=stride, dilation_style=style, out_indices=(1, 2, 3, 4))
    strides = [min(s, stride) for s in (4, 8, 16, 32)]
    assert [m.shape[-1] for m in model(pictures().float())] == [64 // s for s in strides]
    assert [info["reduction"] for info in model.feature_info] == [2, *strides]
    keys = {key for key in small(fused=False).state_dict() if not key.startswith("fc.")}
    assert set(model.state_dict()) == keys
    dilations = [block.conv2.conv.dilation[0] for block in model.blocks()]
    last = {"mm": 32 // stride, "official": 16 // stride, "timm": 16 // stride}[style]
    assert dilations[3] == max(last, 1)


WRONG = {
    "output_stride": (8.0, r"expected one of 8, 16, 32, got 8\.0"),
    "dilation_style": ("mmdet", "expected one of 'official', 'timm', 'mm', got 'mmdet'"),
    "global_pool": ("catavgmax", "expected one of 'avg', 'max', 'avgmax', '', got 'catavgmax'"),
    "drop_rate": (1, "expected a number from 0 to below 1, got 1"),
    "drop_path_rate": (-0.1, "expected a number from 0 to below 1, got -0.1"),
    "drop_block_rate": (2.0, "expected a number from 0 to below 1, got 2.0"),
    "drop_block_style": ("all", "expected one of 'official', 'gluon', 'timm', got 'all'"),
    "radix": (-1, "expected an integer from 0 on, got -1"),
    "num_classes": (-1, "expected an integer from 0 on, got -1"),
    "frozen_stages": (1.0, r"expected one of -1, 0, 1, 2, 3, 4, got 1\.0"),
    "conv_layer": ([nn.Conv2d] * 4, "expected one or five, got 4"),
    "norm_layer": ("bn", "expected a class or a function that makes it, got 'bn'"),
    "act_layer": ("relu", "expected a class or a function that makes it, got 'relu'"),
    "out_indices": ((1, 5), r"expected different numbers from 0 to 4, .*, got \(1, 5\)"),
    "layers": ((1, 2, 3), r"expected four integers from 0 on, got \(1, 2, 3\)"),
    "planes": ((8, 8, 8, 0), r"expected four integers from 1 on, got \(8, 8, 8, 0\)"),
    "cardinality": (0, "expected an integer from 1 on, got 0"),
    "bottleneck_width": (2.5, "expected an integer from 1 on, got 2.5"),
    "stem_width": (None, "expected an integer from 1 on, got None"),
    "in_chans": (True, "expected an integer from 1 on, got True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_named(name: str) -> None:
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^{name}: {message}$"):
        small(**{name: value})
    with pytest.raises(ValueError, match="global_pool: '' takes num_classes=0, got 10"):
        small(global_pool="")
    with pytest.raises(ValueError, match="drop_rate: expected a number from 0"):
        small(drop_rate=None)
    for layers in (3, "conv", [nn.Conv2d] * 4 + [None]):
        with pytest.raises(ValueError, match=r"^conv_layer: expected a class or a function"):
            small(conv_layer=layers)
    for stages, radix in (((8, 16, 32, 64), 3), ((6, 12, 24, 48), 4)):
        with pytest.raises(ValueError, match=f"^radix: .* {stages[0]} channels, got {radix} times"):
            small(planes=stages, radix=radix)
    assert small(planes=(6, 12, 24, 48), radix=3).layer1[0].conv2.radix == 3
    with pytest.raises(ValueError, match=r"^drop_path: no such option; did you mean drop_path_ra"):
        small(drop_path=0.1)
    for given in ({"sha256": "0" * 8}, {"leave_out": ("fc",)}):
        with pytest.raises(ValueError, match=r"^weights: expected a checkpoint for sha256 and "):
            models.create("resnest14", **given)
    for indices in (3, (), (1, 1), (1.0,), (True,), {1: "a", 2: "a"}, {1: ""}):
        with pytest.raises(ValueError, match="out_indices"):
            small(out_indices=indices)


def test_maps_are_those_of_the_classifier(tmp_path) -> None:
    whole = small().double().eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    x = pictures()
    last = whole.forward_features(x)
    assert torch.equal(whole(x), whole.forward_head(last))
    maps = small(out_indices=(4, 0), seed=1).double().eval()
    maps.load_state_dict({k: v for k, v in whole.state_dict().items() if k[:3] != "fc."})
    found = maps(x)
    assert torch.equal(found[0], last) and found[1].shape == (2, 64, 32, 32)
    # A backbone takes a whole checkpoint; stages behind its last map are not there.
    narrow = {"planes": SMALL["planes"]}
    path = tmp_path / "whole.pth"
    body = models.backbone("resnest14", path, out_indices={2: "a", 1: "b"}, **narrow)
    assert not hasattr(body, "layer3") and not hasattr(body, "fc")
    assert list(body.double().eval()(x)) == ["a", "b"] and body.num_features == 64
    assert len(models.create("resnest14", features_only=True, **narrow)(x.float())) == 5
    with pytest.raises(ValueError, match="backbone: expected one of resnest14"):
        models.backbone("timm:resnest50d")
    with pytest.raises(models.CheckpointError, match=r"2 of another shape \(layer1.0.conv2.conv"):
        state = whole.state_dict()
        for name in ("conv.weight", "bn0.weight"):
            state[f"layer1.0.conv2.{name}"] = torch.ones(1)
        torch.save(state, tmp_path / "other.pth")
        models.backbone("resnest14", tmp_path / "other.pth", **narrow)
    features = models.create("resnest14", path, **narrow, num_classes=0)
    assert torch.equal(features.double().eval()(x), whole.forward_head(last, pre_logits=True))
    for name, leave_out in (("features", ("fc",)), ("backbone", ("fc", "layer4"))):
        options = {"num_classes": 0} if name == "features" else {"out_indices": (1,)}
        models.create("resnest14", path, leave_out=leave_out, **narrow, **options)
    for model, classes, message in (
        (body, 3, "reset_classifier: a backbone has no classifier"),
        (features, -1, "num_classes: expected an integer from 0 on, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(classes)
    features.reset_classifier(3)
    assert features(x).shape == (2, 3)
    with pytest.raises(models.CheckpointError, match=r"2 of another shape \(fc.weight"):
        models.load_checkpoint(features, path)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_a_pretrained_stem_takes_other_channels(channels: int, tmp_path) -> None:
    model = small()
    torch.save(model.state_dict(), tmp_path / "rgb.pth")
    adapted = models.create("resnest14", tmp_path / "rgb.pth", **SMALL, in_chans=channels)
    expected, found = model.state_dict(), adapted.state_dict()
    weight = expected["conv1.0.weight"]
    colours = [0, 1, 2, 0, 1, 2, 0][:channels]
    # Grey pictures give the same map, but for colours that do not come equally often.
    expected["conv1.0.weight"] = weight[:, colours] * (3 / channels)
    if channels == 1:
        expected["conv1.0.weight"] = weight.sum(1, keepdim=True)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_a_stem_is_adapted_only_if_that_is_asked_for(tmp_path) -> None:
    torch.save(small(in_chans=4).state_dict(), tmp_path / "four.pth")
    with pytest.raises(models.CheckpointError, match=r"1 of another shape \(conv1\.0\.weight"):
        models.create("resnest14", tmp_path / "four.pth", **SMALL)


def test_zero_init_last_makes_blocks_their_shortcuts() -> None:
    block = small(zero_init_last=True).layer2[0].eval()
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(block(x), torch.relu(block.downsample(x)))
    assert not any(torch.any(b.bn3.weight) for b in small(zero_init_last=True).blocks())
    assert all(torch.all(b.bn3.weight == 1) for b in small().blocks())


def test_drop_path() -> None:
    drop = DropPath(0.25)
    x = torch.ones(40_000, 1, 1, 1)
    out = drop(x)
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert out.mean() == pytest.approx(1, abs=0.02)
    assert drop.eval()(x) is x
    rates = [b.drop_path and b.drop_path.rate for b in small(drop_path_rate=0.3).blocks()]
    assert rates == [None, pytest.approx(0.1), pytest.approx(0.2), 0.3]
    # A dropped sample leaves an identity block unchanged.
    block = Bottleneck(256, 64, nn.BatchNorm2d, drop_path=1 - 1e-9)
    x = torch.rand(4, 256, 6, 6)
    assert torch.equal(block(x), x) and not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_drop_block(dtype: torch.dtype) -> None:
    drop = DropBlock2d(0.1, block_size=3)
    x = torch.ones(16, 32, 20, 20, dtype=dtype)
    out = drop(x)
    zeros = out == 0
    # Overlapping blocks drop less than the rate, and what is left is scaled to the same mean.
    assert 0.07 < zeros.double().mean() < 0.1
    assert out.dtype == dtype and out.double().mean() == pytest.approx(1, abs=4e-3)
    # Every zero is part of a block of 3x3 zeros.
    whole = -nn.functional.max_pool2d(-zeros.float(), 3, stride=1)
    blocks = nn.functional.max_pool2d(nn.functional.pad(whole, [2] * 4), 3, stride=1)
    assert torch.equal(blocks.bool(), zeros)
    assert not torch.equal(zeros[0, 0], zeros[0, 1]) and not torch.equal(zeros[0], zeros[1])
    assert drop.eval()(x) is x
    assert DropBlock2d(0.5, 7)(torch.ones(2, 2, 3, 2)).shape == (2, 2, 3, 2)
    drop = DropBlock2d(0.0, block_size=3)
    assert torch.equal(drop(x), x)


def test_drop_block_s_places_and_schedule() -> None:
    def places(style: str) -> list[str]:
        model = small(drop_block_rate=0.1, drop_block_style=style)
        assert not any(isinstance(m, DropBlock2d) for m in model.layer2.modules())
        return [n for n, m in model.layer3[0].named_modules() if isinstance(m, DropBlock2d)]

    assert places("official") == ["drop_block1", "conv2.drop", "drop_block3"]
    assert places("gluon") == ["drop_block1", "drop_block2", "drop_block3"]
    assert places("timm") == ["conv2.drop"]
    model = small(drop_block_rate=0.1, drop_block_style="timm")
    sizes = [
        (layer[0].conv2.drop.block_size, layer[0].conv2.drop.scale) for layer in model.stages()[2:]
    ]
    assert sizes == [(5, 0.25), (3, 1.0)]
    for progress in (0.0, 0.5, 1.0):
        model.set_drop_block(progress)
        assert float(model.layer4[0].conv2.drop.rate) == pytest.approx(0.1 * progress)
    assert list(model.state_dict()) == list(small().state_dict())
    with pytest.raises(ValueError, match="progress: expected a number from 0 to 1, got 2"):
        model.set_drop_block(2)
    # In eval mode it costs nothing: the op takes bn0 too.
    drop = model.layer4[0].conv2.drop
    assert not is_nothing(drop) and is_nothing(drop.eval())
    drop.register_forward_hook(lambda *_: None)
    assert not is_nothing(drop)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_gradient_checkpointing_changes_no_bit(momentum: float | None, fused: bool) -> None:
    """Neither of gradients nor of running statistics, in two steps with random drops."""
    norm = functools.partial(nn.BatchNorm2d, momentum=momentum)
    options = {"drop_path_rate": 0.2, "drop_block_rate": 0.2, "norm_layer": norm, "fused": fused}
    plain, saving = small(**options), small(**options)
    saving.set_grad_checkpointing()
    x, found, kept = pictures(3).float(), [], []
    for model in (plain, saving):
        buffers = dict(model.named_buffers())
        torch.manual_seed(5)
        sizes: list[int] = []
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
            ):
                loss = model(x).logsumexp(1).sum()
            loss.backward()
        assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
        grads = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
        found.append({"loss": loss} | grads | buffers)
        kept.append(sum(sizes))
    assert [k for k, value in found[0].items() if not torch.equal(value, found[1][k])] == []
    assert kept[1] < 0.8 * kept[0]  # most is the stem's, which is not computed again
    assert torch.equal(saving.eval()(x), saving(x))


@pytest.mark.long  # compiles
def test_gradient_checkpointing_compiled() -> None:
    plain, saving = small().double(), small().double()
    saving.set_grad_checkpointing()
    compiled = torch.compile(saving, fullgraph=True, backend="aot_eager")
    for model in (plain, compiled):
        model(pictures(3)).logsumexp(1).sum().backward()
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_frozen_stages() -> None:
    model = small(frozen_stages=2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(pictures().float()).sum().backward()
    for name, p in model.named_parameters():
        frozen = name.startswith(("conv1.", "bn1.", "layer1.", "layer2."))
        assert p.requires_grad is (p.grad is not None) is not frozen
    changed = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert changed and all(name.startswith(("layer3", "layer4")) for name in changed)
    assert model.layer3.training and not model.layer2.training
    assert all(p.requires_grad for p in small().parameters())


class Shifted(nn.Module):
    """Stands for a convolution of another kind, such as a deformable one, with a conv inside."""

    def __init__(self, *sizes: int, **options: object) -> None:
        super().__init__()
        self.offset = nn.Conv2d(sizes[0], 1, 1)
        nn.init.zeros_(self.offset.weight)
        self.inner = nn.Conv2d(*sizes, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.offset(x))


def test_a_conv_factory() -> None:
    model = small(conv_layer=[nn.Conv2d, nn.Conv2d, nn.Conv2d, Shifted, Shifted]).double().eval()
    kinds = [type(block.conv2.conv) for block in model.blocks()]
    assert kinds == [nn.Conv2d, nn.Conv2d, Shifted, Shifted]
    assert not torch.any(model.layer3[0].conv2.conv.offset.weight)
    assert model.layer3[0].conv2.conv.inner.groups == 2
    everywhere = small(conv_layer=Shifted, radix=0)
    assert sum(isinstance(module, Shifted) for module in everywhere.modules()) == 7
    plain = small(conv_layer=[nn.Conv2d, nn.Conv2d, nn.Conv2d, Shifted, Shifted], fused=False)
    plain.load_state_dict(model.state_dict())
    x = pictures()
    torch.testing.assert_close(model(x), plain.double().eval()(x), rtol=1e-9, atol=1e-9)


def test_a_network_with_drops_is_copied_and_pickled() -> None:
    model = small(drop_block_rate=0.1, drop_path_rate=0.1, act_layer=nn.SiLU).eval()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    x = pictures().float()
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), model(x))
