"""What a training forward keeps for backward, and that checkpointing keeps less still."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable

import pytest
import torch
from test_fuse import features
from test_peers import official, timm
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import resnest_fused as rf
from resnest_fused.measure import memory

# In output sizes, what a module keeps besides whole maps: a few numbers per sample and channel.
CRUMBS = 0.1


def saved_bytes(call: Callable[[], Tensor], living: Iterable[Tensor]) -> int:
    """Bytes that ``call`` keeps for backward, each storage once, without those of ``living``."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in living}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out.requires_grad  # so what was saved lived until here, and no address came twice
    return sum(sizes.values())


def units(module: nn.Module, x: Tensor) -> float:
    """What ``module`` keeps for backward beside its input, in sizes of its output."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    living = [x, *module.parameters(), *module.buffers()]
    return saved_bytes(lambda: module(x), living) / module(x).nbytes


def fused(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    assert not rf.fuse(module).left_alone
    return module


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radix", [1, 2, 4])
def test_one_map_instead_of_two(radix, dtype, memory_format):
    """Fused, only the convolution's output stays, R units; PyTorch keeps the ReLU's, too."""
    plain = rf.SplitAttentionConv2d(16, 32, 3, padding=1, radix=radix)
    plain.to(dtype=dtype, memory_format=memory_format)
    x = features(4, 16, 28, 28).to(dtype=dtype, memory_format=memory_format)
    before, after = units(plain, x), units(fused(plain), x)
    assert before > 2 * radix
    assert after <= radix + CRUMBS


def norm(name: str, make: Callable[[int], nn.Module]) -> Callable[[nn.Module], object]:
    return lambda module: setattr(module, name, make(getattr(module, name).num_features))


CHANGES = {
    "frozen": lambda module: module.eval(),
    "frozen-bn0": lambda module: module.bn0.eval(),
    "frozen-bn1": lambda module: module.bn1.eval(),
    "bn0-not-affine": norm("bn0", lambda count: nn.BatchNorm2d(count, affine=False)),
    "bn0-untracked": norm("bn0", lambda count: nn.BatchNorm2d(count, track_running_stats=False)),
    "bn1-group-norm": norm("bn1", lambda count: nn.GroupNorm(4, count)),
    "bn1-identity": norm("bn1", lambda count: nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_norms(change):
    plain = rf.SplitAttentionConv2d(16, 32, 3, padding=1)
    change(plain)
    x = features(4, 16, 28, 28)
    before, after = units(plain, x), units(fused(plain), x)
    assert before > 4
    assert after <= 2 + CRUMBS


@pytest.mark.parametrize(
    ("norm_layer", "maps"),
    [(None, 1), (lambda count: nn.GroupNorm(4, count), 2)],
    ids=["none", "group-norm"],
)
def test_no_more_than_pytorch(norm_layer, maps):
    """Without bn0 PyTorch keeps one map; with a GroupNorm there it keeps input and output."""
    plain = rf.SplitAttentionConv2d(16, 32, 3, padding=1, norm_layer=norm_layer)
    x = features(4, 16, 28, 28)
    kept = [units(module, x) for module in (plain, fused(plain))]
    assert kept == pytest.approx([2 * maps, 2 * maps], abs=CRUMBS)


def test_attention_alone_keeps_its_input():
    kept = units(rf.FusedSplitAttention(32), features(4, 64, 28, 28))
    assert kept <= CRUMBS


def test_nothing_else_stays_alive():
    """Counts all living tensors, because autograd's hooks might not see every kept one."""
    module, x = rf.FusedSplitAttentionConv2d(16, 32, 3, padding=1), features(4, 16, 28, 28)
    with memory._LiveStorages() as live:
        out = module(x)
        assert 3 * out.nbytes <= live._held <= (3 + CRUMBS) * out.nbytes


def network_saves(model: nn.Module, batch: int, side: int) -> int:
    x, target = torch.randn(batch, 3, side, side), torch.arange(batch)
    return memory.saved_for_backward(model.train(), x, target)


def test_whole_network():
    """An eighth of what a ResNeSt-50 keeps are the maps behind the ReLUs in front of attention."""
    plain = rf.models.create("resnest50", fused=False)
    before, after = (network_saves(model, 2, 128) for model in (plain, fused(plain)))
    assert after <= 0.88 * before


@pytest.mark.peers
def test_official_network():
    """Fused it keeps 12% less, and our own, whose average pooling keeps no input, 15%."""
    plain = importlib.import_module("resnest.torch").resnest50()
    models = (plain, fused(plain), rf.models.create("resnest50"))
    official, after, ours = (network_saves(model, 8, 224) for model in models)
    assert after <= 0.88 * official
    assert ours <= 0.85 * official


@pytest.mark.peers
@pytest.mark.parametrize("make", [official, timm])
@pytest.mark.parametrize("radix", [1, 2, 4])
def test_peers(make, radix):
    plain, x = make(radix), features(4, 16, 32, 32)
    before, after = units(plain, x), units(fused(plain), x)
    assert before > 2 * radix
    assert after <= radix + CRUMBS


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    """torch.utils.checkpoint gives the same results, and keeps the input alone."""
    module, x = rf.FusedSplitAttentionConv2d(16, 32, 3, padding=1), features(4, 16, 28, 28)
    dout = features(4, 32, 28, 28, seed=1)
    inputs = [x.requires_grad_(), *module.parameters()]

    def checkpointed() -> Tensor:
        return checkpoint(module, x, use_reentrant=use_reentrant)

    results = []
    for call in (lambda: module(x), checkpointed):
        out = call()
        for tensor in inputs:
            tensor.grad = None
        out.backward(dout)
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert saved_bytes(checkpointed, [*module.parameters(), *module.buffers()]) == x.nbytes
