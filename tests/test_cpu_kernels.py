"""The kernels: numbers against the oracle, strides, determinism, NaN and infinity.

They are those of the CPU, or with ``--device cuda`` those of the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DIFFERENTIABLE,
    DOUT_LAYOUTS,
    LAYOUTS,
    NORMS,
    PROLOGUES,
    Call,
    Case,
    check,
    check_calls,
    draw,
    draw_any,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import most_by_chance, times_worst
from torch import Tensor

pytestmark = pytest.mark.usefixtures("restore_threads")
# For many small calls. Another test shows that the number of threads makes no difference.
one_thread = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# On a GPU each example takes several hundred launches, most of them plain PyTorch's.
EXAMPLES = 80 if torch.get_default_device().type == "cpu" else 60
FORMATS = ("nchw", "channels_last")
# (prologue, norm): each norm plain, and each prologue once.
FORMS = [("none", norm) for norm in NORMS] + [
    ("relu", "batch"),
    ("running", "running"),
    ("batch", "batch"),
]

# (batch, channels, height, width, radix, cardinality, inter_channels)
ODD_SIZES = [
    (1, 6, 1, 1, 2, 1, 33),
    (2, 12, 1, 9, 2, 3, 9),
    (3, 17, 7, 1, 3, 1, 7),
    (5, 34, 7, 7, 2, 2, 6),
    (3, 24, 5, 7, 4, 4, 12),
    (17, 40, 4, 4, 1, 2, 10),
    (33, 24, 3, 3, 2, 1, 32),
    (2, 40, 56, 56, 2, 4, 20),
    (1, 68, 14, 14, 3, 2, 34),
    (5, 51, 14, 14, 1, 3, 33),
    (9, 1, 2, 3, 2, 1, 21),
    (3, 130, 9, 13, 5, 1, 66),
]


def _statistics(of: str, count: int) -> str:
    """One value has no batch statistics."""
    return "running" if count == 1 and of == "batch" else of


def odd_cases() -> list[Case]:
    return [
        Case(
            *sizes,
            dtype=dtype,
            layout=FORMATS[(i + j) % 2],
            norm=_statistics(NORMS[(i + j) % 3], sizes[0]),
            bias=i % 4 != 0,
            affine=j % 4 != 1,
            prologue=_statistics(prologue, sizes[0] * sizes[2] * sizes[3]),
        )
        for i, sizes in enumerate(ODD_SIZES)
        for j, dtype in enumerate(DTYPES)
        for prologue in ("none", PROLOGUES[1 + (i // 2 + j) % 3])
    ]


@pytest.mark.one_in(3)
@one_thread
@pytest.mark.parametrize("case", odd_cases(), ids=str)
def test_odd_sizes(case: Case) -> None:
    check(case)


@one_thread
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize(
    "sizes", [(4, 1, 2, 3, 2, 1, 1), (2, 1, 1, 1, 1, 1, 1), (2, 2, 1, 2, 3, 2, 2)], ids=str
)
def test_smallest_sizes(sizes: tuple[int, ...], prologue: str, norm: str, layout: str) -> None:
    """Too few elements to compare errors with eager's; in float64 they are small enough."""
    call = draw(Case(*sizes, dtype=torch.float64, layout=layout, norm=norm, prologue=prologue))
    out, grads = call.gradients()
    for name, value in {"out": out, **grads}.items():
        truth = call.truth.values[name].astype(np.float64)
        np.testing.assert_allclose(value.cpu().numpy(), truth, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "case",
    [
        Case(
            2,
            channels,
            pixels,
            pixels,
            inter=channels // 2,
            dtype=dtype,
            param_dtype=torch.float32,
            layout=layout,
            norm=norm,
            prologue=prologue,
        )
        for channels, pixels in ((64, 56), (128, 28), (256, 14), (512, 7))
        for dtype, layout, norm, prologue in (
            (torch.float32, "nchw", "batch", "none"),
            (torch.float32, "channels_last", "running", "none"),
            (torch.bfloat16, "nchw", "running", "none"),
            (torch.float16, "channels_last", "batch", "none"),
            (torch.float32, "channels_last", "batch", "batch"),
            (torch.float32, "nchw", "running", "running"),
            (torch.bfloat16, "nchw", "batch", "batch"),
            (torch.float16, "channels_last", "running", "relu"),
        )
    ],
    ids=str,
)
def test_resnest50_stages(case: Case) -> None:
    check(case)


