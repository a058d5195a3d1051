"""The CUDA kernels on a GPU: large maps, graphs, streams, memory and errors.

That they compute the right numbers in every form is for the other tests, run with ``--device cuda``
as ``tests/gpu.sh`` does.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import EPS, Call, Case, draw_any
from test_modules import _assert_as_exact, _pair, _step
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused import reference

pytestmark = pytest.mark.gpu

ops = torch.ops.resnest_fused
FORMATS = ("nchw", "channels_last")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# bn0's and bn1's running statistics, and neither norm.
EVAL_FORMS = (("none", "running"), ("relu", "none"), ("running", "running"))
TRAIN_FORMS = (("none", "batch"), ("batch", "batch"))

# (channels, side) of the maps in ResNeSt-50 at 224 pixels, -101 at 256 and -200 at 320.
STAGES = {
    "resnest50": ((64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)),
    "resnest101": ((64, 64), (128, 64), (128, 32), (256, 32), (256, 16), (512, 16), (512, 8)),
    "resnest200": ((64, 80), (128, 80), (128, 40), (256, 40), (256, 20), (512, 20), (512, 10)),
}

by_layout = pytest.mark.parametrize("layout", FORMATS)
by_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)
by_eval_form = pytest.mark.parametrize(("prologue", "norm"), EVAL_FORMS)


@pytest.fixture(scope="module", autouse=True)
def on_gpu() -> None:
    assert torch.get_default_device().type == "cuda", "to be run with --device cuda"


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """Other processes may test on the same GPU."""
    yield
    torch.cuda.empty_cache()


def call_of(
    batch: int,
    channels: int,
    side: int,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "nchw",
    prologue: str = "running",
    norm: str = "running",
    radix: int = 2,
) -> Call:
    """A call with the width between the FCs that ResNeSt has, and parameters in float32."""
    inter = reference.default_inter_channels(channels, radix)
    parameters = torch.promote_types(dtype, torch.float32)
    sizes = (batch, channels, side, side, radix, 1, inter)
    return draw_any(Case(*sizes, dtype, parameters, layout, layout, norm=norm, prologue=prologue))


def step(call: Call) -> list[Tensor]:
    out, grads = call.gradients()
    return [out, *grads.values()]


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        assert torch.equal(a, b)


# --- the same bits


@by_eval_form
@by_dtype
@by_layout
@pytest.mark.parametrize(("batch", "channels", "side"), [(1, 64, 56), (33, 24, 5), (300, 512, 7)])
def test_evaluation_repeats(
    batch: int,
    channels: int,
    side: int,
    layout: str,
    dtype: torch.dtype,
    prologue: str,
    norm: str,
) -> None:
    call = call_of(batch, channels, side, dtype, layout, prologue, norm)
    expected = call.forward()
    for _ in range(5):
        assert torch.equal(call.forward(), expected)


@by_layout
@by_dtype
@pytest.mark.parametrize(("prologue", "norm"), TRAIN_FORMS)
def test_training_repeats(prologue: str, norm: str, dtype: torch.dtype, layout: str) -> None:
    call = call_of(64, 128, 28, dtype, layout, prologue, norm)
    expected = step(call)
    for _ in range(5):
        assert_same_bits(step(call), expected)


@by_eval_form
@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "side"), [(64, 56), (256, 14), (512, 7), (8, 3)])
def test_in_eval_a_sample_does_not_depend_on_its_batch(
    channels: int,
    side: int,
    dtype: torch.dtype,
    layout: str,
    prologue: str,
    norm: str,
) -> None:
    call = call_of(64, channels, side, dtype, layout, prologue, norm)
    expected = call.forward()
    for start, stop in [(i, i + 1) for i in range(0, 64, 9)] + [(0, 2), (1, 34), (31, 64)]:
        assert torch.equal(call.samples(start, stop).forward(), expected[start:stop])


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Whatever is allocated, the workspace as well, holds NaN: every bit of integers is 1."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@by_eval_form
@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "channels", "side"), [(3, 24, 5), (65, 64, 56), (130, 512, 7)])
def test_no_element_keeps_what_memory_held_before(
    batch: int,
    channels: int,
    side: int,
    dtype: torch.dtype,
    layout: str,
    prologue: str,
    norm: str,
    request: pytest.FixtureRequest,
) -> None:
    call = call_of(batch, channels, side, dtype, layout, prologue, norm)
    expected = [call.forward(), *step(call)]
    request.getfixturevalue("fresh_memory_is_nan")
    assert_same_bits([call.forward(), *step(call)], expected)


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("prologue", "norm"), TRAIN_FORMS)
def test_no_element_of_training_keeps_what_memory_held_before(
    prologue: str, norm: str, dtype: torch.dtype, layout: str, request: pytest.FixtureRequest
) -> None:
    calls = [call_of(*sizes, dtype, layout, prologue, norm) for sizes in ((3, 24, 5), (65, 64, 56))]
    expected = [step(call) for call in calls]
    request.getfixturevalue("fresh_memory_is_nan")
    for call, results in zip(calls, expected, strict=True):
        assert_same_bits(step(call), results)


# --- the sizes of published models, against float64 on the GPU


def relative_error(result: Tensor, truth: Tensor) -> float:
    """In the 2-norm."""
    difference = torch.linalg.vector_norm(result.double() - truth)
    return (difference / torch.linalg.vector_norm(truth)).item()


@pytest.mark.parametrize("batch", [1, 2, 32, 256])
@pytest.mark.parametrize("model", STAGES)
def test_stages_in_eval(model: str, batch: int) -> None:
    """Every stage in two formats, dtypes and forms each, in chunks as float64 takes much room."""
    for index, (channels, side) in enumerate(STAGES[model]):
        for offset, layout in enumerate(FORMATS):
            dtype = (torch.bfloat16, torch.float32)[(index + offset) % 2]
            prologue = ("running", "none")[index // 2 % 2]
            call = call_of(batch, channels, side, dtype, layout, prologue)
            out = call.forward()
            error = usual = scale = 0.0
            for start in range(0, batch, 32):
                part = call.samples(start, start + 32)
                truth = part.to(torch.float64).forward("reference")
                ours = out[start : start + 32].double()
                error = max(error, (ours - truth).abs().max().item())
                eager = part.forward("reference").double()
                usual = max(usual, (eager - truth).abs().max().item())
                scale = max(scale, truth.abs().max().item())
            # In float32 a few ulps, as the largest error of one draw is in part luck.
            slack = max(torch.finfo(dtype).eps, 5e-7)
            assert error <= 1.5 * usual + slack * scale, call.case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("prologue", "norm"), TRAIN_FORMS)
@pytest.mark.parametrize("batch", [8, 32, 128])
def test_stages_in_training(batch: int, prologue: str, norm: str, dtype: torch.dtype) -> None:
    """By relative errors of all elements together, as rounding decides over some ReLUs.

    In front of the attention it takes single elements of x's gradient away; between the FCs, a
    sample's part in the gradients of parameters.
    """
    for index, (channels, side) in enumerate(STAGES["resnest50"]):
        call = call_of(batch, channels, side, dtype, FORMATS[index % 2], prologue, norm)
        out, grads = call.gradients()
        eager_out, eager_grads = call.gradients("reference")
        true_out, truth = call.to(torch.float64).gradients("reference")
        slacks = {"out": torch.finfo(dtype).eps, "x": 1e-3} | {
            # In front of a batch normalisation it is zero but for rounding.
            name: 2e-2
            for name in grads
            if name not in ("x", "fc1_bias")
        }
        ours, eager, exact = (
            {"out": o, **g} for o, g in ((out, grads), (eager_out, eager_grads), (true_out, truth))
        )
        for name, slack in slacks.items():
            allowed = 1.5 * relative_error(eager[name], exact[name]) + slack
            assert relative_error(ours[name], exact[name]) <= allowed, (name, call.case)


# --- beyond 32 bits


def large_map(layout: str, *shape: int) -> Tensor:
    """Random numbers in bfloat16, made in place, as copies would take much room."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format).normal_()


