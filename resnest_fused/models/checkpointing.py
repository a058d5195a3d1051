"""Gradient checkpointing of a block, whose second forward leaves the block's buffers alone."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_saving_memory(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, which keeps only x for backward and computes the rest again there.

    ``torch.utils.checkpoint`` runs the block's forward twice, and batch normalisation would take
    the batch into its running statistics twice. So the second forward writes to copies of the
    buffers.

    Example::

        out = run_saving_memory(block, x)
    """
    if torch.compiler.is_compiling():  # the compiler computes results again, and no mutations
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _copied_buffers(block)),
    )


@contextlib.contextmanager
def _copied_buffers(block: nn.Module) -> Iterator[None]:
    """Puts copies in the places of all buffers, and the buffers back at the end."""
    kept = [(module, dict(module._buffers)) for module in block.modules()]
    for module, buffers in kept:
        module._buffers.update({k: b.clone() for k, b in buffers.items() if b is not None})
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
