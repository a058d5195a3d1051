"""Triton's kernels pass the tests of all kernels, in its interpreter if there is no GPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import numpy as np
import pytest
import test_op
import torch
from cases import LAYOUTS, Call, Case, check_calls, draw, draw_any, errors_in_ulps
from test_cpu_kernels import (  # noqa: F401
    DTYPES,
    FORMATS,
    FORMS,
    test_a_feature_that_does_not_vary,
    test_a_gap_that_overflows,
    test_a_mean_far_from_zero,
    test_attention_saturates_without_overflow,
    test_empty_batch,
    test_nan_in_a_parameter_passes_on,
    test_nan_passes_on_as_in_pytorch,
    test_out_and_dx_have_x_s_format,
    test_smallest_sizes,
)
from test_op import (  # noqa: F401
    ARGUMENTS,
    test_batch_statistics_of_a_large_mean,
    test_batch_statistics_of_a_pixel_unlike_the_others,
    test_counts_that_do_not_fit_are_refused,
    test_dx_of_a_mean_far_from_zero,
    test_fake_kernels_know_the_strides,
    test_gradients_that_are_not_needed_have_no_elements,
    test_opcheck,
    test_opcheck_backward_of_some,
    test_phases_of_an_empty_batch,
    test_running_statistics,
    test_running_statistics_of_one_norm_used_twice,
    test_running_statistics_that_do_not_fit_change_nothing,
    test_sums_of_the_pool_s_backward,
    test_tensors_that_do_not_fit_are_refused,
    test_what_is_saved,
)
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import language as tl
from triton.runtime import interpreter

import resnest_fused as rf
from resnest_fused.backends.triton import launch, pool, replay
from resnest_fused.backends.triton.compat import INTERPRETED
from resnest_fused.backends.triton.problem import Map, make_map
from resnest_fused.ops import NO_NORM, MapArguments

pytestmark = pytest.mark.one_in(7)


def _sum_in_pairs(reduce: Any, values: Any) -> Any:
    """As a GPU adds; NumPy does along the last axis only, along others one after the other."""
    last = np.ascontiguousarray(np.moveaxis(values.handle.data, reduce.axis, -1))
    total = last.sum(-1)
    shape = np.expand_dims(total, reduce.axis) if reduce.keep_dims else total
    return reduce.to_tensor(shape, values.dtype)


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """The interpreter patches the language at each call of a function; once is enough."""
    if not INTERPRETED:
        yield
        return
    # The language as our kernels see it, and as its own functions do.
    scopes = [interpreter._patch_lang(function.fn) for function in (pool.pool_kernel, tl.sum)]
    nothing = SimpleNamespace(restore=lambda: None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", lambda function: nothing)
        # NumPy 2.4 refuses what Triton 3.6 puts there.
        monkeypatch.setattr(tl.tensor, "__index__", lambda number: number.handle.data.item())
        monkeypatch.setattr(interpreter.ReduceOps, "sum", _sum_in_pairs)
        yield
    for scope in reversed(scopes):
        scope.restore()


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cases, "BACKEND", "triton")
    monkeypatch.setattr(test_op, "ops", torch.ops.resnest_fused_triton)
    with rf.use_backend("triton"):
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs and tiles where one would do."""
    monkeypatch.setattr(launch, "ELEMENTS", dict.fromkeys(launch.ELEMENTS, 128))
    monkeypatch.setattr(launch, "LEAST_ELEMENTS", 128)
    monkeypatch.setattr(launch, "SLAB_ELEMENTS", 128)
    monkeypatch.setattr(launch, "STEPS", 2)
    monkeypatch.setattr(launch, "NCHW_PIXELS", 16)
    monkeypatch.setattr(launch, "CHANNEL_BYTES", 32)
    monkeypatch.setattr(launch, "PROGRAMS", 12)
    monkeypatch.setattr(launch, "RUNNING_BLOCK", 32)
    monkeypatch.setattr(launch, "PARTIALS", 64)
    monkeypatch.setattr(launch, "PARTIAL_TILES", 4)
    monkeypatch.setattr(launch, "COLUMNS", launch.ColumnBlock(4, 16, 1))
    monkeypatch.setattr(launch, "PRODUCT", launch.ProductBlock(16, 16, 16, 1, 1))


