"""verify, and fuse's verify: intact modules pass, wrong ones are named, nothing is left changed."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse import FUSED, UNFUSED, Net, features, kinds, randomise
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.utils.checkpoint import checkpoint

import resnest_fused as rf
from resnest_fused import modules
from resnest_fused.backends import native
from resnest_fused.measure import agreement
from resnest_fused.ops import TABLE

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SPLIT_ATTENTION = modules.split_attention


def fused_net(dtype: torch.dtype = torch.float32, training: bool = True) -> nn.Module:
    model = randomise(Net()).to(dtype).train(training)
    assert rf.fuse(model)
    return model


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return features(8, 4, 6, 6).to(dtype)


def failed(report: rf.VerifyReport) -> set[tuple[str, str, str]]:
    """Module, kind and tensor of every check that failed."""
    return {(e.name, c.kind, c.tensor) for e in report.entries for c in e.failed}


def assert_passes(report: rf.VerifyReport, modules: int = 3) -> None:
    assert report.passed and report, str(report)
    assert len(report.entries) == modules
    total = f"{modules} of {modules} fused modules agree with their unfused selves"
    assert repr(report) == f"VerifyReport({total})" and str(report).startswith(f"{total}\n")


# --- what is compared


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_intact_modules_pass(dtype, training):
    report = rf.verify(fused_net(dtype, training), images(dtype))
    assert_passes(report)
    stem, inner, _ = report.entries
    assert {check.dtype for check in stem.checks} == {torch.float64, dtype}
    assert stem.remark is None and stem.kind == "resnest_fused.reference.SplitAttentionConv2d"
    compared = [(c.kind, c.tensor) for c in inner.checks if c.dtype == torch.float64]
    parameters = ("conv.weight", "bn0.weight", "bn0.bias", "fc1.weight", "fc1.bias",
                  "bn1.weight", "bn1.bias", "fc2.weight", "fc2.bias")  # fmt: skip
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert compared == [
        ("outputs", ""),
        ("input gradients", ""),
        *(("parameter gradients", name) for name in parameters),
        *(("buffers", f"{norm}.{name}") for norm in ("bn0", "bn1") for name in buffers),
    ]
    assert str(report).startswith("3 of 3 fused modules agree with their unfused selves\nagrees: ")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_luck_raises_no_alarm(dtype):
    for seed in range(12):
        x = features(5, 4, 6, 6, seed=seed).to(dtype)
        model = randomise(Net(), seed).to(dtype)
        rf.fuse(model)
        assert_passes(rf.verify(model, x))


def test_modules_built_fused():
    model = nn.Sequential(rf.FusedSplitAttentionConv2d(4, 8, 3), rf.FusedSplitAttention(4))
    report = rf.verify(randomise(model), images())
    assert_passes(report, 2)
    assert [entry.kind.rpartition(".")[2] for entry in report.entries] == [
        "SplitAttentionConv2d",
        "SplitAttention",
    ]
    assert "agrees: (the model itself), " in str(rf.verify(model[0], images()))


def test_no_requires_grad_but_some():
    model = fused_net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "stem.fc1.bias")  # only noise, because of bn1
    report = rf.verify(model, images())
    assert_passes(report)
    gradients = [c.tensor for c in report.entries[0].checks if c.kind == "parameter gradients"]
    assert gradients == ["fc1.bias"] * 2
    assert {c.kind for c in report.entries[1].checks} == {"outputs", "input gradients", "buffers"}


@pytest.mark.parametrize("how", ["frozen", "no_grad", "inference_mode"])
def test_forward_alone(how):
    model = fused_net(training=how != "frozen")
    if how == "frozen":
        model.requires_grad_(False)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(how, contextlib.nullcontext)():
        report = rf.verify(model, images())
    assert_passes(report)
    assert {check.kind for check in report.entries[0].checks} == {"outputs", "buffers"}
    assert str(report).count("; forward only, as no gradient came to it") == 3


class Shared(nn.Module):
    """One module at two places, one that is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = rf.SplitAttentionConv2d(8, 8, 3, padding=1)
        self.again = self.first
        self.unused = rf.SplitAttention(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x).relu_())  # changes in place what is recorded


