"""Recognises what the modules inside a split attention compute, so that the op may replace them.

A child is known by its class and by that class's methods, both as torch or the peer defines them.
Other classes may take a name in ``torch.nn``, and methods may be replaced, before this package is
imported or after. Such children compute something else, so they are called. Replaced functions of
``torch.nn.functional`` are not noticed here, but by :func:`resnest_fused.verify`.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.modules.module as module_globals
from torch import Tensor, nn

# From the modules that define them, since toolkits put classes of their own into torch.nn.
from torch.nn.modules.activation import ReLU
from torch.nn.modules.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
    _BatchNorm,
)
from torch.nn.modules.container import Sequential
from torch.nn.modules.conv import Conv1d, Conv2d, Conv3d
from torch.nn.modules.linear import Identity, Linear

from resnest_fused.reference import BatchNormArgs

# The activation of our own modules, which have no child for it.
RELU = F.relu


def path_of(kind: type) -> str:
    """A class as ``package.module.Class``, by which peers' classes are known."""
    return f"{kind.__module__}.{kind.__qualname__}"


def own_method(kind: type, name: str = "forward") -> Any:
    """The method of ``kind`` if the file of the class defines it, None if it was replaced.

    A wrapper is a replacement too, even if it took the name and module of what it wraps.
    """
    method = getattr(kind, name)
    defining = next(base for base in kind.__mro__ if name in vars(base))
    home = sys.modules.get(defining.__module__)
    if home is None or getattr(method, "__globals__", None) is not vars(home):
        return None
    # Another class of that file may have it, as SiLU's forward may be put into ReLU.
    return method if method.__qualname__.startswith(f"{defining.__qualname__}.") else None


_FORWARDS: dict[type, Any] = {
    kind: own_method(kind) if kind.__module__.startswith("torch.nn.") else None
    for kind in (
        *(Conv1d, Conv2d, Conv3d, Linear),
        *(_BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm),
        *(ReLU, Identity, Sequential),
    )
}
_CONV_FORWARDS: dict[type, Any] = {
    kind: own_method(kind, "_conv_forward") for kind in (Conv1d, Conv2d, Conv3d)
}
_CALL, _CALL_IMPL = own_method(nn.Module, "__call__"), own_method(nn.Module, "_call_impl")


def calls_are_watched() -> bool:
    """Whether every module must be called: for hooks on all modules, or a replaced ``__call__``."""
    if module_globals._has_any_global_hook():
        return True
    if nn.Module.__call__ is _CALL and nn.Module._call_impl is _CALL_IMPL:
        return False
    return not torch.compiler.is_exporting()  # the exporter itself replaces it, to learn names


def intercepted(module: Any) -> str | None:
    """Why the module must be called whatever its class is, or None."""
    state = vars(module)
    if "forward" in state or "_call_impl" in state or "_conv_forward" in state:
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
    """Whether instances of ``kind`` compute the same as those of ``original``, a class of torch."""
    return (
        issubclass(kind, original)
        and kind.forward is _FORWARDS[original]
        and _calls_its_forward(kind)
    )


def _calls_its_forward(kind: Any) -> bool:
    """Whether a call of an instance does what it does for every module."""
    return (kind.__call__ is _CALL and kind._call_impl is _CALL_IMPL) or (
        torch.compiler.is_exporting()
        and kind.__call__ is nn.Module.__call__
        and kind._call_impl is nn.Module._call_impl
    )


def calls_a_norm(conv: Any) -> bool:
    """Whether ``conv`` is a convolution that calls its child ``norm`` behind it."""
    return is_found_at(type(conv), _DETECTRON2) and conv.norm is not None


def computes_as_conv(kind: Any, original: type = Conv2d) -> bool:
    """Whether a class is a convolution of torch or computes the same from its weight and bias."""
    # A parametrized one does too: its weight is computed whenever it is read.
    return computes_as(kind, original) and kind._conv_forward is _CONV_FORWARDS[original]


# Has a forward of its own, which is a convolution unless it has a norm or an activation.
_DETECTRON2 = ("detectron2.layers.wrappers.Conv2d",)