def _forms() -> Iterator[Case]:
    """Each form in each dtype and layout, in turn with odd sizes, radices, cardinalities."""
    sizes = itertools.cycle(
        [
            (3, 10, 5, 7, 2, 1, 17),
            (2, 9, 6, 4, 1, 3, 9),
            (5, 8, 4, 4, 4, 2, 12),
            (17, 3, 3, 5, 3, 1, 20),
            (2, 20, 5, 5, 2, 2, 34),
        ]
    )
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for index, ((prologue, norm), layout, dtype) in enumerate(
        itertools.product(FORMS, FORMATS, dtypes)
    ):
        yield Case(
            *next(sizes),
            dtype,
            torch.float32 if index % 4 == 1 else None,
            layout,
            bias=index % 5 != 0,
            affine=index % 7 != 0,
            norm=norm,
            prologue=prologue,
        )


def _check(case: Case) -> None:
    """``check`` with fewer draws, because the interpreter is slow."""
    check_calls([draw(case) for _ in range(3)])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", list(_forms()), ids=str)
def test_forms(case: Case) -> None:
    if case.dtype == torch.float32:
        _check(case)
    else:  # other dtypes: their sums are as good, rounded once
        call = draw(case)
        for name, error in errors_in_ulps(call, *call.gradients()).items():
            rounded = name == "out" or call.tensor(name).dtype == case.dtype
            assert error <= (1 if rounded else 64), name


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 64, 14, 14, 2, 1, 32, torch.bfloat16, prologue="batch"),
        Case(2, 64, 14, 14, 2, 1, 32, layout="channels_last", prologue="batch"),
        Case(1, 40, 33, 34, 2, 2, 20, layout="channels_last", norm="running"),
        Case(1, 3, 64, 65, 1, 1, 8, norm="none", prologue="relu"),
        Case(2, 130, 3, 3, 5, 1, 66, torch.float64, prologue="batch"),
    ],
    ids=str,
)
def test_usual_blocks(case: Case) -> None:
    _check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prologue", ["none", "batch"])
def test_strides(prologue: str, layout: str) -> None:
    """Any strides of x and dout give the results of contiguous ones."""
    options = {"layout": layout, "dout_layout": layout, "norm": "running", "prologue": prologue}
    call = draw_any(Case(3, 12, 4, 5, 2, 2, 8, torch.float64, **options))
    x, dout = call.x.contiguous(), call.dout.contiguous()
    contiguous = Call(call.case, x, call.params, dout)
    (out, grads), (expected_out, expected) = call.gradients(), contiguous.gradients()
    torch.testing.assert_close([out, *grads.values()], [expected_out, *expected.values()])


def _everything(call: Call) -> list[Tensor]:
    out, grads = call.gradients()
    return [call.forward(), out, *grads.values()]


@pytest.mark.cpu
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("prologue", "norm"), FORMS)
def test_what_memory_held_before_makes_no_difference(
    prologue: str, norm: str, layout: str, fill_memory: Callable[[int], None]
) -> None:
    """An element that nothing writes would differ, as would a sum in a changing order."""
    call = draw_any(Case(2, 12, 5, 7, 2, 2, 10, layout=layout, norm=norm, prologue=prologue))
    results = []
    for byte in (0x7F, 0x80):  # NaN, infinity or huge numbers, and almost nothing
        fill_memory(byte)
        results.append(_everything(call))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("prologue", ["none", "relu", "running"])
