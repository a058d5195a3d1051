"""torch.fx traces a fused module as one node; torch.jit's errors say what to do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_fuse import features, randomise
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx.proxy import TraceError

import resnest_fused as rf


class Net(nn.Module):
    """Has a module fused by fuse, one built as a fused one, and other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.body = nn.ModuleList([rf.SplitAttentionConv2d(4, 8, 3, padding=1)])
        self.head = rf.FusedSplitAttention(4)
        rf.fuse(self)

    def forward(self, x):  # fx would keep annotations that are strings
        x = self.stem(x)
        for block in self.body:
            x = x + 1
            x = block(x)
        return self.head(x)


@pytest.fixture
def net() -> nn.Module:
    return randomise(Net())


def inputs() -> Tensor:
    return features(4, 3, 6, 5)


def test_a_fused_module_is_one_node(net: nn.Module) -> None:
    graph = fx.symbolic_trace(net).graph
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["stem.0", "stem.1", "body.0", "head"]
    others = [node.op for node in graph.nodes if node.op not in ("call_module",)]
    assert others == ["placeholder", "call_function", "output"]


def as_retraced(traced: fx.GraphModule) -> fx.GraphModule:
    return fx.symbolic_trace(traced)


def as_pickled(traced: fx.GraphModule) -> fx.GraphModule:
    return pickle.loads(pickle.dumps(traced))


COPIES = {
    "itself": lambda traced: traced,
    "deepcopy": copy.deepcopy,
    "pickle": as_pickled,
    "traced again": as_retraced,
}


@pytest.mark.parametrize("as_copy", COPIES.values(), ids=COPIES)
def test_a_traced_network_runs_and_trains(as_copy, net: nn.Module) -> None:
    traced = as_copy(fx.symbolic_trace(copy.deepcopy(net)))
    for training in (False, True):
        x = inputs()
        found, expected = (model.train(training)(x) for model in (traced, net))
        assert torch.equal(found, expected)
        dout = torch.randn_like(found)
        found.backward(dout)
        expected.backward(dout)
        for name, parameter in net.named_parameters():
            assert torch.equal(traced.get_parameter(name).grad, parameter.grad), name
        for name, buffer in net.named_buffers():
            assert torch.equal(traced.get_buffer(name), buffer), name


def test_unfuse_reaches_into_a_traced_network(net: nn.Module) -> None:
    traced = fx.symbolic_trace(net.eval())
    expected = traced(inputs())
    rf.unfuse(traced)
    assert type(traced.get_submodule("body.0")) is rf.SplitAttentionConv2d
    torch.testing.assert_close(traced(inputs()), expected)


def test_the_whole_network() -> None:
    network = rf.models.resnest50().eval()
    traced = fx.symbolic_trace(network)
    with torch.no_grad():
        x = torch.randn(1, 3, 33, 40)
        assert torch.equal(as_pickled(traced)(x), network(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantisation_leaves_a_fused_module_as_it_is(net: nn.Module) -> None:
    x = inputs()
    prepared = prepare_fx(net.eval(), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    converted = convert_fx(prepared)
    assert type(converted.get_submodule("head")) is rf.FusedSplitAttention
    assert "quantized" in type(converted.get_submodule("stem.0")).__module__
    exact = net(x)
    assert (converted(x) - exact).abs().max() < 0.1 * exact.abs().max()


KINDS = {
    rf.SplitAttention: (8,),
    rf.FusedSplitAttention: (8,),
    rf.SplitAttentionConv2d: (4, 8, 3),
    rf.FusedSplitAttentionConv2d: (4, 8, 3),
}


@pytest.mark.parametrize(("kind", "sizes"), KINDS.items(), ids=str)
def test_each_kind_of_module_is_one_node(kind: type[nn.Module], sizes: tuple[int, ...]) -> None:
    module = kind(*sizes).eval()
    traced = fx.symbolic_trace(nn.Sequential(module))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    x = features(2, 4 if len(sizes) > 1 else 16, 5, 5)
    assert torch.equal(traced(x), module(x))
    with pytest.raises(TraceError, match="trace a module that contains it"):
        fx.symbolic_trace(module)


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook"])
def test_hooks_run_once(kind: str) -> None:
    module = rf.FusedSplitAttention(8).double().eval()
    if kind == "forward hook":
        module.register_forward_hook(lambda module, args, out: out * 2)
    else:
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net = nn.Sequential(module, nn.ReLU())
    x = features(2, 16, 5, 5).double()
    traced = fx.symbolic_trace(net)
    for graph in (traced, copy.deepcopy(traced)):
        torch.testing.assert_close(graph(x), net(x), rtol=1e-12, atol=0)


# --- torch.jit, and the exporter that is built on it

# torch.jit.trace warns of every size that Python compares.
jit = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


def test_scripting_says_what_to_do(net: nn.Module) -> None:
    for model in (net, net.head):
        with pytest.raises(RuntimeError, match=r"cannot compile Fused\w+: .*unfuse\(model\)"):
            torch.jit.script(model)
    assert type(net.head) is rf.FusedSplitAttention  # the caller's model is as it was


@jit
def test_jit_trace_keeps_the_op_where_no_gradient_is_asked_for(net: nn.Module) -> None:
    x = inputs()
    with torch.no_grad():
        traced = torch.jit.trace(net.eval(), x)
        assert "resnest_fused::split_attention" in str(traced.inlined_graph)
        assert torch.equal(traced(x), net(x))


@jit
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, lambda n: nn.GroupNorm(4, n)])
def test_jit_trace_of_what_trains_says_what_to_do(norm_layer) -> None:
    module, x = rf.FusedSplitAttention(8, norm_layer=norm_layer), features(4, 16, 5, 5)
    with pytest.raises(RuntimeError, match=r'no_grad.*use_backend\("reference"\)'):
        torch.jit.trace(module, x)
    with rf.use_backend("reference"):
        traced = torch.jit.trace(module.eval(), x)
    torch.testing.assert_close(traced(x), module(x))


@jit
def test_the_legacy_onnx_exporter_takes_standard_ops(net: nn.Module, tmp_path) -> None:
    import onnxruntime

    x, path = inputs(), str(tmp_path / "net.onnx")
    torch.onnx.export(net.eval(), (x,), path, dynamo=False, input_names=["x"])
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=1e-4, atol=1e-5)


@jit
def test_a_backend_by_name_refuses_onnx_and_says_what_to_do(net: nn.Module, tmp_path) -> None:
    with (
        rf.use_backend("native"),
        pytest.raises(RuntimeError, match=r'standard ops only.*use_backend\("reference"\)'),
    ):
        torch.onnx.export(net.eval(), (inputs(),), str(tmp_path / "net.onnx"), dynamo=False)
