"""The CUDA kernels, run on the CPU: numbers and schedules.

They pass the CPU kernels' tests, on a device of small blocks. test_cuda_sanitizers.py runs some of
the tests once more.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from cases import Call, Case, check, draw, draw_any
from cuda_on_host.kernels import LIBRARY, Kernels, build_kernels
from test_cpu_kernels import (  # noqa: F401
    DTYPES,
    FORMATS,
    FORMS,
    odd_cases,
    test_a_feature_that_does_not_vary,
    test_a_gap_that_overflows,
    test_a_mean_far_from_zero,
    test_any_call,
    test_attention_saturates_without_overflow,
    test_empty_batch,
    test_float32_parameters,
    test_in_eval_one_sample_s_nan_and_infinity_stay_in_it,
    test_many_calls,
    test_mean_error_is_no_larger_than_a_loop_s,
    test_nan_in_a_parameter_passes_on,
    test_nan_passes_on_as_in_pytorch,
    test_odd_sizes,
    test_out_and_dx_have_x_s_format,
    test_smallest_sizes,
    test_strides_of_dout,
    test_strides_of_x,
    test_what_memory_held_before_makes_no_difference,
)
from test_op import (
    ARGUMENTS,
    CASES,
    RUNNING,
    check_running_statistics,
    check_running_statistics_of_one_norm,
)
from torch import Tensor

import resnest_fused as rf

# The first test waits for the build.
pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.timeout(1200),
    pytest.mark.one_in(3),
]


@pytest.fixture(scope="module")
def loaded() -> Kernels:
    library = os.environ.get(LIBRARY) or build_kernels("plain")["plain"]
    return Kernels(Path(library))


@pytest.fixture
def kernels(loaded: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The kernels, as the native backend and on the usual device."""
    loaded.replace_native(monkeypatch)
    loaded.reset()
    return loaded


def _results(call: Call) -> list[Tensor]:
    """Everything that the call gives, in evaluation and with its gradients."""
    out, grads = call.gradients()
    return [call.forward(), out, *grads.values()]


def _assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("prologue", "norm"), FORMS)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 72, 14, 14, 2, 2, 20),
        (2, 24, 30, 30, 4, 1, 12),
        (3, 17, 5, 3, 3, 1, 7),
        (37, 20, 3, 3, 1, 2, 18),
    ],
    ids=str,
)
def test_schedules_make_no_difference(
    sizes: tuple[int, ...], prologue: str, norm: str, layout: str, kernels: Kernels
) -> None:
    """Neither does the largest grid: blocks walk over what more of them would have done."""
    call = draw_any(Case(*sizes, layout=layout, norm=norm, prologue=prologue))
    expected = _results(call)
    kernels.schedule(seed=1, resident_blocks=1)
    _assert_same_bits(_results(call), expected)
    kernels.schedule(seed=2, resident_blocks=5)
    kernels.set_device(grid_blocks=3)
    _assert_same_bits(_results(call), expected)


@pytest.mark.parametrize("radix", [1, 2, 3])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["none", "relu", "running"])
def test_evaluation(prologue: str, layout: str, radix: int, kernels: Kernels) -> None:
    """Against the truth; in channels_last in several chunks of pixels."""
    options = {"layout": layout, "norm": "running", "prologue": prologue}
    call = draw(Case(5, 24, 12, 11, radix, 2, 10, **options))
    truth = call.evaluate().values["out"]
    error = np.abs(oracle.wide(call.forward()) - truth).max()
    assert error <= 2e-6 * np.abs(truth).max()


# Devices with clusters: of two blocks, of a number that divides nothing, and of an H100's.
CLUSTERS = [
    {"cluster_blocks": 2, "multiprocessors": 3, "room": 120},
    {"cluster_blocks": 3, "multiprocessors": 2, "room": 90},
    {"cluster_blocks": 8, "multiprocessors": 132, "room": 227},
]


def evaluate(kernels: Kernels, call: Call, device: dict[str, int], launches: int) -> Tensor:
    """In so many launches, on such a device, or the test fails."""
    room = device["room"] * 1024
    others = {name: value for name, value in device.items() if name != "room"}
    kernels.set_device(shared_per_block_optin=room, shared_per_multiprocessor=2 * room, **others)
    before = kernels.launches()
    out = call.forward()
    assert kernels.launches() - before == launches
    kernels.reset()
    return out


