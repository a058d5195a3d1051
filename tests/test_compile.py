"""torch.compile and torch.export: one graph, any batch, the fused ops in it, eager's results."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import NORMS, Case, draw
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func

import resnest_fused as rf
from resnest_fused.modules import fused_attention

NormLayer = Callable[[int], nn.Module] | None


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _modules(
    norm0: NormLayer = None, norm1: NormLayer = nn.BatchNorm2d
) -> tuple[nn.Module, nn.Module]:
    """A fused module from 16 to 8 channels and its copy; ``norm0`` adds the convolution."""
    options = {"radix": 2, "cardinality": 2, "inter_channels": 8}
    if norm0 is None:
        module = rf.FusedSplitAttention(8, norm_layer=norm1, **options)
    else:
        options["padding"] = 1
        module = rf.FusedSplitAttentionConv2d(16, 8, 3, norm_layer=norm0, **options)
        module.bn1 = None if norm1 is None else norm1(8)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
    return module.double(), copy.deepcopy(module)


def _group_norm(features: int) -> nn.Module:
    return nn.GroupNorm(2, features)


def _step(module: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    grads = torch.autograd.grad(out.square().sum(), [leaf, *parameters])
    return [out.detach(), *grads]


class OpRecorder:
    """An ahead-of-time backend that keeps the names of the ops in the graphs that it gets."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.backend = aot_autograd(
            fw_compiler=self._record(self.forward),
            bw_compiler=self._record(self.backward),
            inference_compiler=self._record(self.forward),
        )

    @staticmethod
    def _record(names: list[str]) -> Callable[[torch.fx.GraphModule, list[Any]], Any]:
        def compile(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
            names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
            return make_boxed_func(graph.forward)

        return compile


def _assert_same_step(
    compiled: Callable[[Tensor], Tensor], module: nn.Module, twin: nn.Module, x: Tensor
) -> None:
    """``compiled`` is ``module`` compiled, ``twin`` is its copy."""
    ours = _step(compiled, list(module.parameters()), x)
    expected = _step(twin, list(twin.parameters()), x)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def _fused_ops(names: list[str]) -> list[str]:
    """Without the one for running statistics, which the compiler wraps as it writes."""
    return sorted(
        name.removeprefix("resnest_fused.").removesuffix(".default")
        for name in names
        if name.startswith("resnest_fused.")
    )


FIRST_PHASES = ["pool", "recombine"]
LAST_PHASES = ["pool_backward", "recombine_backward"]
# bn0, bn1 and the ops of forward and of backward.
TRACES: dict[str, tuple[NormLayer, NormLayer, list[str], list[str]]] = {
    "batch": (None, nn.BatchNorm2d, ["split_attention_train"], ["split_attention_backward"]),
    "batch, batch": (
        nn.BatchNorm2d,
        nn.BatchNorm2d,
        ["split_attention_train"],
        ["split_attention_backward"],
    ),
    "sync, none": (
        nn.SyncBatchNorm,
        None,
        ["split_attention_train"],
        ["split_attention_backward"],
    ),
    "group": (None, _group_norm, FIRST_PHASES, LAST_PHASES),
    "batch, group": (
        nn.BatchNorm2d,
        _group_norm,
        ["batch_statistics", *FIRST_PHASES],
        [*LAST_PHASES[:1], "prologue_backward", *LAST_PHASES[1:]],
    ),
    "group, batch": (
        _group_norm,
        nn.BatchNorm2d,
        ["split_attention_train"],
        ["split_attention_backward"],
    ),
}


@pytest.mark.parametrize(("norm0", "norm1", "forward", "backward"), TRACES.values(), ids=TRACES)
def test_ops_of_a_training_step(
    norm0: NormLayer, norm1: NormLayer, forward: list[str], backward: list[str]
) -> None:
    """Each phase runs once. Nothing else reads the big map, except a bn0 of another class."""
    recorder = OpRecorder()
    module, twin = _modules(norm0, norm1)
    compiled = torch.compile(module, fullgraph=True, backend=recorder.backend)
    _assert_same_step(compiled, module, twin, _randn(4, 16, 3, 5))
    assert _fused_ops(recorder.forward) == forward
    assert _fused_ops(recorder.backward) == backward
    everything = " ".join(recorder.forward + recorder.backward)
    assert "batch_norm" not in everything
    if norm1 is not _group_norm:
        assert not re.search("relu|threshold|softmax", everything)
        assert everything.count("convolution") == (0 if norm0 is None else 2)
    assert everything.count("native_group_norm") == 2 * [norm0, norm1].count(_group_norm)


@pytest.mark.parametrize("norm0", [None, nn.BatchNorm2d], ids=["attention", "conv"])
def test_eval_traces_into_one_op(norm0: NormLayer) -> None:
    recorder = OpRecorder()
    module, twin = _modules(norm0)
    module.eval()
    compiled = torch.compile(module, fullgraph=True, backend=recorder.backend)
    x = _randn(4, 16, 3, 5)
    with torch.no_grad():
        assert torch.equal(compiled(x), twin.eval()(x))
    *before, op = recorder.forward
    assert op == "resnest_fused.split_attention.default"
    assert before == ([] if norm0 is None else ["aten.convolution.default"])


class Doubled(nn.BatchNorm2d):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


OTHER_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": _group_norm,
    "identity": lambda n: nn.Identity(),
    "sync": nn.SyncBatchNorm,
    "own forward": Doubled,
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "not tracking": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", OTHER_NORMS.values(), ids=OTHER_NORMS)
def test_any_norm(norm: Callable[[int], nn.Module], training: bool) -> None:
    module, twin = _modules(norm, norm)
    module.train(training)
    twin.train(training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        _assert_same_step(compiled, module, twin, _randn(4, 16, 3, 5))


def test_any_activation() -> None:
    module, twin = _modules(nn.BatchNorm2d)

    class Net(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.act1 = nn.PReLU(dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            m = self.module
            modules = {"bn0": m.bn0, "act0": nn.ReLU(), "fc1": m.fc1, "bn1": m.bn1, "fc2": m.fc2}
            options = {"radix": 2, "cardinality": 2, "backend": "auto"}
            return fused_attention(m.conv(x), **modules, act1=self.act1, **options)

    recorder = OpRecorder()
    net, other = Net(module), Net(twin)
    compiled = torch.compile(net, fullgraph=True, backend=recorder.backend)
    _assert_same_step(compiled, net, other, _randn(4, 16, 3, 5))
    assert _fused_ops(recorder.forward) == ["batch_statistics", *FIRST_PHASES]


class Break(nn.Module):
    """Ends the graph that is being traced."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


def _broken_norm(features: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, features), Break())


@pytest.mark.one_in(4)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("norm0", [None, nn.BatchNorm2d], ids=["attention", "conv"])
def test_graph_break_between_the_fcs(norm0: NormLayer, memory_format: torch.memory_format) -> None:
    """The two halves of the op are in separate graphs, and still share one pass of backward."""
    recorder = OpRecorder()
    module, twin = _modules(norm0, _broken_norm)
    for m in (module, twin):
        m.to(memory_format=memory_format)
    compiled = torch.compile(module, backend=recorder.backend)
    x = _randn(4, 16, 3, 5).contiguous(memory_format=memory_format)
    _assert_same_step(compiled, module, twin, x)
    statistics = [] if norm0 is None else ["batch_statistics"]
    sums = [] if norm0 is None else ["prologue_backward"]
    assert _fused_ops(recorder.forward) == [*statistics, *FIRST_PHASES]
    assert _fused_ops(recorder.backward) == [LAST_PHASES[0], *sums, LAST_PHASES[1]]


@pytest.mark.long
def test_graph_break_and_any_batch() -> None:
    module, twin = _modules(nn.BatchNorm2d, _broken_norm)
    compiled = torch.compile(module, backend="aot_eager", dynamic=True)
    for batch in (4, 7):
        _assert_same_step(compiled, module, twin, _randn(batch, 16, 3, 5))


@pytest.mark.long
def test_graph_break_with_inductor() -> None:
    module, twin = _modules(nn.BatchNorm2d, _broken_norm)
    _assert_same_step(torch.compile(module), module, twin, _randn(4, 16, 3, 5))


@pytest.mark.parametrize("norm", NORMS)
def test_function(norm: str) -> None:
    call = draw(Case(3, 6, 4, 5, 3, 2, 6, torch.float64, layout="channels_last", norm=norm))
    compiled = torch.compile(call.forward, fullgraph=True, backend="aot_eager")
    names = call.differentiable()
    leaves = {name: call.tensor(name).detach().requires_grad_() for name in names}
    out = compiled(**leaves)
    assert out.is_contiguous(memory_format=torch.channels_last)
    grads = torch.autograd.grad(out, list(leaves.values()), call.dout)
    expected_out, expected = call.gradients()
    torch.testing.assert_close(out.detach(), expected_out)
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, expected[name], msg=name)


MODULES = {
    "attention": (None, nn.BatchNorm2d),
    "conv": (nn.BatchNorm2d, nn.BatchNorm2d),
    "group": (nn.BatchNorm2d, _group_norm),
}
any_module = pytest.mark.parametrize(("norm0", "norm1"), MODULES.values(), ids=MODULES)


SIZES = ((4, 3, 5), (2, 3, 5), (7, 6, 2), (33, 4, 4))


@pytest.mark.one_in(5)
@any_module
@pytest.mark.parametrize("training", [True, False])
def test_any_size_runs_in_one_graph(training: bool, norm0: NormLayer, norm1: NormLayer) -> None:
    module, twin = _modules(norm0, norm1)
    module.train(training)
    twin.train(training)
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for batch, *pixels in SIZES:
        x = _randn(batch, 16, *pixels)
        torch.testing.assert_close(compiled(x), twin(x))
    assert counter.frame_count == 1


@pytest.mark.one_in(3)
@any_module
def test_any_size_with_gradients(norm0: NormLayer, norm1: NormLayer) -> None:
    module, twin = _modules(norm0, norm1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for index, (batch, *pixels) in enumerate(SIZES):
        x = _randn(batch, 16, *pixels)
        torch._dynamo.mark_dynamic(x, (0, 2, 3))
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            out = compiled(x)
        expected_out = twin(x)
        torch.testing.assert_close(out, expected_out)
        grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        expected = torch.autograd.grad(expected_out.square().sum(), list(twin.parameters()))
        torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


@pytest.mark.long
@pytest.mark.parametrize("norm1", [nn.BatchNorm2d, _group_norm], ids=["batch", "group"])
def test_inductor(norm1: NormLayer) -> None:
    """Inductor fuses other ops around ours; the activations are channels_last."""
    module, twin = _modules(nn.BatchNorm2d, norm1)
    for m in (module, twin):
        m.to(memory_format=torch.channels_last)
    x = _randn(4, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    _assert_same_step(torch.compile(module, fullgraph=True), module, twin, x)


def test_autocast() -> None:
    options = {"padding": 1, "cardinality": 2, "radix": 2}
    module = rf.FusedSplitAttentionConv2d(8, 8, 3, **options)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 6, 6)
    results = []
    for run, parameters in ((compiled, module.parameters()), (twin, twin.parameters())):
        with torch.autocast(x.device.type, torch.bfloat16):
            out = run(x)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), list(parameters))
        results.append([out.detach(), *grads])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05)


def test_frozen_norm_in_a_training_module() -> None:
    module, twin = _modules()
    for m in (module, twin):
        m.bn1.eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = _randn(1, 16, 3, 5)  # one sample needs no batch statistics here
    ours = _step(compiled, list(module.parameters()), x)
    for a, b in zip(ours, _step(twin, list(twin.parameters()), x), strict=True):
        torch.testing.assert_close(a, b)
    assert module.bn1.num_batches_tracked == 0


def test_functional_call_compiled() -> None:
    module, _ = _modules()
    module.eval()
    other = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    x = _randn(2, 16, 3, 5)

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(other, x), run(other, x))


def test_export_with_any_batch() -> None:
    module, _ = _modules()
    module.eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        exported = torch.export.export(
            module, (_randn(3, 16, 4, 5),), dynamic_shapes={"x": {0: batch}}
        )
    names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert names.count("resnest_fused.split_attention.default") == 1
    for size in (1, 2, 9):
        x = _randn(size, 16, 4, 5)
        assert torch.equal(exported.module()(x), module(x))


def test_wrong_input_raises_the_same_error() -> None:
    module, _ = _modules()
    compiled = torch.compile(module, backend="aot_eager")
    with pytest.raises(ValueError, match="x: expected channels divisible by radix=2, got 15"):
        compiled(_randn(4, 15, 3, 5))