def is_conv(module: Any, original: type = Conv2d) -> bool:
    """Whether a module is a convolution of torch or computes the same from its weight and bias."""
    kind = type(module)
    return computes_as_conv(kind, original) or (
        original is Conv2d
        and is_found_at(kind, _DETECTRON2)
        and module.norm is None
        and module.activation is None
    )


def is_sequence(module: Any) -> bool:
    """Whether the forward of ``module`` calls its children in order, and does nothing else."""
    kind = type(module)
    return kind is Sequential and computes_as(kind, Sequential) and "forward" not in vars(module)


class FoldedNorm(Identity):
    """Takes the place of a norm that was folded into the convolution in front of it.

    It calls the children of a norm that calls its children.

    Attributes:
        originals: the original convolution and norm; they are no part of this module's state.
        place: the parent of the convolution and its name there.
        dtype: the convolution's dtype when it was folded.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, parent: nn.Module, name: str) -> None:
        super().__init__()
        # In tuples, since modules as attributes would become children.
        self.originals = (conv, norm)
        self.place = (parent, name)
        self.dtype = conv.weight.dtype
        for child, module in norm.named_children():
            self.add_module(child, module)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """x, or what the norm's children make of it; an error in training, without statistics."""
        if self.training:
            raise RuntimeError(
                "this module's batch normalisation is folded for inference: "
                "call resnest_fused.unfuse before training"
            )
        for child in self.children():
            x = child(x)
        return x


def is_folded(norm: Any) -> bool:
    """Whether ``norm`` was folded, and does nothing but to call its children if it has any."""
    return (
        type(norm) is FoldedNorm
        and not norm.training  # in training mode it must be called, to raise
        and intercepted(norm) is None
    )


def is_nothing(module: Any) -> bool:
    """Whether ``module`` is None, or returns its input.

    A class whose body has ``idle_in_eval = True`` says that its modules do so in eval mode.
    """
    if type(module) is FoldedNorm:
        return is_folded(module) and not module._modules
    if module is None:
        return True
    kind = type(module)
    idle = vars(kind).get("idle_in_eval", False) and not module.training
    return (idle or computes_as(kind, Identity)) and intercepted(module) is None


def is_relu(module: Any) -> bool:
    """Whether ``module`` computes a ReLU, in place or not."""
    return module is RELU or (computes_as(type(module), ReLU) and intercepted(module) is None)


def is_pointwise(fc: Any, cardinality: int) -> bool:
    """Whether ``fc`` is a 1x1 convolution in ``cardinality`` groups, over any map or none."""
    return (
        _mixes_channels(fc, cardinality)
        and intercepted(fc) is None
        # A parametrized one computes them when they are read, maybe another value each time.
        and (
            type(fc) not in _FORWARDS
            or (is_plain(tensor_of(fc, "weight")) and is_plain(tensor_of(fc, "bias")))
        )
    )


_ONES, _ZEROS = ((1, 1), (1,), (1, 1, 1)), ((0, 0), (0,), (0, 0, 0))


def _mixes_channels(fc: Any, cardinality: int) -> bool:
    if not (is_conv(fc) or is_conv(fc, Conv1d) or is_conv(fc, Conv3d)):
        return cardinality == 1 and computes_as(type(fc), Linear)
    return fc.kernel_size in _ONES and fc.padding in _ZEROS and fc.groups == cardinality


def weight_of(fc: Any) -> Any:
    """The weight of a pointwise ``fc`` as that of a Conv2d."""
    weight = tensor_of(fc, "weight")
    return weight if weight.dim() == 4 else weight.reshape(*weight.shape[:2], 1, 1)


# Their weight and bias are buffers too.
_FROZEN_NORMS = (
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
)


def is_found_at(kind: Any, paths: tuple[str, ...]) -> bool:
    """Whether a class is found at one of these paths, and has the forward that is defined there."""
    return kind.forward is _find_forward(kind, paths) and _calls_its_forward(kind)


