"""Every wrong input raises the error that names the tensor, what was expected and what came."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_peers import official, timm

import resnest_fused as rf
from resnest_fused.functional import attend

B, C, R, K, INTER = 3, 12, 2, 2, 6
DEVICE = torch.empty(0).device


def _arguments() -> dict[str, Any]:
    """Valid arguments of ``rf.split_attention``, by name."""
    return {
        "x": torch.randn(B, R * C, 4, 5),
        "fc1_weight": torch.randn(INTER, C // K, 1, 1),
        "fc1_bias": torch.randn(INTER),
        "fc2_weight": torch.randn(R * C, INTER // K, 1, 1),
        "fc2_bias": torch.randn(R * C),
        "radix": R,
        "cardinality": K,
        "bn0": _norm(R * C),
        "bn1": _norm(INTER),
        "training": True,
    }


def _norm(features: int) -> rf.BatchNormArgs:
    return rf.BatchNormArgs(
        torch.randn(features),
        torch.randn(features),
        torch.randn(features),
        torch.rand(features) + 0.5,
    )


def _norms() -> list[tuple[type[Exception], str, Callable[[dict[str, Any]], dict[str, Any]]]]:
    """What can be wrong with either bn0 or bn1."""
    wrong: list[tuple[type[Exception], str, Callable[[dict[str, Any]], dict[str, Any]]]] = []
    for bn, features in (("bn0", R * C), ("bn1", INTER)):
        for field in ("weight", "bias", "running_mean", "running_var"):
            wrong += [
                (
                    ValueError,
                    f"{bn}.{field}: expected shape ({features},), got (5,)",
                    lambda a, bn=bn, field=field: {bn: a[bn]._replace(**{field: torch.ones(5)})},
                ),
                (
                    TypeError,
                    f"{bn}.{field}: expected x's torch.float32, got torch.float64",
                    lambda a, bn=bn, field=field: {
                        bn: a[bn]._replace(**{field: getattr(a[bn], field).double()})
                    },
                ),
                (
                    ValueError,
                    f"{bn}.{field}: expected on {DEVICE} as x is, got meta",
                    lambda a, bn=bn, field=field: {
                        bn: a[bn]._replace(**{field: getattr(a[bn], field).to("meta")})
                    },
                ),
            ]
            wrong.append(
                (
                    TypeError,
                    f"{bn}.{field}: expected a tensor or None, got float",
                    lambda a, bn=bn, field=field: {bn: a[bn]._replace(**{field: 1.0})},
                )
            )
        wrong += [
            (
                TypeError,
                f"{bn}: expected BatchNormArgs or None, got BatchNorm2d",
                lambda a, bn=bn, features=features: {bn: torch.nn.BatchNorm2d(features)},
            ),
            *(
                (
                    TypeError,
                    f"{bn}.eps: expected a number, got {eps!r}",
                    lambda a, bn=bn, eps=eps: {bn: a[bn]._replace(eps=eps)},
                )
                for eps in (None, "1e-5", torch.tensor(1e-5))
            ),
            *(
                (
                    ValueError,
                    f"{bn}.eps: expected {least}, got {eps}",
                    lambda a, bn=bn, eps=eps, batch=batch: {
                        bn: a[bn]._replace(eps=eps, batch_stats=batch)
                    },
                )
                for batch, least, wrong_eps in (
                    (True, "more than 0 with batch statistics", (0, 0.0, -1e-5, float("nan"))),
                    (False, "at least 0", (-1, -1e-5, float("nan"))),
                )
                for eps in wrong_eps
            ),
            *(
                (
                    TypeError,
                    f"{bn}.momentum: expected a number, got {momentum!r}",
                    lambda a, bn=bn, momentum=momentum: {
                        bn: a[bn]._replace(momentum=momentum, batch_stats=True)
                    },
                )
                for momentum in (None, "0.1", torch.tensor(0.1))
            ),
            *(
                (
                    error,
                    f"{bn}.num_batches_tracked: expected {expected}",
                    lambda a, bn=bn, counter=counter: {
                        bn: a[bn]._replace(num_batches_tracked=counter, batch_stats=True)
                    },
                )
                for error, expected, counter in (
                    (TypeError, "a tensor or None, got int", 5),
                    (TypeError, "a number, got torch.bool", torch.tensor(True)),
                    (ValueError, "one number, got shape (2,)", torch.tensor([1, 2])),
                    (
                        ValueError,
                        f"on {DEVICE} as x is, got meta",
                        torch.tensor(0, device="meta"),
                    ),
                )
            ),
            *(
                (
                    ValueError,
                    f"{bn}.{field}: expected memory for each feature, got an expanded one",
                    lambda a, bn=bn, field=field, features=features: {
                        bn: a[bn]._replace(
                            **{field: torch.ones(1).expand(features)}, batch_stats=True
                        )
                    },
                )
                for field in ("running_mean", "running_var")
            ),
        ]
        for field in ("running_mean", "running_var"):
            wrong.append(
                (
                    ValueError,
                    f"{bn}: expected running_mean and running_var both given or both None",
                    lambda a, bn=bn, field=field: {bn: a[bn]._replace(**{field: None})},
                )
            )
    return wrong


# The error, its whole message, and the arguments that cause it.
WRONG: list[tuple[type[Exception], str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    (ValueError, "radix: expected at least 1, got 0", lambda a: {"radix": 0}),
    (ValueError, "radix: expected at least 1, got -1", lambda a: {"radix": -1}),
    (ValueError, "cardinality: expected at least 1, got 0", lambda a: {"cardinality": 0}),
    *(
        (
            TypeError,
            f"{name}: expected an integer, got {count!r}",
            lambda a, name=name, count=count: {name: count},
        )
        for name in ("radix", "cardinality")
        for count in (2.0, np.float64(2), True, "2", None, torch.tensor(2))
    ),
    *(
        (
            TypeError,
            f"x: expected a tensor, got {type(x).__name__}",
            lambda a, x=x: {"x": x},
        )
        for x in (None, np.zeros((B, R * C, 4, 5), np.float32), [[1.0]])
    ),
    *(
        (
            TypeError,
            f"{name}: expected a tensor{or_none}, got {type(wrong).__name__}",
            lambda a, name=name, wrong=wrong: {name: wrong},
        )
        for name, or_none, wrongs in (
            ("fc1_weight", "", (None, np.zeros((INTER, C // K, 1, 1), np.float32))),
            ("fc2_weight", "", (None, 1.0)),
            ("fc1_bias", " or None", (np.zeros(INTER, np.float32), 0.0)),
            ("fc2_bias", " or None", ([0.0] * (R * C), 0)),
        )
        for wrong in wrongs
    ),
    (
        ValueError,
        "x: expected channels divisible by radix=5, got 24",
        lambda a: {"radix": 5},
    ),
    (
        ValueError,
        "x: expected channels divisible by radix=2, got 0",
        lambda a: {"x": torch.randn(B, 0, 4, 5)},
    ),
    (
        ValueError,
        "x: expected channels/radix divisible by cardinality=5, got 24/2=12",
        lambda a: {"cardinality": 5},
    ),
    (
        ValueError,
        "fc1_weight: expected rows divisible by cardinality=4, got 6",
        lambda a: {"cardinality": 4},
    ),
    (
        ValueError,
        "fc1_weight: expected rows divisible by cardinality=2, got 0",
        lambda a: {"fc1_weight": torch.randn(0, 6, 1, 1)},
    ),
    *(
        (
            TypeError,
            f"x: expected float32, float64, bfloat16 or float16, got {dtype}",
            lambda a, dtype=dtype: {"x": a["x"].to(dtype)},
        )
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)
    ),
    (
        ValueError,
        "x: expected 4 dimensions (B, R*C, H, W), got shape (24, 4, 5)",
        lambda a: {"x": a["x"][0]},
    ),
    (
        ValueError,
        "x: expected 4 dimensions (B, R*C, H, W), got shape (3, 24, 4, 5, 1)",
        lambda a: {"x": a["x"][..., None]},
    ),
    (
        ValueError,
        "x: expected at least one pixel, got height=0 and width=5",
        lambda a: {"x": a["x"][:, :, :0]},
    ),
    (
        ValueError,
        "x: expected at least one pixel, got height=4 and width=0",
        lambda a: {"x": a["x"][..., :0]},
    ),
    (
        ValueError,
        "x: expected 24 channels, as fc1_weight and fc2_weight have, got 32",
        lambda a: {"x": torch.randn(B, 32, 4, 5)},
    ),
    (
        ValueError,
        "fc1_weight: expected shape (6, 6, 1, 1), got (6, 12, 1, 1)",
        lambda a: {"fc1_weight": torch.randn(6, 12, 1, 1)},
    ),
    (
        ValueError,
        "fc1_weight: expected 4 dimensions (I, C/K, 1, 1), got shape (6, 6)",
        lambda a: {"fc1_weight": a["fc1_weight"].flatten(1)},
    ),
    (
        ValueError,
        "fc1_weight: expected shape (6, 6, 1, 1), got (6, 6, 3, 3)",
        lambda a: {"fc1_weight": torch.randn(6, 6, 3, 3)},
    ),
    (
        ValueError,
        "fc1_weight: expected 4 dimensions (I, C/K, 1, 1), got shape ()",
        lambda a: {"fc1_weight": torch.tensor(1.0)},
    ),
    (
        ValueError,
        "fc2_weight: expected shape (24, 3, 1, 1), got (12, 3, 1, 1)",
        lambda a: {"fc2_weight": a["fc2_weight"][:12]},
    ),
    (
        ValueError,
        "fc2_weight: expected shape (24, 3, 1, 1), got (24, 6, 1, 1)",
        lambda a: {"fc2_weight": torch.randn(24, 6, 1, 1)},
    ),
    (
        ValueError,
        "fc1_bias: expected shape (6,), got (1,)",
        lambda a: {"fc1_bias": torch.randn(1)},
    ),
    (
        ValueError,
        "fc2_bias: expected shape (24,), got (12,)",
        lambda a: {"fc2_bias": torch.randn(12)},
    ),
    *(
        (
            TypeError,
            f"{name}: expected x's torch.float32, got torch.float16",
            lambda a, name=name: {name: a[name].half()},
        )
        for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    ),
    (
        TypeError,
        "fc1_weight: expected x's torch.float32, got torch.int64",
        lambda a: {"fc1_weight": a["fc1_weight"].long()},
    ),
    (
        TypeError,
        "fc1_weight: expected x's torch.bfloat16 or torch.float32, got torch.float16",
        lambda a: {"x": a["x"].bfloat16(), "fc1_weight": a["fc1_weight"].half()},
    ),
    (
        TypeError,
        "fc2_bias: expected its weight's torch.float32, got torch.bfloat16",
        lambda a: {"x": a["x"].bfloat16(), "fc2_bias": a["fc2_bias"].bfloat16()},
    ),
    *(
        (
            ValueError,
            f"{name}: expected on {DEVICE} as x is, got meta",
            lambda a, name=name: {name: a[name].to("meta")},
        )
        for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    ),
    (
        ValueError,
        f"fc1_weight: expected on meta as x is, got {DEVICE}",
        lambda a: {"x": a["x"].to("meta")},
    ),
    (
        ValueError,
        "bn0: Expected more than 1 value per channel when training, got input size [1, 24, 1, 1]",
        lambda a: {"x": a["x"][:1, :, :1, :1]},
    ),
    (
        ValueError,
        "bn1: Expected more than 1 value per channel when training, got input size [1, 6, 1, 1]",
        lambda a: {"x": a["x"][:1]},
    ),
    (
        ValueError,
        "bn1: Expected more than 1 value per channel when training, got input size [1, 6, 1, 1]",
        lambda a: {
            "x": a["x"][:1],
            "training": False,
            "bn1": a["bn1"]._replace(running_mean=None, running_var=None),
        },
    ),
    (
        ValueError,
        "backend: expected one of auto, native, triton, reference, got 'fast'",
        lambda a: {"backend": "fast"},
    ),
    *_norms(),
]


# With batch statistics Python checks the arguments at once, otherwise it tries the op first.
WAYS: dict[str, dict[str, Any]] = {
    "bn0": {},
    "bn0-eval": {"training": False},
    "relu": {"bn0": None, "relu": True},
    "relu-eval": {"bn0": None, "relu": True, "training": False},
    "plain-eval": {"bn0": None, "training": False},
}


def _applies(way: str, message: str) -> bool:
    needs_bn0 = message.startswith("bn0")
    needs_training = "when training" in message
    return not (needs_bn0 and "bn0" not in way) and not (needs_training and "eval" in way)


def _assert_raises(
    call: Callable[..., torch.Tensor],
    wrong: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """The call raises this error, and leaves running statistics as they were."""
    norms = [wrong[name] for name in ("bn0", "bn1") if isinstance(wrong.get(name), tuple)]
    before = copy.deepcopy(norms)
    with pytest.raises(error, match=f"^{re.escape(message)}$") as raised:
        call(**wrong)
    assert type(raised.value) is error
    for norm, kept in zip(norms, before, strict=True):
        for ours, expected in zip(norm[2:4], kept[2:4], strict=True):
            if isinstance(ours, torch.Tensor) and ours.device == DEVICE:
                assert torch.equal(ours, expected), "a failing call changed running statistics"


@pytest.mark.parametrize(
    ("error", "message", "change", "way"),
    [(*wrong, way) for wrong in WRONG for way in WAYS if _applies(way, wrong[1])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_argument(
    error: type[Exception],
    message: str,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    way: str,
) -> None:
    arguments = _arguments() | WAYS[way]
    rf.split_attention(**arguments)
    _assert_raises(rf.split_attention, arguments | change(arguments), error, message)


# --- around any map from gap to logits


def _attend_arguments(way: str) -> dict[str, Any]:
    arguments = _arguments() | WAYS[way]
    kept = {name: arguments[name] for name in ("x", "radix", "cardinality", "bn0", "training")}
    return {**kept, "relu": "relu" in way, "mlp": lambda gap: torch.cat((gap, gap), dim=1)}


# What is wrong with x, radix, cardinality, bn0 or backend.
WRONG_MAP = [wrong for wrong in WRONG if not re.search("^fc|^bn1|as fc1_weight", wrong[1])]


@pytest.mark.parametrize(
    ("error", "message", "change", "way"),
    [(*wrong, way) for wrong in WRONG_MAP for way in WAYS if _applies(way, wrong[1])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_argument_of_attend(
    error: type[Exception],
    message: str,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    way: str,
) -> None:
    arguments = _attend_arguments(way)
    attend(**arguments)
    never_called: Any = None
    wrong = arguments | change(arguments) | {"mlp": never_called}
    _assert_raises(attend, wrong, error, message)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "shape",
    [(B, R * C), (B, C, 1, 1), (1, R * C, 1, 1), (B, R * C, 4, 5), (B, R, C, 1, 1), ()],
    ids=str,
)
def test_logits_of_another_shape(shape: tuple[int, ...], way: str) -> None:
    wrong = _attend_arguments(way) | {"mlp": lambda gap: gap.new_zeros(shape)}
    message = f"logits: expected shape ({B}, {R * C}, 1, 1), got {shape}"
    _assert_raises(attend, wrong, ValueError, message)


def test_module_whose_fc2_gives_other_logits() -> None:
    module = rf.FusedSplitAttention(8, norm_layer=lambda n: torch.nn.GroupNorm(4, n))
    module.fc2 = torch.nn.Conv2d(32, 15, 1)
    message = "logits: expected shape (2, 16, 1, 1), got (2, 15, 1, 1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        module(torch.randn(2, 16, 4, 4))


def test_one_sample_in_training_is_refused_as_pytorch_refuses_it() -> None:
    messages = []
    for module in (rf.SplitAttention(8), rf.FusedSplitAttention(8)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as raised:
            module(torch.randn(1, 16, 4, 4))
        messages.append(str(raised.value).replace("torch.Size(", "").replace(")", ""))
    assert messages[1] == f"bn1: {messages[0]}"


@pytest.mark.parametrize("module", [rf.SplitAttention, rf.FusedSplitAttention])
@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("channels must be at least 1, got 0", {"channels": 0}),
        ("radix must be at least 1, got 0", {"channels": 8, "radix": 0}),
        ("cardinality must be at least 1, got -1", {"channels": 8, "cardinality": -1}),
        ("reduction must be at least 1, got 0", {"channels": 8, "reduction": 0}),
        (
            "cardinality must divide channels, got cardinality=3 and channels=8",
            {"channels": 8, "cardinality": 3},
        ),
        (
            "cardinality must divide inter_channels, got cardinality=2 and inter_channels=5",
            {"channels": 8, "cardinality": 2, "inter_channels": 5},
        ),
        ("inter_channels must be at least 1, got 0", {"channels": 8, "inter_channels": 0}),
        *(
            (f"{name} must be an integer, got {count!r}", {"channels": 8, name: count})
            for name in ("channels", "radix", "cardinality", "inter_channels", "reduction")
            for count in (2.0, True, "2", np.float32(2))
        ),
        ("radix must be an integer, got None", {"channels": 8, "radix": None}),
    ],
)
def test_wrong_module_option(
    module: type[torch.nn.Module], message: str, options: dict[str, int]
) -> None:
    error = TypeError if "integer" in message else ValueError
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        module(**options)


@pytest.mark.parametrize("module", [rf.SplitAttentionConv2d, rf.FusedSplitAttentionConv2d])
def test_wrong_conv_module_option(module: type[torch.nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"^in_channels must be at least 1, got 0$"):
        module(0, 8, 3)
    for name in ("in_channels", "channels", "radix", "cardinality", "inter_channels", "reduction"):
        options = {"in_channels": 8, "channels": 8, "kernel_size": 3} | {name: 4.0}
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got 4.0$"):
            module(**options)


def test_numpy_s_integers_count() -> None:
    two, sixteen = np.int64(2), np.int32(16)
    module = rf.FusedSplitAttention(sixteen, two, two, sixteen)
    x = torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(module(x), rf.SplitAttention.forward(module, x))
    assert {type(module.channels), type(module.radix), type(module.cardinality)} == {int}
    arguments = _arguments()
    for way in WAYS.values():
        plain = rf.split_attention(**arguments | way)
        counted = rf.split_attention(**arguments | way | {"radix": two, "cardinality": two})
        assert torch.equal(plain, counted)


@pytest.mark.parametrize("wrong", [None, np.zeros((2, 16, 4, 4), np.float32), [1.0]])
@pytest.mark.parametrize("make", [rf.SplitAttention, rf.FusedSplitAttention])
def test_module_given_no_tensor(make: type[torch.nn.Module], wrong: object) -> None:
    for module in (make(8), make(8).eval()):
        message = f"^x: expected a tensor, got {type(wrong).__name__}$"
        with pytest.raises(TypeError, match=message):
            module(wrong)
    conv = rf.FusedSplitAttentionConv2d(8, 8, 3)
    with pytest.raises(TypeError, match="conv2d"):  # PyTorch's own, as before fusing
        conv(wrong)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), 1e-30, float("inf")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", ["bn0", "bn1"])
def test_any_eps_gives_pytorch_s_numbers_or_an_error(norm: str, training: bool, eps: float) -> None:
    """Only NaN is refused here but not by PyTorch, whose results become NaN."""
    fused = rf.FusedSplitAttentionConv2d(4, 8, 3, padding=1).train(training)
    getattr(fused, norm).eps = eps
    plain = copy.deepcopy(fused)
    plain.__class__ = rf.SplitAttentionConv2d
    x = torch.randn(4, 4, 6, 6)
    refused = math.isnan(eps) or eps < 0 or (training and eps == 0)
    if refused:
        with pytest.raises(ValueError, match=rf"^{norm}\.eps: expected .*, got {eps}$"):
            fused(x)
    if math.isnan(eps):
        assert plain(x).isnan().any()
    elif refused:
        with pytest.raises(ValueError, match="eps must be"):
            plain(x)
    else:
        # PyTorch takes 0 in evaluation from 2.13 on. 1e-30 changes these variances as little.
        getattr(plain, norm).eps = eps or 1e-30
        torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("momentum", [-1.0, 0, 2.0, np.float32(0.5), float("inf"), float("nan")])
def test_any_momentum_gives_pytorch_s_statistics(momentum: float) -> None:
    fused = rf.FusedSplitAttentionConv2d(4, 8, 3, padding=1)
    for norm in (fused.bn0, fused.bn1):
        norm.momentum = momentum
    plain = copy.deepcopy(fused)
    plain.__class__ = rf.SplitAttentionConv2d
    x = torch.randn(4, 4, 6, 6)
    fused(x)
    plain(x)
    for ours, expected in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


def test_module_given_what_it_cannot_take() -> None:
    module = rf.FusedSplitAttention(8, radix=2)
    with pytest.raises(ValueError, match=re.escape("x: expected channels divisible by radix=2")):
        module(torch.randn(2, 17, 4, 4))
    message = "x: expected 16 channels, as fc1_weight and fc2_weight have, got 18"
    with pytest.raises(ValueError, match=message):
        module(torch.randn(2, 18, 4, 4))
    with pytest.raises(TypeError, match=re.escape("x: expected float32")):
        module(torch.ones(2, 16, 4, 4, dtype=torch.int32))


@pytest.mark.peers
@pytest.mark.parametrize("make", [official, timm], ids=["official", "timm"])
def test_fused_peer_given_what_it_cannot_take(make: Callable[[], torch.nn.Module]) -> None:
    module, x = make(), torch.randn(2, 16, 6, 6)
    rf.fuse(module)
    with pytest.raises(TypeError, match="conv2d"):  # PyTorch's own, as before fusing
        module(None)
    norms = [(name, norm) for name, norm in module.named_modules() if "bn" in name]
    assert len(norms) == 2
    for training in (True, False):
        for _, norm in norms:
            norm.eps = -1.0
            with pytest.raises(ValueError, match=r"^bn[01]\.eps: expected .*, got -1.0$"):
                module.train(training)(x)
            norm.eps = 1e-5
        module(x)
