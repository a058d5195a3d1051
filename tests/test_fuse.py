"""fuse and unfuse on this package's own modules: results, identity, reports, what is left alone."""

from __future__ import annotations

import copy
import io
import itertools
from collections import Counter
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from resnest_fused import (
    FusedSplitAttention,
    FusedSplitAttentionConv2d,
    FuseEntry,
    SplitAttention,
    SplitAttentionConv2d,
    fuse,
    unfuse,
)
from resnest_fused.models import load_checkpoint, resnest50


def generator_with(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value of its own, with attention far from uniform."""
    generator = generator_with(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, std=0.3, generator=generator)
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean, std=0.3, generator=generator)
                nn.init.uniform_(module.running_var, 0.5, 2.0, generator=generator)
    return model


def step(model: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    """The output, every gradient and every buffer after one forward and backward."""
    model.train(training).zero_grad()
    x = x.detach().to(next(model.parameters()).dtype).requires_grad_()
    out = model(x)
    generator = generator_with(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(dout.to(out.dtype))
    results = {"out": out.detach(), "x": x.grad}
    results |= {name: p.grad for name, p in model.named_parameters()}
    results |= {name: b.clone() for name, b in model.named_buffers()}
    return results


def features(*shape: int, seed: int = 0) -> Tensor:
    """A random feature map whose samples differ in their means, as bn1 divides by their spread."""
    generator = generator_with(seed)
    x = torch.randn(shape, generator=generator)
    return x + torch.randn(*shape[:2], 1, 1, generator=generator)


def square_errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> Counter[str]:
    """Mean squares of the errors relative to the truth's: out, x's gradient, and the rest."""
    errors = Counter()
    for name, truth in exact.items():
        # In front of bn1 the gradient of fc1's bias is zero, and found as rounding noise.
        if truth.is_floating_point() and truth.abs().max() > 1e-12:
            error = (results[name] - truth).square().mean() / truth.square().mean()
            errors[name if name in ("out", "x") else "rest"] += error.item()
    return errors


def assert_as_exact(model: nn.Module, plain: nn.Module, inputs: list[Tensor]) -> None:
    """``model`` gives in float64 what ``plain`` does, and in its own dtype the same dtypes and out.

    There gradients are not compared. Rounding may flip a ReLU, in either of them.
    """
    exact, double = copy.deepcopy(plain).double(), copy.deepcopy(model).double()
    for training, x in itertools.product((False, True), inputs):
        expected, truth = step(plain, x, training), step(exact, x, training)
        for each, dtypes_of in ((double, truth), (model, expected)):
            found = step(each, x, training)
            assert found.keys() == truth.keys()
            for name, tensor in found.items():
                assert tensor.dtype == dtypes_of[name].dtype, name
                assert tensor.is_floating_point() or torch.equal(tensor, truth[name]), name
            errors = square_errors(found, truth)
            if each is double:
                assert max(errors.values()) ** 0.5 <= 1e-9, (errors, training)
            else:
                limit = 1e4 * torch.finfo(found["out"].dtype).eps
                assert errors["out"] ** 0.5 <= limit, (errors, training)


def assert_fuses(model: nn.Module, inputs: list[Tensor]) -> None:
    """Fusing ``model`` changes no result, in eval and in train, and unfusing leaves no trace."""
    plain = copy.deepcopy(model)
    before = [(id(module), type(module), sorted(vars(module))) for module in model.modules()]
    state = [(key, value.data_ptr()) for key, value in model.state_dict().items()]
    parameters = [id(parameter) for parameter in model.parameters()]

    report = fuse(model)
    assert report.fused and not report.left_alone, report
    assert_as_exact(model, plain, inputs)
    assert [(key, value.data_ptr()) for key, value in model.state_dict().items()] == state
    assert [id(parameter) for parameter in model.parameters()] == parameters

    unfuse(model)
    after = [(id(module), type(module), sorted(vars(module))) for module in model.modules()]
    assert after == before
    model.load_state_dict(plain.state_dict())
    for training in (False, True):
        found, expected = (step(each, inputs[0], training) for each in (model, plain))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def reason_left_alone(module: nn.Module) -> str:
    """Fuse one module that must stay as it is; the reason that the report gives."""
    kind = type(module)
    report = fuse(module)
    assert type(module) is kind and not report.fused
    (entry,) = report.left_alone
    assert entry.reason is not None and entry.reason in str(report)
    return entry.reason


class Net(nn.Module):
    """Both modules, one of them at two depths of the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SplitAttentionConv2d(4, 8, 3, padding=1)
        self.body = nn.Sequential(SplitAttentionConv2d(8, 16, 1), SplitAttention(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


OURS = (SplitAttention, SplitAttentionConv2d)
UNFUSED = [SplitAttentionConv2d, SplitAttentionConv2d, SplitAttention]
FUSED = [FusedSplitAttentionConv2d, FusedSplitAttentionConv2d, FusedSplitAttention]


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, OURS)]


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, None], ids=["bn", "no-norm"])
@pytest.mark.parametrize("cardinality", [1, 2])
@pytest.mark.parametrize("radix", [1, 2, 4])
def test_results_stay(radix, cardinality, norm_layer):
    options = {"radix": radix, "cardinality": cardinality, "norm_layer": norm_layer}
    inputs = [features(8, 16 * radix, 7, 6, seed=seed) for seed in range(4)]
    assert_fuses(randomise(SplitAttention(16, **options)), inputs)
    conv = SplitAttentionConv2d(16 * radix, 16, 3, padding=1, **options)
    assert_fuses(randomise(conv), inputs)
    assert_fuses(conv.to(memory_format=torch.channels_last), inputs)