def test_in_eval_a_sample_does_not_depend_on_its_batch(
    prologue: str, layout: str, dtype: torch.dtype
) -> None:
    """It does not depend on infinity and NaN in other samples, either."""
    options = {"dtype": dtype, "layout": layout, "norm": "running", "prologue": prologue}
    call = draw_any(Case(18, 24, 5, 7, 2, 2, 16, **options))
    expected = call.forward()
    for start, stop in ((0, 1), (4, 5), (17, 18), (1, 6)):
        assert torch.equal(call.samples(start, stop).forward(), expected[start:stop])
    call.x[2, 3, 1, 4], call.x[3, 3, 1, 4] = math.nan, math.inf
    others = [0, 1, *range(4, 18)]
    out = call.forward()
    assert torch.equal(out[others], expected[others])
    assert torch.equal(out.isnan(), call.forward("reference").isnan())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_schemas_are_the_native_ones(name: str) -> None:
    ours, native = (
        getattr(getattr(torch.ops, namespace), name).default._schema
        for namespace in cases.NAMESPACES.values()
    )
    of_ours, of_native = ([(a.name, str(a.type)) for a in s.arguments] for s in (ours, native))
    assert of_ours == of_native
    assert [str(r.type) for r in ours.returns] == [str(r.type) for r in native.returns]


@pytest.mark.parametrize("training", [False, True])
def test_compiled_in_one_graph(training: bool) -> None:
    eager = rf.FusedSplitAttention(8).train(training)
    eager.backend = "triton"
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    x = draw(Case(2, 8, 5, 4)).x
    results = []
    for module in (eager, compiled):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaf)])
    torch.testing.assert_close(*results)
    ours, expected = compiled.state_dict().values(), eager.state_dict().values()
    torch.testing.assert_close([*ours], [*expected])


def test_exported(tmp_path: Path) -> None:
    module = rf.FusedSplitAttention(8).eval()
    module.backend = "triton"
    x = torch.randn(2, 16, 5, 4)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "module.pt2")
    program = torch.export.load(tmp_path / "module.pt2")
    assert "resnest_fused_triton.split_attention" in str(program.graph)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("layout", FORMATS)
