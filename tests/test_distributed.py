"""Batch statistics that span processes, DDP and FSDP: two processes against one with all samples.

The file launches itself under torchrun, once for all tests. As a script it runs the named ones of
``CHECKS`` on each rank and writes their outcomes to files.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
import subprocess
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_fuse import features, randomise, square_errors
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import resnest_fused as rf
from resnest_fused import FusedSplitAttentionConv2d, sync
from resnest_fused.backends import choose

WORLD = 2
SIZES = (4, 2)
Results = dict[str, Tensor]
CHECKS: dict[str, Callable[[], None]] = {}


def check(variants: dict[str, dict[str, Any]] | None = None) -> Callable[..., Any]:
    """Make a function a check, or one check for each of the named sets of arguments."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for name, arguments in (variants or {"": {}}).items():
            full = f"{function.__name__}-{name}".removesuffix("-")
            CHECKS[full] = functools.partial(function, **arguments)
        return function

    return add


# --- results of one process and of two


def step(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, dout: Tensor) -> Results:
    """out, every gradient and every buffer after a forward and a backward."""
    x = x.detach().requires_grad_()
    out = run(x)
    parameters = dict(module.named_parameters())
    dx, *grads = torch.autograd.grad(out, [x, *parameters.values()], dout)
    return collect(module, out, dx, grads)


def second_step(
    run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, dout: Tensor
) -> Results:
    """The gradient by x, the gradients of its square, and every buffer."""
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(run(x), x, dout, create_graph=True)
    ddx, *grads = torch.autograd.grad(dx.square().sum(), [x, *module.parameters()])
    return collect(module, dx, ddx, grads)