@pytest.mark.one_in(5)
@one_thread
@pytest.mark.parametrize(
    "case",
    [
        Case(
            *(3, 20, 6, 5, 2, 2, 14),
            dtype=dtype,
            layout=layout,
            norm="running" if layout == "expanded_batch" else "batch",
            prologue=prologue,
        )
        for i, layout in enumerate(LAYOUTS)
        for j, dtype in enumerate(DTYPES)
        for prologue in ("none", PROLOGUES[1 + (i + j) % 3])
    ],
    ids=str,
)
def test_strides_of_x(case: Case) -> None:
    check(case)


@pytest.mark.one_in(5)
@one_thread
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dout_layout", DOUT_LAYOUTS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_strides_of_dout(prologue: str, dout_layout: str, layout: str) -> None:
    dtype = torch.bfloat16 if dout_layout.startswith("unaligned") else torch.float32
    options = {"layout": layout, "dout_layout": dout_layout, "prologue": prologue}
    check(Case(3, 20, 6, 5, 2, 2, 14, dtype, **options))


@pytest.mark.one_in(5)
@one_thread
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("norm", ["none", "running"])
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_float32_parameters(prologue: str, norm: str, dtype: torch.dtype) -> None:
    check(Case(4, 24, 5, 5, 2, 2, 12, dtype, torch.float32, norm=norm, prologue=prologue))


# Arguments of check_any_call.
ANY_CALL: dict[str, st.SearchStrategy[Any]] = {
    "batch": st.integers(1, 9),
    "cardinality": st.integers(1, 4),
    "group": st.integers(1, 20),
    "inner": st.integers(1, 9),
    "height": st.integers(1, 9),
    "width": st.integers(1, 20),
    "radix": st.integers(1, 4),
    "dtype": st.sampled_from(DTYPES),
    "wide": st.booleans(),
    "layout": st.sampled_from(sorted(LAYOUTS)),
    "dout_layout": st.sampled_from(sorted(DOUT_LAYOUTS)),
    "bias": st.booleans(),
    "norm": st.sampled_from(NORMS),
    "affine": st.booleans(),
    "prologue": st.sampled_from(PROLOGUES),
    "wanted": st.sets(st.sampled_from(DIFFERENTIABLE)),
    "seed": st.integers(0, 2**32 - 1),
}


def check_any_call(
    batch: int,
    cardinality: int,
    group: int,
    inner: int,
    height: int,
    width: int,
    radix: int,
    dtype: torch.dtype,
    wide: bool,
    layout: str,
    dout_layout: str,
    bias: bool,
    norm: str,
    affine: bool,
    prologue: str,
    wanted: set[str],
    seed: int,
) -> None:
    # The number of distinct values, because a single one has no variance.
    samples = 1 if layout == "expanded_batch" else batch
    pixels = height if layout == "expanded_pixels" else height * width
    torch.manual_seed(seed)
    case = Case(
        batch,
        group * cardinality,
        height,
        width,
        radix,
        cardinality,
        inner * cardinality,
        dtype,
        torch.float32 if wide and dtype != torch.float64 else None,
        layout,
        dout_layout,
        bias,
        _statistics(norm, samples),
        affine,
        _statistics(prologue, samples * pixels),
    )
    check(case, wanted)


@one_thread
@given(**ANY_CALL)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_any_call(**call: Any) -> None:
    check_any_call(**call)


@pytest.mark.long
@one_thread
@given(**ANY_CALL)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
def test_many_calls(**call: Any) -> None:
    check_any_call(**call)


DRAWS = 48


def _draws(prologue: str, norm: str, dtype: torch.dtype) -> Iterator[Call]:
    """Calls of each radix and layout."""
    for index in range(DRAWS):
        radix, layout = index % 4 + 1, FORMATS[index % 2]
        options = {"layout": layout, "norm": norm, "prologue": prologue}
        yield draw(Case(6, 24, 5, 5, radix, 2, 16, dtype, **options))


@pytest.mark.one_in(5)
@one_thread
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("prologue", "norm"), FORMS)
def test_mean_error_is_no_larger_than_a_loop_s(
    prologue: str, norm: str, dtype: torch.dtype
) -> None:
    counts = times_worst(_draws(prologue, norm, dtype), Call.gradients)
    assert max(counts.values()) <= most_by_chance(DRAWS), counts