def test_launches_are_few(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in evaluation, nine in a step, of which one updates the running statistics."""
    names: list[str] = []

    def count(kernel: Any, programs: int, arguments: Any, **options: Any) -> None:
        names.extend([kernel.__name__] * (programs > 0))

    monkeypatch.setattr(launch, "run", count)
    case = Case(2, 64, 56, 56, 2, 1, 32, layout=layout, norm="running", prologue="running")
    draw_any(case).forward()
    assert names == ["pool_kernel", "attention_kernel", "recombine_kernel"]
    names.clear()
    draw_any(dataclasses.replace(case, norm="batch", prologue="batch")).gradients()
    assert len(names) == len({*names}) == 9


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """Calls are replayed as on a GPU, by launches in the interpreter; the recordings."""

    def run(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
        if programs > 0:
            constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
            compiled = kernel[(programs,)]
            with _disable_current_modes():  # the interpreter copies tensors
                compiled(*arguments, *constants)
            if replay.recording():
                replay.launched(compiled, (*arguments, *constants))

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(replay, "INTERPRETED", False)
    monkeypatch.setattr(replay, "_recordings", {})
    yield replay._recordings


@pytest.mark.cpu
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("prologue", "norm"), FORMS)
def test_replayed_calls(prologue: str, norm: str, layout: str, replayed: dict[Any, Any]) -> None:
    """They compute what a call that takes the long way does, from their own arguments."""
    case = Case(3, 12, 5, 7, 2, 2, 10, layout=layout, norm=norm, prologue=prologue)
    case = dataclasses.replace(case, dout_layout=layout)
    _everything(draw_any(case))
    kinds = len(replayed)
    assert kinds > 1 and None not in replayed.values()
    call = draw_any(case)
    results = _everything(call)
    assert len(replayed) == kinds
    replayed.clear()
    for one, other in zip(results, _everything(call), strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.cpu
def test_what_is_not_replayed(replayed: dict[Any, Any]) -> None:
    """Calls that copy a map, and those with one tensor in two places."""
    case = Case(3, 12, 5, 7, 2, 2, 10, layout="transposed", norm="running")
    draw_any(case).forward()
    assert [*replayed.values()] == [None]
    call = draw_any(dataclasses.replace(case, layout="nchw", inter=10))
    call.params["bn1_bias"] = call.params["bn1_weight"]
    call.forward()
    assert [*replayed.values()] == [None, None]


@pytest.mark.cpu
def test_numbers_and_alignment_are_of_the_kind_of_a_call(replayed: dict[Any, Any]) -> None:
    x = torch.randn(3, 4, 4, 4)
    for a in (x, x[1:], x[:, :, :, :2].contiguous(), x.to(torch.bfloat16)):
        test_op.ops.pool(a, False, 1, None, None, None, None, 0.0, False)
        test_op.ops.pool(a, True, 1, None, None, None, None, 0.0, False)
    assert len(replayed) == 8
    # At another address, of which a part of 16 bytes differs.
    flat = torch.randn(x.numel() + 1)
    test_op.ops.pool(flat[1:].view_as(x), False, 1, None, None, None, None, 0.0, False)
    assert [*replayed.values()][8:] == [None]


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[float]]:
    """Tuning with an empty cache, and a list of the next times that it measures."""
    times: list[float] = []
    monkeypatch.setattr(launch, "autotunes", lambda: True)
    monkeypatch.setattr(launch, "cache_folder", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_time", lambda call: call() and times.pop(0))
    launch._tuned.cache_clear()
    yield times
    assert not times
    launch._tuned.cache_clear()


def _map(batch: int = 2) -> Map:
    return Map(torch.empty(batch, 128, 56, 56, device="meta"), False, NO_NORM, 2)


def test_tuning_keeps_the_fastest(tuning: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_device_name", lambda device: "some GPU")
    tuning += [3.0, 1.0, 2.0, 4.0]
    expected = launch.map_block(_map(), launch.CANDIDATES[1])
    assert launch.best("pool", _map(), lambda block: block) == expected
    assert launch.best("pool", _map(5), lambda block: block) == expected  # for any batch
    launch._tuned.cache_clear()
    assert launch.best("pool", _map(), lambda block: block) == expected  # from the file


def test_nothing_is_timed_while_a_graph_is_captured(
    tuning: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_device_name", lambda device: "some GPU")
    monkeypatch.setattr(launch, "_is_capturing", lambda x: True)
    expected = launch.map_block(_map(), launch.ELEMENTS["pool"])
    assert launch.best("pool", _map(), lambda block: block) == expected
    monkeypatch.setattr(launch, "_is_capturing", lambda x: False)
    assert launch.best("pool", _map(0), lambda block: block) == expected


def test_a_file_of_choices_that_is_not_whole_counts_as_none(
    tuning: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "_device_name", lambda device: "some GPU")
    launch._file().parent.mkdir()
    for text in ('{"some', "[1]", "3", f'{{"{launch._key("pool", _map())}": "a"}}'):
        launch._tuned.cache_clear()
        launch._file().write_text(text)
        tuning += [4.0, 3.0, 2.0, 1.0]
        block = launch.best("pool", _map(), lambda block: block)
        assert block == launch.map_block(_map(), launch.CANDIDATES[3])
        assert launch._file().read_text().startswith("{\n")


def test_choices_that_cannot_be_written_are_kept(
    tuning: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_device_name", lambda device: "some GPU")
    monkeypatch.setattr(launch, "cache_folder", lambda: "/proc/nowhere")
    tuning += [1.0, 2.0, 3.0, 4.0]
    for _ in range(2):
        block = launch.best("pool", _map(), lambda block: block)
        assert block == launch.map_block(_map(), launch.CANDIDATES[0])


def test_unaligned_maps_are_copied() -> None:
    """A sample's address must not choose between kernels."""
    x = torch.randn(3, 3, 15, 15)
    for part in (x[1:], x.contiguous(memory_format=torch.channels_last)[1:]):
        assert part.data_ptr() % 16 != 0
        m = make_map(MapArguments(part, False, 1), NO_NORM)
        assert m.x.data_ptr() % 16 == 0 and m.x.stride() == part.stride()
        assert torch.equal(m.x, part)