def collect(module: nn.Module, out: Tensor, dx: Tensor, grads: list[Tensor]) -> Results:
    names = (name for name, _ in module.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return {"out": out.detach(), "x": dx, **dict(zip(names, grads, strict=True)), **buffers}


def gather(tensor: Tensor) -> list[Tensor]:
    found: list[Any] = [None] * WORLD
    dist.all_gather_object(found, tensor)
    return found


def own(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """This rank's samples of a whole batch."""
    return tensor.split(sizes)[dist.get_rank()].clone()


def of_all_ranks(results: Results, module: nn.Module) -> Results:
    """The ranks' results as those for the whole batch; buffers stay each rank's own."""
    parameters = {name for name, _ in module.named_parameters()}
    whole = dict(results)
    for name, tensor in results.items():
        if name in ("out", "x"):
            whole[name] = torch.cat(gather(tensor))
        elif name in parameters:
            whole[name] = torch.stack(gather(tensor)).sum(dim=0)
    return whole


def assert_equal(found: Results, expected: Results) -> None:
    """In float64: to 1e-10 of the largest element."""
    assert found.keys() == expected.keys()
    for name, truth in expected.items():
        # bn1 removes the gradient of fc1's bias; the weight's gradient gives the scale.
        scale = expected[name.replace("fc1.bias", "fc1.weight")].abs().max()
        assert found[name].shape == truth.shape, name
        assert (found[name] - truth).abs().max() <= 1e-10 * scale, name


class LocalBatchNorm(nn.BatchNorm2d):
    """Computes in one process what an unsynchronised norm computes in several."""

    sizes: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        normed = []
        for rank, samples in enumerate(x.split(self.sizes)):
            mine = rank == dist.get_rank()
            running = (self.running_mean, self.running_var) if mine else (None, None)
            affine = self.weight, self.bias
            normed.append(F.batch_norm(samples, *running, *affine, True, self.momentum, self.eps))
        return torch.cat(normed)


def make_local(module: nn.Module, name: str, sizes: tuple[int, ...]) -> None:
    norm = module.get_submodule(name)
    norm.__class__ = LocalBatchNorm
    norm.sizes = sizes


def plain_module(norm: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """From 8 to 16 channels; ``norm`` is BatchNorm2d's options."""
    options = {"cardinality": 2, "inter_channels": 12, "padding": 1, **options}
    module = rf.SplitAttentionConv2d(
        8, 16, 3, norm_layer=lambda n: nn.BatchNorm2d(n, **(norm or {})), **options
    )
    return module if norm else randomise(module)


def synchronised(module: nn.Module, names: tuple[str, ...] = ("bn0", "bn1")) -> nn.Module:
    """A fused copy whose norms of these names span the processes."""
    module = copy.deepcopy(module)
    for name in names:
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(module.get_submodule(name))
        setattr(module, name, norm)
    assert rf.fuse(module)
    return module


def draw(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and dout of the whole batch, in float64."""
    return (
        features(sum(sizes), 8, 9, 7, seed=seed).double(),
        features(sum(sizes), 16, 9, 7, seed=100 + seed).double(),
    )


# --- the checks: each runs on every rank


@check(
    {
        "nchw": {},
        "channels_last": {"memory_format": torch.channels_last},
        "radix-1": {"radix": 1},
        "radix-4-cardinality-1": {"radix": 4, "cardinality": 1},
        "one-sample-on-one": {"sizes": (5, 1)},
        "one-sample-on-each": {"sizes": (1, 1)},
        "no-sample-on-the-first": {"sizes": (0, 6)},
        "no-sample-on-the-second": {"sizes": (6, 0)},
        "cumulative-average": {"norm": {"momentum": None}},
        "not-affine": {"norm": {"affine": False}},
        "not-tracking": {"norm": {"track_running_stats": False}},
        "reference": {"backend": "reference"},
        "compiled": {"compiled": True, "memory_format": torch.channels_last},
        "second-derivatives": {"take": second_step},
        "second-derivatives-channels_last": {
            "take": second_step,
            "memory_format": torch.channels_last,
        },
    }
)
def both_norms(
    sizes: tuple[int, ...] = SIZES,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str = "auto",
    compiled: bool = False,
    take: Callable[..., Results] = step,
    **options: Any,
) -> None:
    plain = plain_module(**options).to(torch.float64, memory_format=memory_format)
    fused = synchronised(plain)
    fused.backend = backend
    run = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    for seed in range(2):
        x, dout = (t.contiguous(memory_format=memory_format) for t in draw(sizes, seed))
        found = take(run, fused, own(x, sizes), own(dout, sizes))
        if found["out"].shape[0] > 1:
            assert found["out"].is_contiguous(memory_format=memory_format)
        assert_equal(of_all_ranks(found, fused), take(plain, plain, x, dout))


@check(
    {
        "nchw": {},
        "channels_last": {"memory_format": torch.channels_last},
        "cardinality-1": {"cardinality": 1},
        "autocast": {"autocast": True},
    }
)
def rounding(
    memory_format: torch.memory_format = torch.contiguous_format,
    autocast: bool = False,
    **options: Any,
) -> None:
    """In float32 two processes err by at most twice plain PyTorch's error in one, and an ulp."""
    plain = plain_module(**options).to(memory_format=memory_format)
    exact = copy.deepcopy(plain).double()
    fused = synchronised(plain)
    narrow = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    ours: Counter[str] = Counter()
    usual: Counter[str] = Counter()
    for seed in range(4):
        x, dout = (t.contiguous(memory_format=memory_format) for t in draw(seed=seed))
        truth = step(exact, exact, x, dout)
        x, dout = x.float(), dout.to(torch.bfloat16 if autocast else torch.float32)
        with narrow:
            found = step(fused, fused, own(x, SIZES), own(dout, SIZES))
            expected = step(plain, plain, x, dout)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
        ours += square_errors(of_all_ranks(found, fused), truth)
        usual += square_errors(expected, truth)
    for kind, error in ours.items():
        assert error**0.5 <= 2 * usual[kind] ** 0.5 + torch.finfo(dout.dtype).eps, kind


@check(
    {
        "bn0": {"name": "bn0", "other": "bn1"},
        "bn1": {"name": "bn1", "other": "bn0"},
        "bn0-compiled": {"name": "bn0", "other": "bn1", "compiled": True},
    }
)
def only_one_norm(name: str, other: str, compiled: bool = False) -> None:
    plain = plain_module().double()
    fused = synchronised(plain, (name,))
    make_local(plain, other, SIZES)
    run = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    x, dout = draw()
    found = step(run, fused, own(x, SIZES), own(dout, SIZES))
    assert_equal(of_all_ranks(found, fused), step(plain, plain, x, dout))


@check()
def without_bn0() -> None:
    plain = randomise(rf.SplitAttention(8, cardinality=2, inter_channels=12)).double()
    fused = synchronised(plain, ("bn1",))
    x, dout = draw()
    x, dout = dout, dout[:, :8].contiguous()
    found = step(fused, fused, own(x, SIZES), own(dout, SIZES))
    assert_equal(of_all_ranks(found, fused), step(plain, plain, x, dout))


@check()
def bn0_in_front_of_any_norm() -> None:
    plain = plain_module()
    plain.bn1 = nn.GroupNorm(3, 12)
    plain.double()
    fused = synchronised(plain, ("bn0",))
    x, dout = draw()
    found = step(fused, fused, own(x, SIZES), own(dout, SIZES))
    assert_equal(of_all_ranks(found, fused), step(plain, plain, x, dout))


@check()
def modules_built_fused() -> None:
    plain = plain_module().double()
    fused = rf.FusedSplitAttentionConv2d(
        8, 16, 3, padding=1, cardinality=2, inter_channels=12, norm_layer=nn.SyncBatchNorm
    ).double()
    fused.load_state_dict(plain.state_dict())
    x, dout = draw()
    found = step(fused, fused, own(x, SIZES), own(dout, SIZES))
    assert_equal(of_all_ranks(found, fused), step(plain, plain, x, dout))


@check({"of-both": {"members": [[0, 1]]}, "of-one-each": {"members": [[0], [1]]}})
def process_group(members: list[list[int]]) -> None:
    """Statistics span the norm's own process group, not all processes."""
    process_groups = [dist.new_group(ranks) for ranks in members]
    process_group = process_groups[dist.get_rank() % len(process_groups)]
    plain = plain_module().double()
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), process_group)
    assert rf.fuse(fused)
    if len(members) > 1:
        for name in ("bn0", "bn1"):
            make_local(plain, name, SIZES)
    x, dout = draw()
    found = step(fused, fused, own(x, SIZES), own(dout, SIZES))
    assert_equal(of_all_ranks(found, fused), step(plain, plain, x, dout))


@check()
def eval_needs_no_other_process() -> None:
    plain = plain_module().double().eval()
    fused = synchronised(plain)
    if dist.get_rank() == 0:  # the other takes no part
        x, dout = draw()
        assert_equal(step(fused, fused, x, dout), step(plain, plain, x, dout))


def net(norm1: nn.Module | None = None) -> nn.Module:
    module = plain_module()
    if norm1 is not None:
        module.bn1 = norm1
    head = randomise(nn.Linear(16, 3))
    return nn.Sequential(module, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()


def train(model: nn.Module, images: Tensor, targets: Tensor) -> Results:
    """The gradients of three steps of SGD, and the state after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    results: Results = {}
    for step in range(3):
        optimizer.zero_grad()
        (model(images) - targets).square().mean().backward()
        for name, parameter in model.named_parameters():
            results[f"{step}.{name}"] = parameter.grad
        optimizer.step()
    results |= model.state_dict()
    return {
        name.replace("module.", ""): tensor.full_tensor().detach()
        if hasattr(tensor, "full_tensor")
        else tensor.detach().clone()
        for name, tensor in results.items()
    }


def assert_trains_alike(model: nn.Module, plain: nn.Module) -> None:
    """``model``, which averages gradients over ranks, trains like ``plain`` on the whole batch."""
    sizes = (3, 3)
    images, _ = draw(sizes)
    targets = torch.randn(6, 3, dtype=torch.float64)
    found = train(model, own(images, sizes), own(targets, sizes))
    for name, tensor in found.items():
        first, *others = gather(tensor)
        assert all(torch.equal(first, other) for other in others), f"{name} differs between ranks"
    assert_equal(found, train(plain, images, targets))


@check()
def distributed_data_parallel() -> None:
    plain = net()
    model = DistributedDataParallel(copy.deepcopy(plain))
    # Afterwards: on CPUs DDP refuses SyncBatchNorm, whose own forward does not run there.
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert rf.fuse(model)
    assert_trains_alike(model, plain)


@check(
    {
        "parent": {"shard": ()},
        "module": {"shard": ("0",)},
        "submodules": {"shard": ("0.fc1", "0.bn1"), "norm1": nn.GroupNorm(3, 12)},
    }
)
def fully_sharded(shard: tuple[str, ...], norm1: nn.Module | None = None) -> None:
    """The parameters that a call sees are whole while a module that owns them runs."""
    plain = net(norm1)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert rf.fuse(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in shard:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert_trains_alike(model, plain)


@check(
    {
        "parent": {"shard": ()},
        "module": {"shard": ("0",)},
        "child": {"shard": ("0.fc1",), "norm1": nn.GroupNorm(3, 12)},
    }
)
def fully_sharded_before_fuse(shard: tuple[str, ...], norm1: nn.Module | None = None) -> None:
    plain = net(norm1)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in shard:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = [type(module) for module in model.modules()]
    report = rf.fuse(model)
    assert len(report) == 1 and not report.left_alone, report
    assert report.entries[0].kind == "resnest_fused.reference.SplitAttentionConv2d"
    assert isinstance(model[0], FusedSplitAttentionConv2d)
    assert isinstance(model[0], FSDPModule) == ("0" in shard)
    assert_trains_alike(model, plain)
    rf.unfuse(model)
    assert [type(module) for module in model.modules()] == before


@check()
def unfused_after_fully_shard() -> None:
    model = net().eval()
    x = draw((3, 3))[0]
    expected = model(x)
    rf.fuse(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    fused = type(model[0])
    for _ in range(2):
        assert issubclass(type(model[0]), FusedSplitAttentionConv2d)
        torch.testing.assert_close(model(x), expected)
        rf.unfuse(model)
        assert type(model[0]).__name__ == "FSDPSplitAttentionConv2d"
        assert isinstance(model[0], FSDPModule) and isinstance(model, FSDPModule)
        assert not isinstance(model[0], FusedSplitAttentionConv2d)
        torch.testing.assert_close(model(x), expected)
        model[0].reshard()
        assert len(rf.fuse(model)) == 1
        assert type(model[0]) is fused


# --- the same in pytest


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """For every rank the outcome of each check that pytest chose: nothing, or a traceback."""
    folder = tmp_path_factory.mktemp("ranks")
    chosen = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_two_processes_are_as_one
    ]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    subprocess.run([sys.executable, *launch, __file__, folder, *chosen], timeout=280)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_are_as_one(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        told = outcome.get(name, f"not run; the last was\n{list(outcome.items())[-1:]}")
        assert not told, f"rank {rank}: {told}"


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_process_needs_no_exchange(world_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the same op as without SyncBatchNorm."""
    monkeypatch.delattr(sync, "all_reduce")
    plain = plain_module().double()
    fused, synced = synchronised(plain, ()), synchronised(plain)
    x, dout = draw()
    found, expected = (step(module, module, x, dout) for module in (synced, fused))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def run_checks(folder: Path, names: list[str]) -> None:
    """Run checks on this rank; each has the same seed on all ranks."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    assert choose("auto", torch.empty(1)) == "native"
    outcome: dict[str, str] = {}
    for name in names:
        torch.manual_seed(zlib.crc32(name.encode()))
        torch.compiler.reset()
        failure: Exception | None = None
        try:
            CHECKS[name]()
        except Exception as error:
            failure = error
        outcome[name] = "" if failure is None else "".join(traceback.format_exception(failure))
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcome))
        if failure is not None and not isinstance(failure, AssertionError):
            raise failure  # the ranks may no longer be in step
    dist.destroy_process_group()


if __name__ == "__main__":
    run_checks(Path(sys.argv[1]), sys.argv[2:])
