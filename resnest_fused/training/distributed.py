"""The processes of a run: how they begin, agree, tell of an error once, and end together."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnest_fused.training.config import ConfigError


class World(NamedTuple):
    """This process among all.

    Attributes:
        rank, size: its number, and how many there are.
        device: where it computes.
        grouped: whether torchrun started it.
    """

    rank: int
    size: int
    device: torch.device
    grouped: bool

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes; all of them ask at the same place."""
        if self.size == 1:
            return flag
        # On the CPU, by gloo: it does not wait for what a GPU still computes.
        flags = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the first one; nothing in the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, found)
        return found or []

    def of_first(self, value: Any) -> Any:
        """The first process's value, in all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wait_for_first(self) -> None:
        """Wait until the first process comes here, for a day rather than for the timeout."""
        if self.size > 1:
            # Any: its type also has what a process outside of the group gets, which none is.
            group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
            dist.barrier(group)

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the first one's running statistics, as DDP does before each step."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextlib.contextmanager
def join(device: str, timeout: int) -> Iterator[World]:
    """Be one of the processes that torchrun started, or the only one.

    When the block ends without an error, all wait for each other and then leave the process group.
    After an error they do not: the others may be gone.

    Args:
        device: "cpu", "cuda", or "" for the GPU if there is one. Each process on a machine has the
            GPU with its number there.
        timeout: seconds after which waiting for another process is an error.

    Raises:
        ConfigError: there is no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = device or ("cuda" if gpus else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if kind not in ("cpu", "cuda") or (kind == "cuda" and local >= gpus):
        raise ConfigError(
            f"device: expected cpu, or cuda with a GPU for each process, got {kind!r}"
        )
    place = torch.device(f"cuda:{local}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if "RANK" not in os.environ:
        yield World(0, 1, place, False)
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=timeout),
        device_id=place if kind == "cuda" else None,
    )
    yield World(dist.get_rank(), dist.get_world_size(), place, True)
    # A DDP model that outlives its process group, as in a cycle, can deadlock the group's end.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def tell(message: str) -> None:
    """Print an error, unless another process of this run has printed one already."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store may be gone, and then all may talk
            store = dist.distributed_c10d._get_default_store()
            if store.add("resnest_fused/told", 1) > 1:
                return
    print(f"resnest-fused: {message}", file=sys.stderr, flush=True)