def test_a_model_stays_itself():
    assert_fuses(randomise(Net()), [features(8, 4, 6, 6, seed=seed) for seed in range(4)])


def test_frozen_bn1_of_a_training_module_stays_frozen():
    model = randomise(SplitAttention(16))
    plain, x = copy.deepcopy(model), torch.randn(4, 32, 5, 5)
    fuse(model)
    for each in (model, plain):
        each.train().bn1.eval()
    torch.testing.assert_close(model(x), plain(x))
    assert torch.equal(model.bn1.running_mean, plain.bn1.running_mean)


def test_report():
    model = Net()
    report = fuse(model)
    assert [(entry.name, entry.fused, entry.reason) for entry in report.entries] == [
        ("stem", True, None),
        ("body.0", True, None),
        ("body.1", True, None),
    ]
    assert report.entries[2].kind == "resnest_fused.reference.SplitAttention"
    assert len(report) == 3 and report
    assert repr(report) == "FuseReport(3 fused, 0 left alone)"
    assert str(report).splitlines() == [
        "3 fused, 0 left alone",
        "fused: 2 resnest_fused.reference.SplitAttentionConv2d (stem, body.0)",
        "fused: 1 resnest_fused.reference.SplitAttention (body.1)",
    ]
    assert all(isinstance(entry, FuseEntry) for entry in report.entries)
    with pytest.raises(AttributeError):
        report.entries = ()


def test_a_report_names_the_first_and_the_last_of_many():
    model = nn.Sequential(*(SplitAttention(4) for _ in range(12)))
    for module in model[5:10]:
        patch_forward(module)
    report = fuse(model)
    assert str(report).splitlines()[1:] == [
        "fused: 7 resnest_fused.reference.SplitAttention (0, ..., 11)",
        "left alone: 5 resnest_fused.reference.SplitAttention (5, 6, 7, 8, 9): "
        "its forward was replaced",
    ]
    assert "\n" not in repr(report) and len(repr(report)) < 100


def test_root_module():
    model = SplitAttention(8)
    assert "(the model itself)" in str(fuse(model))
    assert type(model) is FusedSplitAttention
    unfuse(model)
    assert type(model) is SplitAttention


