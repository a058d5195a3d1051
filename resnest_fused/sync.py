"""Batch statistics over the processes of a process group, as in ``nn.SyncBatchNorm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def all_reduce(tensor: Tensor, process_group: str) -> Tensor:
    """The sum over the process group; its gradient is the sum of all processes' gradients."""
    return _AllReduce.apply(tensor, process_group)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, process_group: str) -> Tensor:
        from torch.distributed import _functional_collectives as collectives

        name: Any = process_group  # newer versions have a type for it
        return collectives.wait_tensor(collectives.all_reduce(tensor, "sum", name))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.process_group = inputs[1]

    @staticmethod
    def backward(ctx: Any, dsum: Tensor) -> Any:
        return all_reduce(dsum, ctx.process_group), None


def combine_statistics(
    mean: Tensor, var: Tensor, count: int, process_group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine each process's mean, biased variance and count over all processes; differentiable.

    A second exchange computes the variance about the common mean. A difference of large sums would
    lose digits.
    """
    counts = mean.new_full((1,), count)
    sums = all_reduce(torch.cat((mean * count, counts)), process_group)
    total = sums[-1]
    common = sums[:-1] / total
    squares = all_reduce((var + (mean - common).square()) * count, process_group)
    return common, squares / total, total
