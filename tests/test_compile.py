"""torch.compile and torch.export: one graph, any batch, the fused ops in it, eager's results."""

from __future__ import annotations

import copy
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


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _modules() -> tuple[nn.Module, nn.Module]:
    module = rf.FusedSplitAttention(8, radix=2, cardinality=2, inter_channels=8).double()
    nn.init.normal_(module.bn1.weight)
    return module, copy.deepcopy(module)


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


def test_training_traces_into_one_fused_op_each_way() -> None:
    recorder = OpRecorder()
    module, twin = _modules()
    compiled = torch.compile(module, fullgraph=True, backend=recorder.backend)
    x = _randn(4, 16, 3, 5)
    ours = _step(compiled, list(module.parameters()), x)
    expected = _step(twin, list(twin.parameters()), x)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    for (name, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert module.bn1.num_batches_tracked == 1
    assert recorder.forward.count("resnest_fused.split_attention_train.default") == 1
    fused, *rest = [name for name in recorder.backward if "getitem" not in name]
    assert fused == "resnest_fused.split_attention_backward.default"
    # What is left is the gradient of square() in front of it.
    assert not [name for name in rest + recorder.forward if "conv" in name or "softmax" in name]


def test_eval_traces_into_one_op() -> None:
    recorder = OpRecorder()
    module, twin = _modules()
    module.eval()
    compiled = torch.compile(module, fullgraph=True, backend=recorder.backend)
    x = _randn(4, 16, 3, 5)
    with torch.no_grad():
        assert torch.equal(compiled(x), twin.eval()(x))
    assert recorder.forward == ["resnest_fused.split_attention.default"]


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


@pytest.mark.parametrize("training", [True, False])
def test_any_batch_runs_in_one_graph(training: bool) -> None:
    module, twin = _modules()
    module.train(training)
    twin.train(training)
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for batch in (4, 2, 7, 33):
        x = _randn(batch, 16, 3, 5)
        torch.testing.assert_close(compiled(x), twin(x))
    assert counter.frame_count == 1


def test_any_batch_with_gradients() -> None:
    module, twin = _modules()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for index, batch in enumerate((4, 2, 7, 33)):
        x = _randn(batch, 16, 3, 5)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            out = compiled(x)
        expected_out = twin(x)
        torch.testing.assert_close(out, expected_out)
        grads = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        expected = torch.autograd.grad(expected_out.square().sum(), list(twin.parameters()))
        torch.testing.assert_close(grads, expected)
    torch.testing.assert_close(module.state_dict(), twin.state_dict())


def test_inductor() -> None:
    """The op among other ops that Inductor fuses, with channels_last activations."""
    options = {"padding": 1, "cardinality": 2, "radix": 2}
    module = rf.FusedSplitAttentionConv2d(8, 8, 3, **options).double()
    module = module.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True)
    x = _randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    ours = _step(compiled, list(module.parameters()), x)
    expected = _step(twin, list(twin.parameters()), x)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast() -> None:
    options = {"padding": 1, "cardinality": 2, "radix": 2}
    module = rf.FusedSplitAttentionConv2d(8, 8, 3, **options)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8, 6, 6)
    results = []
    for run, parameters in ((compiled, module.parameters()), (twin, twin.parameters())):
        with torch.autocast("cpu", torch.bfloat16):
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