def test_nothing_to_fuse():
    report = fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    assert not report and report.entries == ()
    assert str(report).startswith("no split-attention module found")


def test_fusing_twice_is_harmless():
    model = Net()
    fuse(model)
    report = fuse(model)
    assert kinds(model) == FUSED
    assert [entry.reason for entry in report.entries] == ["already fused"] * 3
    assert len(report) == 3 and not report.left_alone
    unfuse(model)
    unfuse(model)
    assert kinds(model) == UNFUSED


def test_modules_built_fused_stay_so():
    model = nn.Sequential(FusedSplitAttention(8), SplitAttention(4))
    report = fuse(model, backend="reference")
    assert [entry.reason for entry in report.entries] == ["already fused, as built", None]
    assert [module.backend for module in model] == ["auto", "reference"]
    unfuse(model)
    assert [type(module) for module in model] == [FusedSplitAttention, SplitAttention]


def test_shared_module_is_handled_once():
    shared = SplitAttention(8)
    report = fuse(nn.ModuleList([shared, nn.Sequential(shared)]))
    assert [entry.name for entry in report.entries] == ["0"]
    assert type(shared) is FusedSplitAttention


def test_backend():
    model = Net()
    fuse(model, backend="reference")
    assert {model.stem.backend, model.body[1].backend} == {"reference"}
    fuse(model)
    assert {model.stem.backend, model.body[1].backend} == {"auto"}
    unfuse(model)
    assert not hasattr(model.stem, "backend")


def test_wrong_arguments_change_nothing():
    model = Net()
    with pytest.raises(ValueError, match="backend: expected one of"):
        fuse(model, backend="fastest")
    assert kinds(model) == UNFUSED
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got OrderedDict"):
            function(model.state_dict())


def test_deepcopy_and_pickle():
    model = randomise(Net()).eval()
    x = torch.randn(2, 4, 6, 6)
    fuse(model, backend="reference")
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    expected = model(x)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert kinds(twin) == FUSED and twin.stem.backend == "reference"
        assert torch.equal(twin(x), expected)
        unfuse(twin)
        assert kinds(twin) == UNFUSED
    assert kinds(model) == FUSED


def test_hooks_on_the_module_still_run():
    model = SplitAttention(8)
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append("before"))
    model.register_forward_hook(lambda *_: ran.append("after"))
    model.register_full_backward_hook(lambda *_: ran.append("backward"))
    fuse(model)
    model(torch.randn(2, 16, 3, 3, requires_grad=True)).sum().backward()
    assert ran == ["before", "after", "backward"]


def test_any_conv_and_norm_in_front():
    model = SplitAttentionConv2d(2, 8, 3)
    model.bn0 = nn.GroupNorm(4, 16)
    model.conv = nn.Sequential(nn.Conv2d(2, 16, 1), nn.Tanh())
    assert_fuses(randomise(model), [features(8, 2, 5, 5, seed=seed) for seed in range(4)])


@pytest.mark.parametrize("name", ["conv", "bn0", "fc1", "bn1", "fc2"])
def test_hooks_on_children_still_run(name):
    model = randomise(SplitAttentionConv2d(2, 8, 3))
    ran = []
    child = model.get_submodule(name)
    child.register_forward_pre_hook(lambda *_: ran.append("before"))
    child.register_forward_hook(lambda *_: ran.append("after"))
    child.register_full_backward_hook(lambda *_: ran.append("backward"))
    fuse(model)
    model(torch.randn(3, 2, 5, 5, requires_grad=True)).sum().backward()
    assert ran == ["before", "after", "backward"]


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_fcs(parametrize):
    model = randomise(SplitAttention(16, cardinality=2))
    parametrize(model.fc1)
    parametrize(model.fc2)
    assert_fuses(model, [features(8, 32, 5, 5, seed=seed) for seed in range(4)])


