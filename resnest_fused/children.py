"""What the modules inside a split attention compute, and so which of them the op may stand in for.

A child is known by its class and by that class's methods, both as torch or the peer defines them: a
class that took another's name in ``torch.nn``, and a method that was replaced, before this package
was imported or after, compute something else, and the child is called. What is not seen, but by
:func:`resnest_fused.verify`: functions of ``torch.nn.functional`` that were replaced.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.modules.module as module_globals
from torch import Tensor, nn

# From the modules that define them, as toolkits put classes of their own into torch.nn.
from torch.nn.modules.activation import ReLU
from torch.nn.modules.batchnorm import BatchNorm2d, SyncBatchNorm
from torch.nn.modules.container import Sequential
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.linear import Identity

from resnest_fused.reference import BatchNormArgs

# The activation of our own modules, which they have no child for.
RELU = F.relu


def own_method(kind: type, name: str = "forward") -> Any:
    """The method of ``kind`` if the module that defines the class defines it too, None if replaced.

    A wrapper that took the name and module of what it wraps is a replacement too.
    """
    method = getattr(kind, name)
    defining = next(base for base in kind.__mro__ if name in vars(base))
    home = sys.modules.get(defining.__module__)
    if home is None or getattr(method, "__globals__", None) is not vars(home):
        return None
    return method


_FORWARDS: dict[type, Any] = {
    kind: own_method(kind) if kind.__module__.startswith("torch.nn.") else None
    for kind in (Conv2d, BatchNorm2d, SyncBatchNorm, ReLU, Identity, Sequential)
}
_CONV_FORWARD = own_method(Conv2d, "_conv_forward")
_CALL, _CALL_IMPL = own_method(nn.Module, "__call__"), own_method(nn.Module, "_call_impl")


def calls_are_watched() -> bool:
    """Whether every module must be called: for hooks on all modules, or a replaced ``__call__``."""
    if module_globals._has_any_global_hook():
        return True
    if nn.Module.__call__ is _CALL and nn.Module._call_impl is _CALL_IMPL:
        return False
    return not torch.compiler.is_exporting()  # which replaces it to follow the modules' names


def intercepted(module: Any) -> str | None:
    """What of the module itself would be lost if it were not called, or None."""
    state = vars(module)
    if "forward" in state:
        return "its forward was replaced"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "it has hooks"
    return None


def computes_as(kind: Any, original: type) -> bool:
    """Whether instances of ``kind`` compute what those of a class of torch's do."""
    return issubclass(kind, original) and kind.forward is _FORWARDS[original]


def computes_as_conv(kind: Any) -> bool:
    """Whether a class is ``nn.Conv2d`` or computes the same from its weight and bias."""
    # A parametrized one does: reading its weight computes it, and that is all a call would do.
    return computes_as(kind, Conv2d) and kind._conv_forward is _CONV_FORWARD


def is_sequence(module: Any) -> bool:
    """Whether the forward of ``module`` calls its children in order, and does nothing else."""
    kind = type(module)
    return kind is Sequential and computes_as(kind, Sequential) and "forward" not in vars(module)


