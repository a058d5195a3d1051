"""The fused modules against the reference's: results, BatchNorm's state, copies, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resnest_fused as rf


def _pair(
    norm_layer: Callable[[int], nn.Module] | None = nn.BatchNorm2d, **options: int
) -> tuple[nn.Module, nn.Module]:
    """A reference module and a fused one with the same state, in float64."""
    options = {"radix": 2, "cardinality": 2, "inter_channels": 12, **options}
    eager = rf.SplitAttention(12, norm_layer=norm_layer, **options).double()
    if isinstance(eager.bn1, nn.BatchNorm2d) and eager.bn1.affine:
        nn.init.normal_(eager.bn1.weight)
        nn.init.normal_(eager.bn1.bias)
    fused = rf.FusedSplitAttention(12, norm_layer=norm_layer, **options).double()
    fused.load_state_dict(eager.state_dict())
    return eager, fused


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _assert_same_state(fused: nn.Module, eager: nn.Module) -> None:
    ours, expected = fused.state_dict(), eager.state_dict()
    assert list(ours) == list(expected)
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


def _assert_same_step(fused: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """out and every gradient; the state is compared after it."""
    results = []
    for module in (fused, eager):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        (out * torch.linspace(-1, 1, out.numel()).double().view_as(out)).sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    _assert_same_state(fused, eager)


NORM_LAYERS = {
    "default": nn.BatchNorm2d,
    "none": None,
    "momentum 0.3": lambda n: nn.BatchNorm2d(n, momentum=0.3),
    "cumulative average": lambda n: nn.BatchNorm2d(n, momentum=None),
    "momentum 0": lambda n: nn.BatchNorm2d(n, momentum=0.0),
    "eps 0.1": lambda n: nn.BatchNorm2d(n, eps=0.1),
    "not affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "not tracking": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
}


@pytest.mark.parametrize("norm_layer", NORM_LAYERS.values(), ids=NORM_LAYERS)
def test_training_and_eval_follow_the_reference(norm_layer: Callable[[int], nn.Module]) -> None:
    eager, fused = _pair(norm_layer)
    for training in (True, True, False, True, False):
        eager.train(training)
        fused.train(training)
        _assert_same_step(fused, eager, _randn(4, 24, 5, 3) + _randn(4, 24, 1, 1))


@pytest.mark.parametrize("module_trains", [True, False])
def test_bn1_s_own_mode_decides(module_trains: bool) -> None:
    """A frozen bn1 in a training module, and the reverse."""
    eager, fused = _pair()
    for module in (eager, fused):
        module.train(module_trains)
        module.bn1.train(not module_trains)
    before = fused.bn1.running_mean.clone()
    _assert_same_step(fused, eager, _randn(4, 24, 5, 3))
    assert torch.equal(fused.bn1.running_mean, before) == module_trains
    assert fused.bn1.num_batches_tracked == (0 if module_trains else 1)


def test_frozen_affine_parameters() -> None:
    eager, fused = _pair()
    for module in (eager, fused):
        module.bn1.requires_grad_(False)
        module.train()
        module(_randn(4, 24, 3, 3)).sum().backward()
        assert module.bn1.weight.grad is None
        assert module.fc1.weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_tracking_switched_off_later(training: bool) -> None:
    eager, fused = _pair()
    for module in (eager, fused):
        module.train(training)
        module.bn1.track_running_stats = False
    _assert_same_step(fused, eager, _randn(4, 24, 3, 3))
    assert fused.bn1.num_batches_tracked == 0


def test_without_a_count_of_batches() -> None:
    """As in checkpoints from before PyTorch counted them."""
    eager, fused = _pair(lambda n: nn.BatchNorm2d(n, momentum=None))
    for module in (eager, fused):
        module.bn1.num_batches_tracked = None
    _assert_same_step(fused, eager, _randn(4, 24, 3, 3))


def test_an_empty_batch_leaves_the_statistics() -> None:
    eager, fused = _pair()
    for module in (eager, fused):
        assert module(_randn(0, 24, 3, 3)).shape == (0, 12, 3, 3)
    _assert_same_state(fused, eager)


def test_identity_is_no_norm() -> None:
    eager, fused = _pair(lambda n: nn.Identity())
    _assert_same_step(fused, eager, _randn(4, 24, 3, 3))


def test_gradient_mode_makes_no_difference_to_the_statistics() -> None:
    _, fused = _pair()
    other = copy.deepcopy(fused)
    x = _randn(4, 24, 3, 3)
    with torch.no_grad():
        fused(x)
    other(x)
    _assert_same_state(fused, other)


def test_a_call_that_fails_changes_nothing() -> None:
    _, fused = _pair()
    before = copy.deepcopy(fused.state_dict())
    for bad in (_randn(1, 24, 3, 3), _randn(4, 23, 3, 3), _randn(4, 24, 0, 3)):
        with pytest.raises(ValueError):
            fused(bad)
    for name, value in fused.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("radix", [1, 2, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_conv_module(memory_format: torch.memory_format, radix: int, training: bool) -> None:
    options = {"stride": 2, "padding": 1, "cardinality": 2, "radix": radix}
    kind = {"dtype": torch.float64, "memory_format": memory_format}
    eager = rf.SplitAttentionConv2d(16, 8, 3, **options).to(**kind)
    fused = rf.FusedSplitAttentionConv2d(16, 8, 3, **options).to(**kind)
    fused.load_state_dict(eager.state_dict())
    eager.train(training)
    fused.train(training)
    for _ in range(2):
        x = _randn(4, 16, 9, 7).contiguous(memory_format=memory_format)
        _assert_same_step(fused, eager, x)
    assert fused(x).is_contiguous(memory_format=memory_format)


def test_state_dict_goes_both_ways() -> None:
    for eager_class, fused_class, sizes in (
        (rf.SplitAttention, rf.FusedSplitAttention, (12,)),
        (rf.SplitAttentionConv2d, rf.FusedSplitAttentionConv2d, (4, 12, 3)),
    ):
        eager, fused = eager_class(*sizes), fused_class(*sizes)
        assert list(eager.state_dict()) == list(fused.state_dict())
        fused.load_state_dict(eager.state_dict())
        _assert_same_state(fused, eager)
        other = eager_class(*sizes)
        other.load_state_dict(fused_class(*sizes).state_dict())
        fused.load_state_dict(other.state_dict())
        _assert_same_state(fused, other)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way: str) -> None:
    _, fused = _pair()
    x = _randn(4, 24, 3, 3)
    fused(x).sum().backward()
    fused.eval()
    if way == "deepcopy":
        twin = copy.deepcopy(fused)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(fused)
    assert not twin.training
    assert torch.equal(twin(x), fused(x))
    with torch.no_grad():
        twin.fc1.weight.add_(1)
    assert not torch.equal(twin(x), fused(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_whole_module_in_another_dtype(dtype: torch.dtype) -> None:
    _, fused = _pair()
    fused.to(dtype)
    exact = copy.deepcopy(fused).double()
    x = _randn(4, 24, 5, 5).to(dtype)
    out = fused(x)
    assert out.dtype == fused.bn1.running_mean.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    """conv gives bfloat16 under autocast; parameters and their gradients stay float32."""
    options = {"padding": 1, "cardinality": 2, "radix": 2}
    eager = rf.SplitAttentionConv2d(16, 8, 3, **options).train(training)
    fused = rf.FusedSplitAttentionConv2d(16, 8, 3, **options)
    fused.load_state_dict(eager.state_dict())
    fused.train(training)
    exact = copy.deepcopy(eager)
    x = torch.randn(6, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, eager_out = fused(x), eager(x)
    assert out.dtype == eager_out.dtype == torch.bfloat16
    expected = exact(x)
    for result in (out, eager_out, expected):
        result.float().square().mean().backward()
    for (name, ours), theirs, truth in zip(
        fused.named_parameters(), eager.parameters(), exact.parameters(), strict=True
    ):
        assert ours.grad.dtype == torch.float32
        error = (ours.grad - truth.grad).abs().max()
        eager_error = (theirs.grad - truth.grad).abs().max()
        assert error <= 2 * eager_error + 1e-5, name


def test_functional_call() -> None:
    _, fused = _pair()
    fused.eval()
    x = _randn(2, 24, 3, 3)
    other = {name: torch.randn_like(p) for name, p in fused.named_parameters()}
    out = torch.func.functional_call(fused, other, (x,))
    twin = copy.deepcopy(fused)
    twin.load_state_dict(fused.state_dict() | other)
    assert torch.equal(out, twin(x))
    assert not torch.equal(out, fused(x))


def test_on_meta() -> None:
    with torch.device("meta"):
        fused = rf.FusedSplitAttentionConv2d(4, 8, 3)
        out = fused(torch.empty(2, 4, 7, 7))
    assert out.device.type == "meta"
    assert out.shape == (2, 8, 5, 5)


def test_describes_itself() -> None:
    assert "channels=12, radix=3, cardinality=2" in repr(
        rf.FusedSplitAttention(12, radix=3, cardinality=2)
    )


@pytest.mark.parametrize("norm_layer", [nn.InstanceNorm2d, lambda n: nn.GroupNorm(1, n)])
def test_other_norms_are_refused_by_name(norm_layer: Callable[[int], nn.Module]) -> None:
    name = type(norm_layer(4)).__name__
    for make in (
        lambda: rf.FusedSplitAttention(8, norm_layer=norm_layer),
        lambda: rf.FusedSplitAttentionConv2d(4, 8, 3, norm_layer=norm_layer),
    ):
        with pytest.raises(TypeError, match=f"norm_layer: expected BatchNorm2d .*, got {name}"):
            make()
    fused = rf.FusedSplitAttention(8)
    fused.bn1 = norm_layer(32)
    with pytest.raises(TypeError, match=f"got {name}"):
        fused(torch.randn(2, 16, 3, 3))


def test_sync_batch_norm_is_refused() -> None:
    """It is no BatchNorm2d: its statistics span processes."""
    fused = rf.FusedSplitAttention(8)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    with pytest.raises(TypeError, match="got SyncBatchNorm"):
        fused(torch.randn(2, 16, 3, 3))