# The compiler takes the result as a constant, like that of native.gpu_unavailable.
is_found_at._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _find_forward(kind: type, paths: tuple[str, ...]) -> Any:
    if path_of(kind) not in paths:
        return None
    home = sys.modules.get(kind.__module__)
    return own_method(kind) if getattr(home, kind.__qualname__, None) is kind else None


def is_r_softmax(
    module: Any, kind: Any, forward: Any, groups_name: str, radix: int, cardinality: int
) -> bool:
    """Whether ``module`` is of this class, with this forward, radix and cardinality."""
    return (
        type(module) is kind
        and kind.forward is forward
        and _calls_its_forward(kind)
        and module.radix == radix
        and getattr(module, groups_name) == cardinality
        and intercepted(module) is None
    )


def _norm_kind(kind: Any) -> str | None:
    """The batch normalisation that a class computes: "plain", "sync", "frozen", or None."""
    if computes_as(kind, _BatchNorm):
        return "plain"
    if computes_as(kind, SyncBatchNorm):
        return "sync"
    return "frozen" if is_found_at(kind, _FROZEN_NORMS) else None


def tensor_of(module: nn.Module, name: str) -> Any:
    """``module.name``; in torch's own classes without the cost of ``nn.Module.__getattr__``."""
    if type(module) in _FORWARDS:
        if name in module._parameters:
            return module._parameters[name]
        if name in module._buffers:
            return module._buffers[name]
    return getattr(module, name)  # a subclass may compute it


def is_plain(tensor: Tensor | None) -> bool:
    """Whether no class of the tensor's decides itself what functions of it compute."""
    kind: Any = type(tensor)
    return (
        tensor is None
        or kind is nn.Parameter
        or kind is Tensor
        or getattr(kind, "__torch_function__", None) is torch._C._disabled_torch_function_impl
    )


# Behind their normalisation they call their children drop and act.
_ACTIVATED_NORMS = ("timm.layers.norm_act.BatchNormAct2d",)


def has_child(module: Any, child: Any) -> bool:
    """Whether a module is a child of ``module``; None is no module's."""
    return child is not None and any(each is child for each in module._modules.values())


def batch_norm_args(bn: Any, activated: bool = False) -> BatchNormArgs | None:
    """The batch normalisation that ``bn`` computes in its present mode, or None if it is called.

    With ``activated`` it is that of a norm that calls its children behind it.
    """
    kind = None
    if activated:
        kind = "plain" if is_found_at(type(bn), _ACTIVATED_NORMS) else None
    elif bn is not None:
        kind = _norm_kind(type(bn))
    if kind is None or intercepted(bn) is not None:
        return None
    weight, bias = tensor_of(bn, "weight"), tensor_of(bn, "bias")
    training = bn.training
    # In training mode without tracking, running statistics are neither used nor changed.
    running = kind == "frozen" or not training or bn.track_running_stats
    mean = tensor_of(bn, "running_mean") if running else None
    var = tensor_of(bn, "running_var") if running else None
    if not (is_plain(weight) and is_plain(bias) and is_plain(mean) and is_plain(var)):
        return None
    # PyTorch takes these as tensors too, which an op of ours does not.
    if isinstance(bn.eps, Tensor) or isinstance(getattr(bn, "momentum", None), Tensor):
        return None
    if kind == "frozen":
        return BatchNormArgs(weight, bias, mean, var, eps=bn.eps, batch_stats=False)
    counter = None
    if training and bn.track_running_stats:
        counter = tensor_of(bn, "num_batches_tracked")
        if not is_plain(counter):
            return None
    momentum = 0.0 if bn.momentum is None and counter is None else bn.momentum
    batch_stats = training or mean is None
    group = _process_group(bn) if kind == "sync" and training else None
    return BatchNormArgs(weight, bias, mean, var, momentum, bn.eps, batch_stats, group, counter)


def _process_group(bn: nn.SyncBatchNorm) -> str | None:
    """The name of the group whose processes share ``bn``'s statistics; None for one process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group: Any = bn.process_group or distributed.group.WORLD
    return group.group_name if distributed.get_world_size(group) > 1 else None
