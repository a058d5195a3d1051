"""The network over the processes: DDP, or FSDP2, whose shards are whole again in checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from resnest_fused import models
from resnest_fused.training.config import Config, ConfigError
from resnest_fused.training.distributed import World

Tensors = tuple[Tensor, ...] | list[Tensor]


def check(config: Config, world: World) -> None:
    """Find out whether the options fit the number of processes.

    Raises:
        ConfigError: one does not.
    """
    if config.fsdp and world.size == 1:
        raise ConfigError("fsdp: expected several processes, started by torchrun; there is one")
    if config.fsdp and config.channels_last:
        raise ConfigError("channels_last: FSDP2 shards contiguous parameters only; leave one out")
    normed = config.batch * (world.size if config.sync_bn else 1)
    if normed < 2 and config.frozen_stages < 4:
        raise ConfigError("batch: batch normalisation needs 2 samples at a time, got 1")
    if config.sync_bn and world.size > 1 and world.device.type == "cpu":
        raise ConfigError("sync_bn: PyTorch has it for GPUs only; these processes are on the CPU")


def shard(network: models.ResNeSt) -> None:
    """Keep of each parameter a share in each process (FSDP2), gathered for one block at a time."""
    for block in network.blocks():
        fully_shard(block)
    fully_shard(network)


def replicate(network: nn.Module, world: World) -> nn.Module:
    """The network in DDP, if there are several processes."""
    if world.size == 1:
        return network
    device = world.device
    return DistributedDataParallel(network, [device] if device.type == "cuda" else None)


@contextlib.contextmanager
def exchanging(network: nn.Module, exchange: bool) -> Iterator[None]:
    """Whether backward in the block reduces gradients over the processes, or only adds them up."""
    with contextlib.ExitStack() as stack:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(exchange)
        elif isinstance(network, DistributedDataParallel) and not exchange:
            stack.enter_context(network.no_sync())
        yield


@contextlib.contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Have all parameters in each process, so that calls of the network need no other process."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def averaging(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """torch's moving average, for parameters that may be sharded beside buffers that are not."""
    average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def of_shares(averages: Tensors, values: Tensors, count: Tensor | int) -> None:
        average([_local(each) for each in averages], [_local(each) for each in values], count)

    return of_shares


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def whole(state: Any) -> Any:
    """A state with each sharded tensor in one piece, on the CPU; all processes must call this."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state


def shares(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole state what belongs to this process, sharded as the tensors in ``own`` are."""
    return {name: _share(value, own.get(name)) for name, value in state.items()}


def shares_of_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same of an optimizer's state, sharded as its parameters are."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    of_each = {
        number: {name: _share(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": of_each}


def _share(value: Any, own: Any) -> Any:
    if not isinstance(own, DTensor) or not isinstance(value, Tensor):
        return value
    # From what this process read itself, without asking the others.
    return distribute_tensor(
        value.to(own.device), own.device_mesh, own.placements, src_data_rank=None
    )