class FoldedNorm(Identity):
    """In a norm's place when it has been folded into the convolution in front of it.

    Attributes:
        originals: the convolution and the norm, as they were; no part of this module's state.
        place: the parent of the convolution and its name there.
        dtype: of the convolution when it was folded.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, parent: nn.Module, name: str) -> None:
        super().__init__()
        # In tuples, as modules that were attributes would become children.
        self.originals = (conv, norm)
        self.place = (parent, name)
        self.dtype = conv.weight.dtype
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """x; in training mode an error, as there are no statistics to follow."""
        if self.training:
            raise RuntimeError(
                "this module's batch normalisation is folded for inference: "
                "call resnest_fused.unfuse before training"
            )
        return x


def is_nothing(module: Any) -> bool:
    """Whether ``module`` is none, or gives what it gets."""
    if type(module) is FoldedNorm:
        return not module.training  # where it is called, and raises
    return module is None or (computes_as(type(module), Identity) and intercepted(module) is None)


def is_relu(module: Any) -> bool:
    """Whether ``module`` computes a ReLU, in place or not."""
    return module is RELU or (computes_as(type(module), ReLU) and intercepted(module) is None)


def is_pointwise(fc: Any, cardinality: int) -> bool:
    """Whether ``fc`` is a 1x1 convolution in as many groups."""
    return (
        computes_as_conv(type(fc))
        and fc.kernel_size == (1, 1)
        and fc.padding == (0, 0)
        and fc.groups == cardinality
        and intercepted(fc) is None
    )


# Those whose weight and bias are buffers too.
_FROZEN_NORMS = (
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
)
_R_SOFTMAXES = (
    "resnest.torch.splat.rSoftMax",
    "resnest.torch.models.splat.rSoftMax",
    "timm.layers.split_attn.RadixSoftmax",
)


def _is_found_at(kind: Any, paths: tuple[str, ...]) -> bool:
    """Whether a class is the one found at one of these paths, with the forward defined there."""
    return kind.forward is _find_forward(kind, paths)


# A constant for the compiler, as native.gpu_unavailable is.
_is_found_at._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _find_forward(kind: type, paths: tuple[str, ...]) -> Any:
    if f"{kind.__module__}.{kind.__qualname__}" not in paths:
        return None
    home = sys.modules.get(kind.__module__)
    return own_method(kind) if getattr(home, kind.__qualname__, None) is kind else None


def is_r_softmax(module: Any, radix: int, cardinality: int) -> bool:
    """Whether ``module`` is a peer's r-softmax over as many splits and groups."""
    return (
        _is_found_at(type(module), _R_SOFTMAXES)
        and module.radix == radix
        and module.cardinality == cardinality
        and intercepted(module) is None
    )


def _norm_kind(kind: Any) -> str | None:
    """Which batch normalisation a class computes: "plain", "sync", "frozen", or None for none."""
    if computes_as(kind, BatchNorm2d):
        return "plain"
    if computes_as(kind, SyncBatchNorm):
        return "sync"
    return "frozen" if _is_found_at(kind, _FROZEN_NORMS) else None


def tensor_of(module: nn.Module, name: str) -> Any:
    """``module.name`` without the cost of ``nn.Module.__getattr__`` where it is a parameter."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def counts_batches(bn: Any) -> bool:
    """Whether a call of ``bn`` in its present mode adds to ``num_batches_tracked``."""
    return bn.training and bn.track_running_stats and bn.num_batches_tracked is not None


def batch_norm_args(bn: Any) -> BatchNormArgs | None:
    """The batch normalisation that ``bn`` computes in its present mode, or None to call it."""
    kind = None if bn is None else _norm_kind(type(bn))
    if kind is None or intercepted(bn) is not None:
        return None
    buffers = bn._buffers
    if kind == "frozen":
        statistics = buffers["running_mean"], buffers["running_var"]
        return BatchNormArgs(bn.weight, bn.bias, *statistics, eps=bn.eps, batch_stats=False)
    training = bn.training
    # Without tracking, running statistics neither take part nor change while training.
    running = not training or bn.track_running_stats
    mean = buffers["running_mean"] if running else None
    if bn.momentum is not None:
        momentum = bn.momentum
    elif counts_batches(bn):
        momentum = 1.0 / (float(bn.num_batches_tracked) + 1.0)  # a cumulative average
    else:
        momentum = 0.0
    return BatchNormArgs(
        tensor_of(bn, "weight"),
        tensor_of(bn, "bias"),
        mean,
        buffers["running_var"] if running else None,
        momentum,
        bn.eps,
        training or mean is None,
        _process_group(bn) if kind == "sync" and training else None,
    )


def _process_group(bn: nn.SyncBatchNorm) -> str | None:
    """The name of the group whose processes share ``bn``'s statistics; None for this one alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group: Any = bn.process_group or distributed.group.WORLD
    return group.group_name if distributed.get_world_size(group) > 1 else None