@by_layout
def test_more_elements_than_32_bits_count(layout: str) -> None:
    """Samples at both ends, and around the element that 32 bits no longer reach."""
    channels, side = 64, 56
    of_sample = 2 * channels * side**2
    batch = 2**31 // of_sample + 70
    small = call_of(1, channels, side, layout=layout)
    x = large_map(layout, batch, 2 * channels, side, side)
    dout = large_map(layout, batch, channels, side, side)
    assert x.numel() > 2**31
    call = Call(small.case, x, small.params, dout)
    border = 2**31 // of_sample
    starts = (0, border // 2, border - 1, batch - 3)
    out = call.forward()
    for start in starts:
        part = call.samples(start, start + 3).forward()
        assert torch.equal(part, out[start : start + 3])
    _, grads = call.gradients(names=["x"])
    for start in starts:
        _, part_grads = call.samples(start, start + 3).gradients(names=["x"])
        torch.testing.assert_close(part_grads["x"], grads["x"][start : start + 3])
    mean, var = ops.batch_statistics(x)
    for feature in (0, 1, 2 * channels - 1):
        values = x[:, feature].double()
        torch.testing.assert_close(mean[feature].double(), values.mean(), rtol=1e-5, atol=1e-6)
        true_var = values.var(correction=0)
        torch.testing.assert_close(var[feature].double(), true_var, rtol=1e-5, atol=0)


@by_layout
def test_a_sample_of_more_elements_than_32_bits_count(layout: str) -> None:
    """Its first and last rows of pixels, by the formulas."""
    channels, side = 256, 2052
    small = call_of(1, channels, 4, layout=layout, prologue="none")
    x = large_map(layout, 1, 2 * channels, side, side)
    assert x.numel() > 2**31
    call = Call(small.case, x, small.params, small.dout)
    p = {name: tensor.double() for name, tensor in call.params.items()}
    sums = x.sum(dim=(2, 3), dtype=torch.float32).view(1, 2, channels).sum(dim=1).double()
    bn1 = rf.BatchNormArgs(
        *(p[f"bn1_{name}"] for name in ("weight", "bias", "running_mean", "running_var")), eps=EPS
    )
    names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    mlp = reference.plain_mlp(*(p[name] for name in names), bn1, cardinality=1, training=False)
    logits = mlp((sums / side**2)[..., None, None])
    attention = reference.r_softmax(logits, 2, 1)
    out = call.forward()
    for rows in (slice(0, 2), slice(side // 2, side // 2 + 2), slice(side - 2, side)):
        splits = reference.as_splits(x[:, :, rows].double(), 2)
        truth = reference.recombine(splits, attention)
        torch.testing.assert_close(out[:, :, rows].double(), truth, rtol=8e-3, atol=1e-3)


# --- graphs, the compiler, streams


def capture(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of the call, and the results that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def refill(call: Call) -> None:
    """Other values in the same memory."""
    other = draw_any(call.case)
    call.x.copy_(other.x)
    call.dout.copy_(other.dout)
    for name, tensor in call.params.items():
        tensor.copy_(other.params[name])


@by_layout
@pytest.mark.parametrize("batch", [1, 64])
def test_graph_of_eval(batch: int, layout: str) -> None:
    call = call_of(batch, 64, 56, layout=layout)
    graph, (out,) = capture(lambda: [call.forward()])
    for _ in range(3):
        refill(call)
        for _ in range(2):
            graph.replay()
        assert torch.equal(out, call.forward())


@by_layout
@pytest.mark.parametrize(("prologue", "norm"), TRAIN_FORMS)
def test_graph_of_a_training_step(prologue: str, norm: str, layout: str) -> None:
    call = call_of(16, 64, 28, layout=layout, prologue=prologue, norm=norm)
    graph, results = capture(lambda: step(call))
    for _ in range(3):
        refill(call)
        for _ in range(2):
            graph.replay()
        assert_same_bits(results, step(call))


def conv_less(training: bool) -> nn.Module:
    """All that follows a convolution; its norms have parameters and statistics that matter."""
    module = rf.FusedSplitAttentionConv2d(64, 64, 1)
    module.conv = nn.Identity()
    for norm in (module.bn0, module.bn1):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.train(training)


def features(batch: int = 16) -> Tensor:
    """Samples that differ in their means, as bn1 divides by their spread."""
    return torch.randn(batch, 128, 14, 14) + torch.randn(batch, 128, 1, 1)


def module_step(
    module: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor
) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    grads = torch.autograd.grad(out.square().sum(), [leaf, *parameters])
    return [out.detach().clone(), *(grad.clone() for grad in grads)]


@pytest.mark.parametrize("training", [False, True])
def test_graphed_callables(training: bool) -> None:
    module = conv_less(training)
    twin = copy.deepcopy(module)
    graphed = torch.cuda.make_graphed_callables(module, (features().requires_grad_(),))
    twin.load_state_dict(module.state_dict())  # capturing has run it a few times
    for _ in range(3):
        x = features()
        ours = module_step(graphed, list(module.parameters()), x)
        assert_same_bits(ours, module_step(twin, list(twin.parameters()), x))
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled(training: bool, mode: str) -> None:
    """Inductor leaves the op as it is; "reduce-overhead" puts it into CUDA graphs."""
    torch.compiler.reset()
    module = conv_less(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(4):
        x = features()
        torch.compiler.cudagraph_mark_step_begin()
        if training:
            ours = module_step(compiled, list(module.parameters()), x)
            assert_same_bits(ours, module_step(twin, list(twin.parameters()), x))
        else:
            with torch.no_grad():
                assert torch.equal(compiled(x), twin(x))
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


@by_layout
def test_two_streams(layout: str) -> None:
    """Calls that run at the same time, each with a workspace of its own."""
    calls = [call_of(batch, 64, 56, layout=layout) for batch in (96, 97)]
    expected = [call.forward() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    outs: list[tuple[int, Tensor]] = []
    for _ in range(20):
        for index, (call, stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                outs.append((index, call.forward()))
    torch.cuda.synchronize()
    for index, out in outs:
        assert torch.equal(out, expected[index])


def test_training_in_two_streams() -> None:
    calls = [call_of(32, 64, 28, prologue="batch", norm="batch") for _ in range(2)]
    expected = [step(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for _ in range(5):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(call))
    torch.cuda.synchronize()
    for index, found in enumerate(results):
        assert_same_bits(found, expected[index % 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool, dtype: torch.dtype) -> None:
    """The convolution gives 16 bits; parameters and their gradients stay float32."""
    eager, fused = (module.float().train(training) for module in _pair(conv=True))

    def run(module: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
        with torch.autocast("cuda", dtype):
            return _step(module, x.float())

    _assert_as_exact(fused, eager, run)


# --- memory, errors, devices


@by_layout
@pytest.mark.parametrize(("channels", "side"), [(64, 56), (512, 7)])
def test_memory(channels: int, side: int, layout: str) -> None:
    """Beside the results, what goes from phase to phase: some numbers a sample and channel."""
    call = call_of(128, channels, side, layout=layout)
    small = 4 * call.case.batch * channels * 20 + 4 * 2**20

    def peak(run: Callable[[], object]) -> int:
        run()  # what is allocated once for all calls
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    assert peak(call.forward) <= call.dout.nbytes + small
    parameters = [call.params[f"bn0_{n}"] for n in ("weight", "bias")]
    statistics = [call.params[f"bn0_running_{n}"] for n in ("mean", "var")]
    arguments = (call.x, True, 2, *parameters, *statistics, EPS, False)
    attention = torch.rand(128, 2, channels)
    dgap = torch.rand(128, channels)

    def backward() -> object:
        ops.pool_backward(call.dout, *arguments)
        return ops.recombine_backward(call.dout, *arguments, attention, dgap, None, None)

    assert peak(backward) <= call.x.nbytes + 8 * small


def test_out_of_memory() -> None:
    """It raises, and the next call works."""
    drawn = call_of(256, 64, 56)
    case, params = drawn.case, {name: tensor.cpu() for name, tensor in drawn.params.items()}
    x, dout = drawn.x.cpu(), drawn.dout.cpu()
    del drawn
    gc.collect()
    torch.cuda.empty_cache()
    # In memory of their own size: what they were drawn with leaves room that a result would fit.
    params = {name: tensor.cuda() for name, tensor in params.items()}
    call = Call(case, x.cuda(), params, dout.cuda())
    expected = call.forward()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + call.dout.nbytes // 2
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        for run in (call.forward, call.gradients):
            with pytest.raises(RuntimeError):
                run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(call.forward(), expected)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU, here is one")
    call = call_of(4, 64, 14)
    expected = step(call)
    on_second = Call(
        call.case,
        call.x.to("cuda:1"),
        {name: tensor.to("cuda:1") for name, tensor in call.params.items()},
        call.dout.to("cuda:1"),
    )
    assert torch.cuda.current_device() == 0
    results = step(on_second)
    assert {tensor.device.index for tensor in results} == {1}
    assert_same_bits([tensor.to("cuda:0") for tensor in results], expected)
    assert torch.cuda.current_device() == 0