def evaluate_on_chip(kernels: Kernels, call: Call, device: dict[str, int]) -> Tensor:
    return evaluate(kernels, call, device, 1)


def evaluate_by_phases(kernels: Kernels, call: Call, device: dict[str, int]) -> Tensor:
    return evaluate(kernels, call, {**device, "cluster_blocks": 1}, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["none", "relu", "running"])
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 64, 7, 7, 2, 1, 32),  # rows that are no multiple of a vector
        (9, 24, 9, 7, 2, 2, 20),
        (3, 16, 14, 14, 2, 4, 8),
        (2, 320, 5, 4, 2, 1, 40),  # several blocks along the channels
        (2, 32, 28, 28, 2, 1, 16),  # several chunks
        (2, 8, 45, 45, 2, 1, 3),  # parts that begin between vectors
        (1, 8, 1, 1, 2, 1, 3),  # fewer channels than blocks
    ],
    ids=str,
)
def test_on_chip_all_is_the_same_to_the_bit(
    sizes: tuple[int, ...], prologue: str, layout: str, dtype: torch.dtype, kernels: Kernels
) -> None:
    """As by a launch a phase, whatever the clusters are, and in whichever order threads run."""
    options = {"dtype": dtype, "layout": layout, "norm": "running", "prologue": prologue}
    call = draw_any(Case(*sizes, **options))
    for seed, cluster in enumerate(CLUSTERS):
        expected = evaluate_by_phases(kernels, call, cluster)
        kernels.schedule(seed=seed, resident_blocks=3 * (seed + 1))
        assert torch.equal(evaluate_on_chip(kernels, call, cluster), expected)


def test_on_chip_a_channel_may_have_several_chunks(kernels: Kernels) -> None:
    call = draw_any(Case(2, 2, 92, 92, 2, 1, 3, norm="running", prologue="running"))
    device = CLUSTERS[0]
    expected = evaluate_by_phases(kernels, call, device)
    assert torch.equal(evaluate_on_chip(kernels, call, device), expected)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["none", "relu", "running"])
def test_on_chip_against_the_truth(prologue: str, layout: str, kernels: Kernels) -> None:
    options = {"layout": layout, "norm": "running", "prologue": prologue}
    call = draw(Case(5, 24, 12, 11, 2, 2, 10, **options))
    truth = call.evaluate().values["out"]
    for cluster in CLUSTERS:
        error = np.abs(oracle.wide(evaluate_on_chip(kernels, call, cluster)) - truth).max()
        assert error <= 2e-6 * np.abs(truth).max()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_on_chip_what_is_not_finite_passes_on_the_same_way(
    value: float, layout: str, kernels: Kernels
) -> None:
    """In x, and in weights, also at the end of a depth that threads share unevenly."""
    options = {"layout": layout, "norm": "running", "prologue": "running"}
    for name in ("x", "fc1_weight", "fc2_weight", "bn0_bias"):
        call = draw_any(Case(5, 24, 6, 6, 2, 1, 20, **options))
        call.tensor(name)[(-1,) * call.tensor(name).dim()] = value
        for cluster in CLUSTERS:
            expected = evaluate_by_phases(kernels, call, cluster)
            out = evaluate_on_chip(kernels, call, cluster)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["none", "relu", "running"])
@pytest.mark.parametrize("sizes", [(64, 7, 7, 2, 1, 32), (51, 5, 1, 3, 3, 21)], ids=str)
def test_in_eval_a_sample_does_not_depend_on_its_batch(
    sizes: tuple[int, ...],
    prologue: str,
    layout: str,
    dtype: torch.dtype,
    kernels: Kernels,
) -> None:
    options = {"dtype": dtype, "layout": layout, "norm": "running", "prologue": prologue}
    call = draw_any(Case(11, *sizes, **options))
    expected = call.forward()
    for start, stop in ((0, 1), (4, 5), (10, 11), (0, 2), (1, 6), (2, 11)):
        assert torch.equal(call.samples(start, stop).forward(), expected[start:stop])