def first_split(x: Tensor, *_: object, radix: int, **__: object) -> Tensor:
    return x[:, : x.shape[1] // radix]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_wrapped_models(wrap, monkeypatch):
    options = {"backend": "eager"} if wrap is torch.compile else {}
    model, x = randomise(Net()).eval(), torch.randn(2, 4, 6, 6)
    wrapper = wrap(model, **options)
    expected = wrapper(x)
    assert len(fuse(wrapper)) == 3 and kinds(model) == FUSED
    torch.testing.assert_close(wrapper(x), expected)
    with monkeypatch.context() as patch:
        patch.setattr("resnest_fused.modules.split_attention", first_split)
        assert not torch.allclose(wrapper(x), expected)  # so the fused forwards do run
    unfuse(wrapper)
    assert kinds(model) == UNFUSED
    assert torch.equal(wrapper(x), expected)


def set_child(name: str, child: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, name, child())


def patch_forward(module: nn.Module) -> None:
    module.forward = module.forward


class Doubling(nn.Conv2d):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class PerSample(nn.BatchNorm2d):
    """Looks like a batch normalisation, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


# Children that the op cannot replace, so they are called.
CHILDREN = {
    "wrapped-fc": ("fc1", lambda: nn.Sequential(nn.Conv2d(8, 32, 1))),
    "own-forward-fc": ("fc2", lambda: Doubling(32, 16, 1)),
    "3x3-fc": ("fc1", lambda: nn.Conv2d(8, 32, 3, padding=1)),
    "grouped-fc": ("fc2", lambda: nn.Conv2d(32, 16, 1, groups=2)),
    "group-norm": ("bn1", lambda: nn.GroupNorm(4, 32)),
    "sync-bn": ("bn1", lambda: nn.SyncBatchNorm(32)),
    "own-forward-norm": ("bn1", lambda: PerSample(32)),
    "norm-and-activation": ("bn1", lambda: nn.Sequential(nn.BatchNorm2d(32), nn.SiLU())),
}


@pytest.mark.parametrize(("name", "child"), CHILDREN.values(), ids=CHILDREN)
@pytest.mark.parametrize(
    "make", [lambda: SplitAttention(8), lambda: SplitAttentionConv2d(16, 8, 1)]
)
def test_any_children(make, name, child):
    module = make()
    setattr(module, name, child())
    assert_fuses(randomise(module), [features(8, 16, 5, 5, seed=seed) for seed in range(4)])


def test_a_replaced_forward_is_left_alone():
    model = SplitAttention(8)
    patch_forward(model)
    assert reason_left_alone(model) == "its forward was replaced"


def test_a_replaced_forward_of_a_child_is_called():
    model = SplitAttention(8).eval()
    expected = model(x := torch.randn(2, 16, 5, 5))
    model.fc2.forward = lambda hidden: hidden.new_zeros(2, 16, 1, 1)
    fuse(model)
    out = model(x)
    torch.testing.assert_close(out, (x[:, :8] + x[:, 8:]) / 2)
    assert not torch.allclose(out, expected)


def test_class_forward_replaced(monkeypatch):
    monkeypatch.setattr(SplitAttention, "forward", lambda self, x: x)
    assert reason_left_alone(SplitAttention(8)) == "its forward was replaced"


def test_subclass_is_left_alone():
    class Doubled(SplitAttention):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    reason = reason_left_alone(Doubled(8))
    assert reason.startswith("fused it would compute something else, in eval: outputs")


@pytest.mark.parametrize("name", ["SplAtConv2d", "SplitAttn", "Split_Attention", "MySplatBlock"])
def test_unknown_class_that_looks_like_split_attention(name):
    module = type(name, (nn.Module,), {})()
    assert reason_left_alone(module).startswith("its parts were not found under the names")


def test_one_module_left_alone_does_not_keep_others():
    model = Net()
    patch_forward(model.body[0])
    report = fuse(model)
    assert [entry.fused for entry in report.entries] == [True, False, True]
    assert str(report).splitlines()[0] == "2 fused, 1 left alone"
    assert str(report).splitlines()[-1] == (
        "left alone: 1 resnest_fused.reference.SplitAttentionConv2d (body.0): "
        "its forward was replaced"
    )


# --- folding


def assert_folds(model: nn.Module, x: Tensor, norms: int) -> None:
    """Folding leaves the numbers, and unfusing brings everything back."""
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {name: (module, type(module)) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(x)
        report = fuse(model, fold=True)
        found = model(x)
        assert report.folded_norms == norms
        tolerance = 100 * torch.finfo(x.dtype).eps
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        unfuse(model)
        assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    after = {name: (module, type(module)) for name, module in model.named_modules()}
    assert after == modules
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cardinality", [1, 2])
@pytest.mark.parametrize("radix", [1, 2, 4])
def test_folding(radix, cardinality, bias):
    options = {"radix": radix, "cardinality": cardinality, "bias": bias, "padding": 1}
    model = randomise(SplitAttentionConv2d(8, 16, 3, **options)).double()
    assert_folds(model, torch.randn(2, 8, 6, 5).double(), norms=2)
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 5).double().contiguous(memory_format=torch.channels_last)
    assert_folds(model, x, norms=2)


def test_folding_a_network():
    model = randomise(resnest50(num_classes=5, fused=False)).double()
    assert_folds(model, torch.randn(2, 3, 40, 40).double(), norms=71)


def test_folding_in_float32():
    model = randomise(Net())
    assert_folds(model, torch.randn(2, 4, 6, 6), norms=5)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, copy.deepcopy])
def test_a_folded_model_is_neither_saved_nor_loaded(wrap, tmp_path):
    model = randomise(Net()).eval()
    state = copy.deepcopy(model.state_dict())
    torch.save(state, path := tmp_path / "checkpoint.pth")
    fuse(model, fold=True)
    before = [parameter.clone() for parameter in model.parameters()]
    model = wrap(model)
    message = r"stem\.conv is folded: unfuse first, with resnest_fused\.unfuse\(model\)"
    for attempt in (
        lambda: model.state_dict(),
        lambda: model.load_state_dict(state),
        lambda: model.load_state_dict({}, strict=False),
        lambda: load_checkpoint(model, path),
    ):
        with pytest.raises(RuntimeError, match=message):
            attempt()
    assert all(map(torch.equal, model.parameters(), before))
    assert len(model.state_dict(keep_vars=True)) == 16  # as exporters read it
    unfuse(model)
    model.load_state_dict(model.state_dict())


def test_folding_survives_copies():
    model = randomise(Net()).eval()
    fuse(model, fold=True)
    x = torch.randn(2, 4, 6, 6)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        unfuse(twin)
        assert kinds(twin) == UNFUSED
        assert isinstance(twin.stem.bn0, nn.BatchNorm2d)


def test_folded_modules_refuse_to_train():
    for model in (SplitAttentionConv2d(4, 16, 1), SplitAttention(2)):
        fuse(model.eval(), fold=True)
        with pytest.raises(RuntimeError, match="folded for inference"):
            model.train()(torch.randn(2, 4, 6, 6))
        unfuse(model)
        model(torch.randn(2, 4, 6, 6)).sum().backward()


def test_folding_a_training_model_changes_nothing():
    model = Net()
    with pytest.raises(ValueError, match="fold: expected a model in eval mode"):
        fuse(model, fold=True)
    assert kinds(model) == UNFUSED


def test_unfolding_follows_the_model_s_dtype():
    model = randomise(SplitAttentionConv2d(4, 8, 3)).eval()
    fuse(model, fold=True)
    model.double()
    unfuse(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_what_cannot_be_folded_is_said():
    model = randomise(SplitAttentionConv2d(4, 8, 3))
    model.bn0 = nn.GroupNorm(2, 16)
    model.eval().fc1.register_forward_hook(lambda *_: None)
    report = fuse(model, fold=True)
    (entry,) = report.entries
    assert entry.fused and not entry.folded and report.folded_norms == 0
    assert entry.reason == (
        "bn0 not folded: expected a batch normalisation, got GroupNorm; "
        "bn1 not folded: fc1: it has hooks"
    )
    model.bn0 = nn.BatchNorm2d(16, track_running_stats=False)
    (entry,) = fuse(model.eval(), fold=True).entries
    assert "bn0 not folded: it normalises with the batch's statistics" in entry.reason


def test_folding_later_and_twice():
    model = randomise(Net()).eval()
    fuse(model)
    for _ in range(2):
        report = fuse(model, fold=True)
        assert report.folded_norms == 5
        assert [entry.folded for entry in report.entries] == [True] * 3
    assert "fused and folded: 2 resnest_fused.reference.SplitAttentionConv2d (stem" in str(report)
    assert str(report).startswith("3 fused, 0 left alone; 5 batch normalisations folded")


def test_unfolding_keeps_each_layer_s_dtype():
    model = randomise(SplitAttentionConv2d(4, 8, 3)).bfloat16().eval()
    model.bn0.float()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model, fold=True)
    unfuse(model)
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    assert model.bn0.running_var.dtype == torch.float32


def test_unfolding_after_the_stem_got_a_hook():
    model = resnest50(num_classes=5, fused=False).eval()
    fuse(model, fold=True)
    model.conv1.register_forward_hook(lambda *_: None)
    unfuse(model)
    assert isinstance(model.bn1, nn.BatchNorm2d) and fuse(model).folded_norms == 0


def test_folding_leaves_what_is_no_chain():
    norm = randomise(nn.Sequential(nn.BatchNorm2d(4))).eval()[0]
    replaced = nn.Sequential(nn.Conv2d(4, 4, 1), norm).eval()
    patch_forward(replaced)
    mismatched = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(5)).eval()
    for model in (replaced, mismatched):
        assert fuse(model, fold=True).folded_norms == 0


@pytest.mark.parametrize("where", ["object", "class"])
@pytest.mark.parametrize("kind", ["Bottleneck", "ResNeSt"])
def test_folding_leaves_blocks_whose_forward_was_replaced(kind, where, monkeypatch):
    """Such a forward may put something between a convolution and the norm after it."""
    model = randomise(resnest50(num_classes=5, fused=False)).double()
    changed = [module for module in model.modules() if type(module).__name__ == kind]
    original = type(changed[0]).forward

    def forward(self, x):
        norm, self.bn1 = self.bn1, nn.Sequential(nn.Tanh(), self.bn1)
        try:
            return original(self, x)
        finally:
            self.bn1 = norm

    if where == "class":
        monkeypatch.setattr(type(changed[0]), "forward", forward)
    else:
        for module in changed:
            module.forward = MethodType(forward, module)
    assert_folds(model, torch.randn(2, 3, 40, 40).double(), norms=71 - NORMS_OF[kind])


# Norms behind convolutions in the forward of all blocks, and of the network.
NORMS_OF = {"Bottleneck": 32, "ResNeSt": 1}


def test_folding_leaves_a_stem_that_is_shared():
    stem = nn.Sequential(nn.Identity(), nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False))
    model = nn.Sequential(SplitAttentionConv2d(8, 8, 3), SplitAttentionConv2d(8, 8, 3))
    model[0].conv = model[1].conv = stem
    assert_folds(randomise(model).double(), torch.randn(2, 8, 6, 5).double(), norms=2)
    reasons = {entry.reason for entry in fuse(model, fold=True).entries}
    assert reasons == {"bn0 not folded: 1: its Sequential is used elsewhere too"}


class FrozenBatchNorm2d(nn.Module):
    """Like DETR's: it has the name, and no eps as an attribute."""

    def __init__(self, features: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def test_a_frozen_norm_without_eps_is_called():
    model = SplitAttentionConv2d(4, 8, 3, norm_layer=FrozenBatchNorm2d)
    assert_fuses(model, [features(8, 4, 5, 5, seed=seed) for seed in range(4)])