def test_a_module_met_twice_and_one_never_met(monkeypatch):
    model = randomise(Shared())
    rf.fuse(model)
    x = features(8, 8, 6, 6)
    report = rf.verify(model, x)
    assert [entry.name for entry in report.entries] == ["first", "unused"]
    assert report.entries[0].passed and not report.entries[1].passed and not report
    assert "not compared: unused, resnest_fused.reference.SplitAttention: not run" in str(report)
    assert "1 of 2 fused modules agree" in str(report)

    conv, seen = model.first.conv(x), []

    def wrong_later(x: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(torch.equal(x.float(), conv))
        return SPLIT_ATTENTION(x, *args, **options) * (1 if seen[-1] else 1.001)

    monkeypatch.setattr(modules, "split_attention", wrong_later)
    assert ("first", "outputs", "") in failed(rf.verify(model, x))
    assert {True, False} == set(seen)


Pair = namedtuple("Pair", "left right")


@dataclass
class Answer:
    scores: Tensor
    steps: int = 3


STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda out: (out, 1, None),
    "dict": lambda out: {"one": out, "two": [out.sum(), "text"]},
    "namedtuple": lambda out: Pair(out.detach(), out.mean()),
    "dataclass": lambda out: [Answer(out)],
}


class Structured(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.shape = Net(), shape

    def forward(self, batch: dict[str, Any], *, scale: float) -> Any:
        return self.shape(self.net(batch["x"] * scale))


@pytest.mark.parametrize("shape", STRUCTURES.values(), ids=STRUCTURES)
def test_any_inputs_and_outputs(shape):
    model = randomise(Structured(shape))
    rf.fuse(model)
    report = rf.verify(model, {"x": images(), "ids": [1, 2]}, scale=2.0)
    assert_passes(report)
    assert all(entry.remark is None for entry in report.entries)


def test_what_no_gradient_reaches_is_said():
    model = randomise(Structured(lambda out: SimpleNamespace(hidden=out)))
    rf.fuse(model)
    report = rf.verify(model, {"x": images()}, scale=1.0)
    assert_passes(report)
    assert report.entries[0].remark == "forward only, as no gradient came to it"


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_autocast(inside):
    model = fused_net()
    autocast = torch.autocast(torch.get_default_device().type, torch.bfloat16)
    if inside:
        model.forward = autocast(model.forward)
    with contextlib.nullcontext() if inside else autocast:
        report = rf.verify(model, images())
    assert_passes(report)
    assert {c.dtype for e in report.entries for c in e.checks} == {torch.float64, torch.bfloat16}


def test_random_modules_get_the_same_numbers():
    model = randomise(rf.SplitAttentionConv2d(4, 8, 3))
    model.bn0 = nn.Sequential(nn.BatchNorm2d(16), nn.Dropout(0.5))
    rf.fuse(model)
    report = rf.verify(model, images())
    assert_passes(report, 1)
    assert {check.dtype for check in report.entries[0].checks} == {torch.float64}
    assert "it draws random numbers" in str(report)
    assert rf.verify(model.eval(), images()).entries[0].remark is None


def test_hooks_and_replaced_children_run_in_both():
    model = fused_net()
    calls = []
    model.stem.fc1.register_forward_hook(lambda module, args, out: calls.append(1) or out * 2)
    model.stem.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.stem.register_full_backward_hook(lambda module, grads, _: (grads[0],))
    bias = model.stem.bn0.bias
    model.stem.bn0.forward = lambda x: x.mul(2) + bias.to(x.dtype)[:, None, None]  # a closure
    model.body[0].fc2 = weight_norm(model.body[0].fc2)  # whose weight is no leaf
    model.body[1].bn1 = nn.GroupNorm(2, 32)
    report = rf.verify(model, images().requires_grad_())
    assert_passes(report)
    assert calls


def test_checkpointed_modules():
    model = fused_net()
    inner = nn.Module()
    inner.net = model
    inner.forward = lambda x: checkpoint(model, x, use_reentrant=False)
    before = copy.deepcopy(model.state_dict())
    report = rf.verify(inner, images())
    assert_passes(report)
    assert all(entry.remark is None for entry in report.entries)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_wrapped_models(wrap):
    wrapper = wrap(fused_net(), **({"backend": "eager"} if wrap is torch.compile else {}))
    wrapper(images())
    report = rf.verify(wrapper, images())
    assert_passes(report)
    prefix = "module" if wrap is nn.DataParallel else "_orig_mod"
    assert report.entries[0].name == f"{prefix}.stem"
    assert report.entries[0].remark is None


def test_distributed_data_parallel(tmp_path):
    distributed = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(fused_net())
        assert_passes(rf.verify(model, images()))
        assert all(p.grad is None for p in model.parameters())
        model(images()).sum().backward()  # the reducer still works
        assert all(p.grad is not None for p in model.parameters())
        # The group must not end with the model: that waits, with Python's lock, for a thread of the
        # group that may still want the lock.
        del model
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folded_modules(dtype):
    model = randomise(Net()).to(dtype).eval()
    rf.fuse(model, fold=True)
    x = images(dtype).requires_grad_()
    state = {name: (value, value.clone()) for name, value in model.named_parameters()}
    report = rf.verify(model, x)
    assert_passes(report)
    assert {check.dtype for check in report.entries[0].checks} == {dtype}
    assert [check[:2] for check in report.entries[0].checks] == [
        ("outputs", ""),
        ("input gradients", ""),
        ("parameter gradients", "fc2.weight"),  # the only layer that is not folded
        ("parameter gradients", "fc2.bias"),
    ]
    for name, value in model.named_parameters():
        assert value.data_ptr() == state[name][0].data_ptr() and torch.equal(*state[name]), name
    with torch.no_grad():
        model.stem.conv.weight[0] *= 1.1
    assert failed(rf.verify(model, x)) >= {("stem", "outputs", "")}


def test_infinite_values_that_agree():
    model = fused_net(training=False)
    x = images()
    x[3] = float("inf")
    with torch.no_grad():
        assert_passes(rf.verify(model, x))
        x[:] = float("nan")  # leaves nothing to compare
        assert not rf.verify(model, x)


@pytest.mark.cpu
def test_any_default_device():
    torch.set_default_device("meta")
    try:
        model = Net().to_empty(device="cpu")
    finally:
        torch.set_default_device(None)
    randomise(model)
    x = images()
    with torch.device("meta"):
        assert len(rf.fuse(model, verify=True)) == 3
        assert_passes(rf.verify(model, x))


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_equal_images_raise_no_alarm(dtype):
    """Normalised they are 0 but for rounding, which then decides what a ReLU passes."""
    for size in (3, 5, 7):
        model = nn.Sequential(rf.SplitAttentionConv2d(4, 8, 3), rf.SplitAttention(4)).to(dtype)
        rf.fuse(model)
        assert_passes(rf.verify(model, images(dtype)[:1].expand(size, -1, -1, -1)), 2)


# --- what is found


def damage(monkeypatch: pytest.MonkeyPatch, call: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(modules, "split_attention", call)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_outputs(dtype, training, monkeypatch):
    model = fused_net(dtype, training)
    damage(monkeypatch, lambda *args, **options: SPLIT_ATTENTION(*args, **options) * 1.001)
    report = rf.verify(model, images(dtype))
    assert not report and "DIFFERS: stem, " in str(report)
    found = failed(report)
    assert {(name, "outputs", "") for name in ("stem", "body.0", "body.1")} <= found
    assert ("stem", "parameter gradients", "conv.weight") in found
    [error] = {c.error for c in report.entries[0].checks if c[:3] == ("outputs", "", torch.float64)}
    assert error == pytest.approx(0.001, rel=1e-6)
    assert "outputs, in float64 off by 1.0e-03, allowed 1.5e-08" in str(report)


@pytest.mark.parametrize("name", ["fc1_weight", "fc2_bias"])
def test_a_dropped_gradient(name, monkeypatch):
    place = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias").index(name)

    def drop(*args: Any, **options: Any) -> Tensor:
        kept = [t.detach() if i == place else t for i, t in enumerate(args)]
        return SPLIT_ATTENTION(*kept, **options)

    model = fused_net()
    model.body[0].fc1.register_forward_hook(lambda *_: None)  # so that its children are called
    damage(monkeypatch, drop)
    parameter = name.replace("_", ".")
    expected = {(module, "parameter gradients", parameter) for module in ("stem", "body.1")}
    assert failed(rf.verify(model, images())) == expected


def test_a_wrong_input_gradient(monkeypatch):
    def wrong(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return SPLIT_ATTENTION(x + 1e-4 * (x - x.detach()), *args, **options)

    model = fused_net()
    model.requires_grad_(False)
    damage(monkeypatch, wrong)
    expected = {(name, "input gradients", "") for name in ("stem", "body.0", "body.1")}
    assert failed(rf.verify(model, images().requires_grad_())) == expected


def biased(update: Callable[..., None]) -> Callable[..., None]:
    """The op, with the biased variance."""
    places = TABLE["update_running_statistics"].place
    elements = {
        "bn0": lambda x: x.shape[0] * x.shape[2] * x.shape[3],
        "bn1": lambda x: x.shape[0],
    }

    def wrong(*args: Any) -> None:
        changed = list(args)
        for name, count in elements.items():
            at = places[f"{name}_var"]
            if args[at] is not None:
                changed[at] = args[at] * (1 - 1 / count(args[0]))
        update(*changed)

    return wrong


def test_wrong_running_statistics(monkeypatch):
    model = fused_net()
    monkeypatch.setattr(
        native, "update_running_statistics", biased(native.update_running_statistics)
    )
    expected = {
        ("stem", "buffers", "bn0.running_var"),
        ("stem", "buffers", "bn1.running_var"),
        ("body.0", "buffers", "bn0.running_var"),
        ("body.0", "buffers", "bn1.running_var"),
        ("body.1", "buffers", "bn1.running_var"),
    }
    assert failed(rf.verify(model, images())) == expected


def test_batches_not_counted(monkeypatch):
    model = fused_net()
    read = modules.batch_norm_args

    def uncounted(bn: Any, activated: bool = False) -> Any:
        args = read(bn, activated)
        return None if args is None else args._replace(num_batches_tracked=None)

    monkeypatch.setattr(modules, "batch_norm_args", uncounted)
    found = failed(rf.verify(model, images()))
    assert ("stem", "buffers", "bn0.num_batches_tracked") in found
    assert {kind for _, kind, _ in found} == {"buffers"}


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_mistake_in_one_dtype_alone(dtype, monkeypatch):
    """One element is wrong in this dtype, and none in float64."""

    def wrong(x: Tensor, *args: Any, **options: Any) -> Tensor:
        out = SPLIT_ATTENTION(x, *args, **options)
        if x.dtype == dtype:
            largest = out.detach().abs().argmax().item()
            out = out * torch.ones_like(out).flatten().index_fill(
                0, torch.tensor([largest]), 0.5
            ).view_as(out)
        return out

    model = fused_net(dtype)
    damage(monkeypatch, wrong)
    report = rf.verify(model, images(dtype))
    assert ("stem", "outputs", "") in failed(report)
    assert {check.dtype for entry in report.entries for check in entry.failed} == {dtype}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number(value, monkeypatch):
    def wrong(*args: Any, **options: Any) -> Tensor:
        out = SPLIT_ATTENTION(*args, **options)
        return out.masked_fill(out == out.max(), value)

    model = fused_net()
    damage(monkeypatch, wrong)
    assert ("stem", "outputs", "") in failed(rf.verify(model, images()))


def test_what_was_patched_after_fuse(monkeypatch):
    """A patch that no fused module can know of."""
    model = fused_net()
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.leaky_relu(x, 0.2))
    report = rf.verify(model, images())
    assert not report and {name for name, _, _ in failed(report)} == {"stem", "body.0", "body.1"}


# --- what stays


def snapshot(model: nn.Module) -> list[Any]:
    """All that a run could change, by identity and by value."""
    found: list[Any] = [torch.get_rng_state()]
    for module in model.modules():
        state = vars(module)
        found.append((type(module), module.training, list(state), list(map(id, state.values()))))
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            found.append(list(state[hooks].items()))
        for tensor in (*state["_parameters"].values(), *state["_buffers"].values()):
            if tensor is not None:
                grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
                found.append(
                    (id(tensor), tensor._version, tensor.requires_grad, tensor.clone(), grad)
                )
    return found


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = fused_net()
        self.net.body[1].fc1 = weight_norm(self.net.body[1].fc1)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        torch.rand(3)
        if self.fails:
            raise OSError("no more")
        return out


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_all_stays_as_it_was(training, fails):
    model = Failing().train(training)
    model.net.stem.bn1.eval()
    model.net.stem.fc2.weight.requires_grad_(False)
    model.net.stem.fc1.register_forward_hook(lambda *_: None)
    model(images()).sum().backward()
    model.fails = fails
    x = images().requires_grad_()
    before, x_before = snapshot(model), x.detach().clone()
    with pytest.raises(OSError, match="no more") if fails else contextlib.nullcontext():
        assert_passes(rf.verify(model, x))
    assert_same(snapshot(model), before)
    assert torch.equal(x, x_before) and x.grad is None and x._version == 0


# --- wrong use


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got OrderedDict"):
        rf.verify(Net().state_dict(), images())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        rf.verify(fused_net())


def test_a_model_without_fused_modules():
    report = rf.verify(Net(), "not looked at")
    assert not report and report.entries == () and not report.passed
    assert str(report) == "no fused module found: fuse the model first, with resnest_fused.fuse"


class Derived(rf.FusedSplitAttention):
    pass


def test_a_subclass_is_not_compared():
    report = rf.verify(Derived(8), features(4, 16, 3, 3))
    assert not report
    assert "Derived: a subclass of a fused class, which has no unfused self" in str(report)


def test_a_module_that_cannot_be_compared(monkeypatch):
    class Single(nn.Module):
        """Knows one dtype."""

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only\nand nothing else")
            return x

    model = fused_net()
    model.stem.bn1 = Single()
    report = rf.verify(model, images())
    assert not report and [entry.passed for entry in report.entries] == [False, True, True]
    problem = "the unfused module raised TypeError in float64: float32 only"
    assert report.entries[0].problem == problem
    assert f"SplitAttentionConv2d: {problem}\n" in str(report)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel")

    model = fused_net()
    x = images()
    recorded = iter([SPLIT_ATTENTION] * 3)
    monkeypatch.setattr(modules, "split_attention", lambda *a, **o: next(recorded, refuse)(*a, **o))
    report = rf.verify(model, x)
    assert {e.problem for e in report.entries} == {
        "the fused module raised RuntimeError in float64: no kernel"
    }


# --- fuse(verify=True)


class Frozen(nn.Module):
    """Has a frozen norm's name and another formula."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def test_fuse_tries_modules_out_and_changes_nothing():
    model = Net()
    model.stem.bn1.eval()
    with torch.no_grad():
        before = snapshot(model)
        report = rf.fuse(model, verify=True)
        assert len(report) == 3 and not report.left_alone, report
        assert kinds(model) == FUSED
        rf.unfuse(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("options", [{"radix": 1}, {"cardinality": 2}, {"norm_layer": None}])
def test_fuse_tries_any_module(options):
    model = nn.ModuleList(
        [rf.SplitAttention(8, **options), rf.SplitAttentionConv2d(4, 8, 3, **options)]
    )
    model[1].conv = nn.Sequential(nn.Conv2d(4, 8 * model[1].radix, 1), nn.Tanh())
    assert len(rf.fuse(model, verify=True)) == 2


def test_fuse_leaves_alone_what_would_differ(monkeypatch):
    model = Net()
    damage(
        monkeypatch,
        lambda *a, **o: SPLIT_ATTENTION(*a, **o) * (1 if o["bn0"] is None else 1.001),
    )
    before = snapshot(model)
    report = rf.fuse(model, verify=True)
    assert [entry.fused for entry in report.entries] == [False, False, True]
    assert kinds(model) == [*UNFUSED[:2], FUSED[2]]
    for entry in report.left_alone:
        assert entry.reason.startswith("fused it would compute something else, in eval: ")
        assert "off by 1.0e-03, allowed 1.5e-08" in entry.reason and entry.reason in str(report)
    rf.unfuse(model)
    assert_same(snapshot(model), before)


def test_fuse_recognises_a_norm_by_what_it_computes():
    Frozen.__name__ = Frozen.__qualname__ = "FrozenBatchNorm2d"
    model = rf.SplitAttentionConv2d(4, 8, 3, norm_layer=Frozen)
    report = rf.fuse(model, verify=True)
    x = features(4, 4, 5, 5)
    assert not report or rf.verify(model, x)
    assert report or type(model) is rf.SplitAttentionConv2d


def test_fuse_leaves_alone_what_cannot_be_tried():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise OSError("no licence")

    broken, meta = rf.SplitAttention(8, norm_layer=lambda _: Broken()), rf.SplitAttention(8)
    report = rf.fuse(nn.ModuleList([broken, meta.to("meta")]), verify=True)
    assert [(entry.reason, entry.proven) for entry in report.entries] == [
        ("it cannot be tried out: the unfused module raised OSError in float64: no licence", False),
        (None, True),  # on the CPU
    ]


def test_fuse_with_verify_after_fuse():
    model = fused_net()
    assert [e.reason for e in rf.fuse(model, verify=True).entries] == ["already fused"] * 3


# --- the parts


def test_worst_check():
    def check(error: float, allowed: float = 1.0) -> agreement.Check:
        return agreement.Check("outputs", "", torch.float32, None, error, allowed)

    small, large, nan, exact = check(0.1), check(2), check(float("nan")), check(0.0, 0.0)
    assert agreement.worst([exact, small]) is small
    assert agreement.worst([small, large, exact]) is large
    assert agreement.worst([large, nan]) is nan
    assert agreement.worst([small, check(1.0, 0.0)]).error == 1.0


# --- other implementations


def peer(kind: str, **options: Any) -> nn.Module:
    if kind == "official":
        make = importlib.import_module("resnest.torch.splat").SplAtConv2d
        options = {"norm_layer": nn.BatchNorm2d, "bias": False} | options
    else:
        make = importlib.import_module("timm.layers.split_attn").SplitAttn
        options = {"norm_layer": nn.BatchNorm2d} | options
    return randomise(make(16, 16, 3, padding=1, **options))


@pytest.mark.peers
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["official", "timm"])
def test_peers_modules(kind, dtype, training, monkeypatch):
    for options in ({}, {"radix": 1}, {"groups": 2, "radix": 4}):
        module = peer(kind, **options)
        assert rf.fuse(module, verify=True)
        module.to(dtype).train(training)
        report = rf.verify(module, features(8, 16, 9, 8).to(dtype))
        assert_passes(report, 1)
        assert report.entries[0].kind.startswith(("resnest.torch.", "timm.layers."))
    damage(monkeypatch, lambda *args, **options: SPLIT_ATTENTION(*args, **options) * 1.001)
    assert ("", "outputs", "") in failed(rf.verify(module, features(8, 16, 9, 8).to(dtype)))


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["timm"])
def test_a_peer_s_active_dropblock(kind):
    DropBlock2d = importlib.import_module("timm.layers").DropBlock2d
    module = peer(kind, drop_layer=lambda: DropBlock2d(0.3, 3))
    assert rf.fuse(module, verify=True)
    report = rf.verify(module, features(8, 16, 9, 8))
    assert_passes(report, 1)
    assert "it draws random numbers" in str(report)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["official", "timm"])
def test_a_peer_s_softmax_replaced_after_fuse(kind):
    """If fused modules ignore the new softmax, verify finds it."""
    module = peer(kind)
    rf.fuse(module)
    module.rsoftmax.register_forward_hook(lambda module, args, out: out * 0.5)
    x = features(8, 16, 9, 8)
    fused_out = module(x)
    twin = copy.deepcopy(module)
    rf.unfuse(twin)
    same = torch.allclose(fused_out, twin(x), atol=1e-4)
    assert rf.verify(module, x).passed == same


@pytest.mark.peers
@pytest.mark.parametrize(
    ("module", "function"),
    [("resnest.torch", "resnest50"), ("timm.models.resnest", "resnest14d")],
)
def test_peers_models(module, function):
    model = getattr(importlib.import_module(module), function)()
    rf.fuse(model)
    with torch.no_grad():
        report = rf.verify(model.eval(), torch.randn(1, 3, 64, 64))
    assert report, report