@pytest.mark.parametrize(
    "device",
    [
        {"threads_per_block": 32},
        {"threads_per_block": 64, "multiprocessors": 16},
        {"threads_per_block": 1024, "multiprocessors": 132},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("layout", "prologue", "dtype"),
    [
        ("nchw", "batch", torch.float32),
        ("channels_last", "batch", torch.bfloat16),
        ("nchw", "none", torch.float16),
        ("channels_last", "relu", torch.float32),
    ],
)
def test_other_devices(
    layout: str, prologue: str, dtype: torch.dtype, device: dict[str, int], kernels: Kernels
) -> None:
    kernels.set_device(**device)
    for sizes in ((2, 60, 14, 14, 2, 1, 32), (3, 120, 9, 7, 2, 2, 34)):
        check(Case(*sizes, dtype, torch.float32, layout=layout, prologue=prologue))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("prologue", "norm"), FORMS)
def test_channels_in_chunks(prologue: str, norm: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """In NCHW, of maps too large for shared memory; chunks begin between vectors."""
    kernels.set_device(shared_per_multiprocessor=32 * 1024)
    for sizes in ((3, 4, 46, 46, 2, 1, 3), (2, 2, 92, 92, 1, 1, 3), (2, 16, 31, 31, 3, 2, 8)):
        check(Case(*sizes, dtype, layout="nchw", prologue=prologue, norm=norm))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ("pool", "recombine", "pool_backward", "recombine_backward"))
def test_single_phases(name: str, case: Case, kernels: Kernels) -> None:
    arguments = ARGUMENTS[name](draw_any(case))
    results = getattr(kernels.ops, name)(**arguments)
    torch.testing.assert_close(results, getattr(torch.ops.resnest_fused, name)(**arguments))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_single_phases_of_bn0(dtype: torch.dtype, layout: str, kernels: Kernels) -> None:
    call = draw_any(Case(3, 24, 9, 7, 2, 2, 8, dtype, layout=layout, prologue="batch"))
    for name in ("batch_statistics", "prologue_backward"):
        arguments = ARGUMENTS[name](call)
        results = getattr(kernels.ops, name)(**arguments)
        torch.testing.assert_close(results, getattr(torch.ops.resnest_fused, name)(**arguments))


@pytest.mark.parametrize("batch", [5, 0])
@RUNNING
def test_running_statistics(
    dtype: torch.dtype, stored: torch.dtype, batch: int, kernels: Kernels
) -> None:
    check_running_statistics(kernels.ops.update_running_statistics, dtype, stored, batch)


def test_running_statistics_of_one_norm_used_twice(kernels: Kernels) -> None:
    check_running_statistics_of_one_norm(kernels.ops.update_running_statistics)


def test_a_pixel_unlike_the_others(kernels: Kernels) -> None:
    x = 3 + 0.01 * torch.randn(2, 8, 56, 56)
    x[:, :, 0, 0] = 0
    for values in (x, x.contiguous(memory_format=torch.channels_last)):
        _, var = kernels.ops.batch_statistics(values)
        true_var = values.double().var(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(var.double(), true_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", odd_cases(), ids=str)
def test_numbers_of_any_sizes_are_finite(case: Case, kernels: Kernels) -> None:
    """For a sanitizer, which finds what test_odd_sizes does not and has no time for its numbers."""
    assert all(result.isfinite().all() for result in _results(draw_any(case)))


@pytest.mark.parametrize("layout", FORMATS)
def test_launches_are_few(layout: str, kernels: Kernels) -> None:
    """Of a module without its convolution; in channels_last samples have several chunks."""
    module = rf.FusedSplitAttentionConv2d(8, 12, 1)
    module.conv = torch.nn.Identity()
    x = torch.randn(3, 24, 12, 11).contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    before = kernels.launches()
    module(x.requires_grad_()).sum().backward()
    assert kernels.launches() - before == 9  # the last of them updates the running statistics
    module.eval()
    with torch.no_grad():
        before = kernels.launches()
        module(x)
    assert kernels.launches() - before == 3


def test_a_launch_that_fails_is_an_error(kernels: Kernels) -> None:
    call = draw_any(Case(2, 8, 3, 3))
    kernels.limit_shared_memory(0)
    with pytest.raises(RuntimeError, match=r"kernel .* could not be launched .*invalid argument"):
        call.forward()
    kernels.reset()
    call.forward()
