"""The recipe against numbers worked out by hand: learning rate, weight decay, options, presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from resnest_fused import models
from resnest_fused.models.variants import VARIANTS
from resnest_fused.training.config import (
    PRESETS,
    Config,
    ConfigError,
    make_config,
    may_change,
)
from resnest_fused.training.groups import parameter_groups
from resnest_fused.training.schedule import lr_factor, make_scheduler, peak_lr

# 5 epochs of 100 steps up, 265 epochs down; the cosines of multiples of 30 and 45 degrees by hand.
_UP, _ALL = 500, 27_000
_ROOT_2, _ROOT_3 = 1.4142135623730951, 1.7320508075688772
BY_HAND = (
    (0, 0.0),
    (1, 0.002),
    (250, 0.5),
    (499, 0.998),
    (500, 1.0),
    (500 + 26_500 // 4, (1 + _ROOT_2 / 2) / 2),
    (500 + 26_500 // 2, 0.5),
    (500 + 3 * 26_500 // 4, (1 - _ROOT_2 / 2) / 2),
    (500 + 5 * 26_500 // 6, (1 - _ROOT_3 / 2) / 2),
    (27_000, 0.0),
)


@pytest.mark.parametrize(("step", "factor"), BY_HAND)
def test_learning_rate_at_ten_steps(step: int, factor: float) -> None:
    # A step that the division above rounded down is off by less than a step's slope.
    assert lr_factor(step, _UP, _ALL) == pytest.approx(factor, abs=1e-4)


def test_the_scheduler_sets_it_for_each_step() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 3.2}], momentum=0.9)
    scheduler = make_scheduler(optimizer, 2, 6)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    down = [1, 0.5 + _ROOT_2 / 4, 0.5, 0.5 - _ROOT_2 / 4]
    assert seen == pytest.approx([0, 1.6, *(3.2 * factor for factor in down)])


def test_the_peak_is_scaled_by_the_samples_of_a_step() -> None:
    """The published runs: 64 processes of 128, 64 and 32 samples."""
    peaks = [peak_lr(Config().lr, 64 * make_config(name).batch) for name in list(PRESETS)[:4]]
    assert peaks == pytest.approx([3.2, 1.6, 0.8, 0.8])


@pytest.mark.parametrize("name", VARIANTS)
def test_norms_and_biases_of_every_network_do_not_decay(name: str) -> None:
    with torch.device("meta"):
        network = models.create(name, fused=False)
    groups = {g["weight_decay"]: g["names"] for g in parameter_groups(network, 0.1, 1e-4)}
    assert set(groups) == {1e-4, 0.0}
    # Here norms and biases, and only they, have one dimension.
    parameters = dict(network.named_parameters())
    assert {p for p in parameters if parameters[p].dim() > 1} == set(groups[1e-4])
    assert {p for p in parameters if parameters[p].dim() == 1} == set(groups[0.0])
    # Stem, five layers of a block, the four stages' shortcuts, the classifier.
    blocks = sum(VARIANTS[name].layers)
    assert len(groups[1e-4]) == 3 + 5 * blocks + 4 + 1
    # Two of a norm: the stem's, four and two biases of a block, the shortcuts', a bias.
    assert len(groups[0.0]) == 6 + (8 + 2) * blocks + 8 + 1
    # A rule by names ("bn") would miss these norms.
    assert {"conv1.1.weight", "conv1.4.weight", "layer1.0.downsample.2.weight"} <= set(groups[0.0])


def test_norms_that_have_matrices_do_not_decay_either() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm((2, 2)), nn.SyncBatchNorm(2))
    groups = {g["weight_decay"]: g["names"] for g in parameter_groups(network, 1, 0.5)}
    assert groups == {
        0.5: ["0.weight"],
        0.0: ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"],
    }


def test_parts_with_learning_rates_of_their_own_and_frozen_ones() -> None:
    with torch.device("meta"):
        network = models.create("resnest14", num_classes=3, frozen_stages=2)
    groups = parameter_groups(network, 0.1, 1e-4, {"layer4": 2, "layer4.0.conv2": 3, "fc": 10})
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["fc.weight"] == rates["fc.bias"] == pytest.approx(1.0)
    assert rates["layer4.0.conv1.weight"] == pytest.approx(0.2)
    assert rates["layer4.0.conv2.fc1.weight"] == pytest.approx(0.3)
    assert rates["layer3.0.conv1.weight"] == 0.1
    assert not [name for name in rates if name.startswith(("conv1", "bn1", "layer1", "layer2"))]
    with pytest.raises(ConfigError, match="lr_of: the network has no part 'head'"):
        parameter_groups(network, 0.1, 1e-4, {"head": 10})


def test_presets_are_the_published_recipe() -> None:
    """The rows of the scripts that trained the published weights."""
    rows = {
        name: (config.crop, VARIANTS[config.model].size, config.batch, config.dropout)
        for name in ("resnest50", "resnest101", "resnest200", "resnest269")
        for config in [make_config(name)]
    }
    assert rows == {
        "resnest50": (224, 224, 128, 0),
        "resnest101": (224, 256, 64, 0),
        "resnest200": (256, 320, 32, 0.2),
        "resnest269": (320, 416, 32, 0.2),
    }
    of_all = make_config("resnest269")
    assert (of_all.epochs, of_all.warmup, of_all.lr, of_all.momentum) == (270, 5, 0.1, 0.9)
    assert (of_all.weight_decay, of_all.smoothing, of_all.mixup) == (1e-4, 0.1, 0.2)
    assert (of_all.policy, of_all.jitter, of_all.lighting) == ("autoaugment", 0.4, 0.1)
    assert (of_all.drop_block, of_all.zero_gamma, of_all.eval_ratio) == (0.1, True, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 1.0}, "smoothing: expected a number from 0 to below 1, got 1.0"),
        ({"batch": "many"}, "batch: expected an integer from 1 on, got 'many'"),
        ({"batch": True}, "batch: expected an integer from 1 on, got True"),
        ({"amp": "int8"}, "amp: expected one of none, bf16, fp16, got 'int8'"),
        ({"fuse": "yes"}, "fuse: expected true or false, got 'yes'"),
        ({"lr_of": {"conv1": 0.5, "fc": "x"}}, "lr_of: fc: expected a number from 0 on, got 'x'"),
        ({"lr_of": {"conv1": 0.5, "fc": -1}}, "lr_of: fc: expected a number from 0 on, got -1"),
        ({"lr_of": {"conv1": 0.5, "fc": True}}, "lr_of: fc: expected a number from 0 on, got True"),
        ({"lr_of": 3}, "lr_of: expected numbers by name from 0 on, got 3"),
        (
            {"warmup": 6, "epochs": 5},
            "warmup: expected an integer from 0 to the number of epochs, 5, got 6",
        ),
        ({"bach": 3}, "bach: no such option; did you mean batch?"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(options=options)
    assert str(caught.value) == message


def _numbers() -> list[tuple[str, float]]:
    """Each option that is a number, with values that none can have."""
    fields = dataclasses.fields(Config)
    numbers = [field.name for field in fields if type(field.default) in (int, float)]
    odd = (float("inf"), float("-inf"), float("nan"), -2, 2**70)
    # So many epochs, steps or samples are wrong only where there are not as many pictures.
    unbounded = {"samples", "classes", "crop", "eval_crop", "epochs", "batch", "accumulate", "lr"}
    unbounded |= {"clip", "save_every", "keep", "log_every"}
    return [(n, x) for n in numbers for x in odd if x != 2**70 or n not in unbounded]


@pytest.mark.parametrize(("name", "value"), _numbers())
def test_every_number_has_a_range(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected an? (number|integer) from .*, got "):
        make_config(options={name: value})


def test_what_may_change_within_a_run() -> None:
    """Where things are, and what has no say in the numbers."""
    config = make_config("digits")
    free = {f.name for f in dataclasses.fields(Config) if may_change(f.name, config)}
    assert free == {
        *("data", "val", "root", "download", "out", "device", "workers"),
        *("keep", "save_every", "log_every", "timeout"),
    }
    assert not may_change("workers", make_config(options={"data": "webdataset:{0..9}.tar"}))


def test_there_is_no_such_preset() -> None:
    with pytest.raises(ConfigError, match=r"preset: expected one of resnest50, .*, got 'resnet50'"):
        make_config("resnet50", Path("unread.yaml"))
