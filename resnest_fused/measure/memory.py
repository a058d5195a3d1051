"""Measures the memory of a call: its peak, and what a forward pass keeps for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnest_fused.measure.networks import loss


def peak_memory(call: Callable[[], object], device: torch.device | None = None) -> int:
    """Bytes that live at once at most in ``call``; what lived before does not count.

    On a CPU these are the tensors that eager PyTorch operators return. The scratch memory that an
    operator takes and frees does not count. On a GPU these are all bytes of the caching allocator,
    with scratch memory. A first call on a GPU also makes what libraries keep, so make one before.

    Example::

        x = torch.ones(1000)
        peak_memory(lambda: (x + 1) * 2)  # 8000: two results of 4000 bytes

    Args:
        call: what to measure.
        device: where it runs; None for the CPU.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as live:
        call()
    return live.peak


def saved_for_backward(model: nn.Module, x: Tensor, target: Tensor) -> int:
    """Bytes that a training step's forward pass keeps for the backward pass, each storage once.

    Parameters, buffers and the input do not count, because they live anyway.

    Example::

        model = resnest_fused.models.create("resnest50")
        saved_for_backward(model, torch.randn(4, 3, 224, 224), torch.tensor([1, 2, 3, 4]))
    """
    living = [x, *model.parameters(), *model.buffers()]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in living}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, x, target)
    return sum(sizes.values())


class _LiveStorages(TorchDispatchMode):
    """Follows the storages that operators return, from there to their release."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A storage that first appears as an argument was there before.
        for storage in self._new_storages((args, kwargs)):
            self._know(storage, 0)
        result = func(*args, **kwargs)
        for storage in self._new_storages(result):
            self._know(storage, storage.nbytes())
        self.peak = max(self.peak, self._held)
        return result

    def _new_storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    yield storage

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        self._known.add(storage._cdata)
        self._held += size
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._held -= size