@one_thread
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["running", "batch"])
def test_a_mean_far_from_zero(prologue: str, layout: str) -> None:
    """bn0 subtracts the mean, and the sums of its gradients must not include it."""
    calls = [draw(Case(4, 24, 7, 7, 2, 2, 16, layout=layout, prologue=prologue)) for _ in range(9)]
    for call in calls:
        call.x = call.x + 30
        call.params["bn0_running_mean"] += 30
    check_calls(calls)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("value", [0.0, 3.7])
def test_a_feature_that_does_not_vary(value: float, layout: str) -> None:
    """Its batch variance is 0, so bn0 returns beta."""
    call = draw_any(Case(4, 6, 5, 7, 2, 2, 8, torch.float64, layout=layout, prologue="batch"))
    call.x[:, 3] = value
    out, grads = call.gradients()
    for name, result in {"out": out, **grads}.items():
        truth = call.truth.values[name].astype(np.float64)
        np.testing.assert_allclose(result.cpu().numpy(), truth, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_empty_batch(prologue: str, norm: str, layout: str) -> None:
    case = Case(0, 6, 2, 3, 2, 3, 9, layout=layout, norm=norm, prologue=prologue)
    out, grads = draw(case).gradients()
    assert out.shape == (0, 6, 2, 3)
    assert grads.pop("x").shape == (0, 12, 2, 3)
    for name, grad in grads.items():
        assert torch.equal(grad, torch.zeros_like(grad)), name
    assert draw(case).forward().shape == (0, 6, 2, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_out_and_dx_have_x_s_format(prologue: str, layout: str) -> None:
    call = draw_any(Case(3, 6, 4, 5, layout=layout, norm="running", prologue=prologue))
    out, grads = call.gradients()
    channels_last = call.x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert channels_last == layout.endswith("channels_last")
    for result in (out, grads["x"], call.forward()):
        assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("radix", [1, 2, 3])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_attention_saturates_without_overflow(dtype: torch.dtype, radix: int) -> None:
    """Logits of some thousands: attention is 0, 1 or a tie, never NaN."""
    call = draw(Case(9, 24, 5, 5, radix, dtype=dtype, norm="none"))
    steps = torch.tensor([-60000, -3000, -1, 0, 3000, 60000], dtype=dtype)
    logits = {
        "fc2_weight": torch.zeros_like(call.params["fc2_weight"]),
        "fc2_bias": steps[torch.randint(len(steps), (24 * radix,))],
    }
    check_calls([replace(call, params=call.params | logits)])


# --- the same bits again


def _forward(call: Call) -> list[Tensor]:
    return [call.forward()]


def _forward_and_backward(call: Call) -> list[Tensor]:
    out, grads = call.gradients()
    return [out, *grads.values()]


def _assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("run", [_forward, _forward_and_backward])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("prologue", "norm"), FORMS[1:])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 72, 14, 14, 2, 2, 20),
        (7, 72, 14, 14, 2, 2, 20),
        (2, 40, 56, 56, 1, 4, 20),
        (3, 130, 9, 13, 5, 1, 66),
        (33, 51, 3, 3, 2, 3, 33),
    ],
    ids=str,
)
def test_repeated_calls_and_thread_counts(
    sizes: tuple[int, ...],
    prologue: str,
    norm: str,
    layout: str,
    run: Callable[[Call], list[Tensor]],
) -> None:
    call = draw_any(Case(*sizes, layout=layout, norm=norm, prologue=prologue))
    expected = None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            results = run(call)
            expected = results if expected is None else expected
            _assert_same_bits(results, expected)


@pytest.mark.parametrize("run", [_forward, _forward_and_backward])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("prologue", "norm"), FORMS)
@pytest.mark.parametrize("sizes", [(7, 72, 14, 14, 2, 2, 20), (3, 17, 5, 3, 3, 1, 7)], ids=str)
@pytest.mark.cpu
def test_what_memory_held_before_makes_no_difference(
    sizes: tuple[int, ...],
    prologue: str,
    norm: str,
    layout: str,
    run: Callable[[Call], list[Tensor]],
    fill_memory: Callable[[int], None],
) -> None:
    """An element that nothing writes, or that something adds to, would differ."""
    call = draw_any(Case(*sizes, layout=layout, norm=norm, prologue=prologue))
    results = []
    for byte in (0x7F, 0x80):  # NaN, infinity or huge numbers, and almost nothing
        fill_memory(byte)
        results.append(run(call))
    _assert_same_bits(*results)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["none", "relu", "running"])
@pytest.mark.parametrize(
    "sizes",
    [(64, 28, 28, 2, 1, 32), (512, 7, 7, 2, 1, 256), (51, 5, 1, 3, 3, 21), (20, 5, 5, 2, 1, 40)],
    ids=str,
)
def test_in_eval_a_sample_does_not_depend_on_its_batch(
    sizes: tuple[int, ...], prologue: str, layout: str, dtype: torch.dtype
) -> None:
    batch = 11
    options = {"dtype": dtype, "layout": layout, "norm": "running", "prologue": prologue}
    call = draw_any(Case(batch, *sizes, **options))
    expected = call.forward()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for start, stop in [(i, i + 1) for i in range(batch)] + [(0, 2), (1, 6), (2, 11)]:
            assert torch.equal(call.samples(start, stop).forward(), expected[start:stop])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["none", "running"])
def test_a_large_batch_gives_what_small_ones_give(prologue: str, layout: str) -> None:
    """Large outputs may be stored in another way."""
    case = Case(32, 64, 56, 56, 2, 1, 32, layout=layout, norm="running", prologue=prologue)
    whole = draw_any(case)
    out, grads = whole.gradients(names=["x"])
    assert torch.equal(out, whole.forward())
    for start in range(0, 32, 4):
        part_out, part_grads = whole.samples(start, start + 4).gradients(names=["x"])
        assert torch.equal(part_out, out[start : start + 4])
        torch.testing.assert_close(part_grads["x"], grads["x"][start : start + 4])


# --- NaN and infinity


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["none", "relu", "running"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_eval_one_sample_s_nan_and_infinity_stay_in_it(
    dtype: torch.dtype, prologue: str, layout: str, value: float
) -> None:
    options = {"dtype": dtype, "layout": layout, "norm": "running", "prologue": prologue}
    call = draw_any(Case(5, 24, 5, 7, 2, 2, 16, **options))
    clean, clean_grads = call.gradients(names=["x"])
    call.x[2, 3, 1, 4] = value
    others = [0, 1, 3, 4]
    for out in (call.forward(), call.gradients(names=["x"])[0]):
        assert torch.equal(out[others], clean[others])
        assert torch.equal(out.isnan(), call.forward("reference").isnan())
        if prologue == "none" or math.isnan(value):  # otherwise a ReLU may turn it into 0
            assert out[2].isnan().any()
        assert not out[2].isnan().all()  # the other group
    assert torch.equal(call.gradients(names=["x"])[1]["x"][others], clean_grads["x"][others])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_nan_passes_on_as_in_pytorch(prologue: str, norm: str) -> None:
    call = draw(Case(3, 6, 3, 3, 2, 2, 6, norm=norm, prologue=prologue))
    call.x[1, 2, 0, 0] = math.nan
    out, grads = call.gradients()
    eager_out, eager_grads = call.gradients("reference")
    assert torch.equal(out.isnan(), eager_out.isnan())
    for name, grad in grads.items():
        assert torch.equal(grad.isnan(), eager_grads[name].isnan()), name


@pytest.mark.parametrize("radix", [1, 2, 3])
@pytest.mark.parametrize("name", DIFFERENTIABLE[1:])
def test_nan_in_a_parameter_passes_on(name: str, radix: int) -> None:
    call = draw(Case(3, 6, 3, 3, radix, 2, 6, norm="running", prologue="running"))
    call.params[name].view(-1)[1] = math.nan
    out, eager = call.forward(), call.forward("reference")
    assert out.isnan().any()
    assert torch.equal(out.isnan(), eager.isnan())


def test_a_gap_that_overflows() -> None:
    """x is finite, its sum is not: 0 * infinity makes NaN of the sample, here and in PyTorch."""
    call = draw(Case(2, 4, 2, 2, norm="none"))
    call.params["fc1_weight"].zero_()
    call.x[0, 1] = 3e38
    out = call.forward()
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    assert torch.equal(out.isnan(), call.forward("reference").isnan())
