"""Swaps the split-attention modules of a model for fused ones, in place, and back.

A module is fused by giving it another class. Its forward runs the convolution and then the fused
op for all that follows. Children, parameters, hooks and state_dict stay the same. A peer's fused
class derives from the peer's own, so ``isinstance`` holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from resnest_fused.backends import check_name
from resnest_fused.children import own_method, path_of
from resnest_fused.fusing import folding, proof, registry
from resnest_fused.fusing.report import FuseEntry, FuseReport
from resnest_fused.fusing.wrapping import core, with_core


def fuse(
    model: nn.Module, *, backend: str = "auto", fold: bool = False, verify: bool = False
) -> FuseReport:
    """Fuse every split-attention module of ``model`` that can be fused, in place.

    ::

        model = timm.create_model("resnest50d", pretrained=True)
        print(rf.fuse(model))

    Known are our own ``SplitAttention`` and ``SplitAttentionConv2d``, ``SplAtConv2d`` of the
    official ``resnest`` package and ``SplitAttn`` of timm. The model itself may be one of them.
    Results, parameters, state_dict, hooks and ``isinstance`` stay the same. deepcopy and pickle
    work. A module whose result would change is left alone, and the report says why.

    Everything after the convolution becomes one op if ``bn0`` is a batch normalisation and the
    activations are ReLU. Other norms, activations and softmaxes and an active DropBlock are called
    as before, and the op does the rest. The same holds for children that are hooked or patched,
    now or later. While hooks for all modules are registered, every child is called. What is
    replaced elsewhere is not noticed, such as a function of ``torch.nn.functional``, by name or by
    a ``TorchFunctionMode``, how a module looks an attribute up, or a method other than a forward.

    Two things differ in a fused module. The output keeps the feature map's memory format, while
    peers force NCHW. It keeps its dtype too, while peers give float32 under CUDA's autocast.
    ``torch.jit.script`` needs :func:`unfuse` first, and so does a pickle that is to be loaded
    without this package.

    Args:
        model: any module, wrapped by ``torch.compile`` or ``DataParallel`` or not.
        backend: "auto", "native", "triton" or "reference", as in
            :func:`resnest_fused.split_attention`. It applies to every module that this function
            fuses now or fused before. Modules that were built fused keep their own.
        fold: fold batch normalisations into the convolutions in front of them. This is for
            inference with a model in eval mode. It takes ``bn0`` and ``bn1`` of each fused module,
            and the norms behind convolutions in ResNeSt's blocks and stem, unless their forward was
            replaced, and in every ``nn.Sequential``.
            Folded weights have no gradients. A call in training mode raises, and so do
            ``state_dict()`` and ``load_state_dict()``: :func:`unfuse` first, which restores the
            original layers.
        verify: try every module first, as it is and fused, in float64 on synthetic inputs. This
            takes some time and memory. A module that would compute something else is left alone,
            and the report says by how much it differs. The trial comes before folding.
            :func:`resnest_fused.verify` checks fused modules with their folded norms on real
            inputs. It does not check the norms that are folded elsewhere in the network.

    Returns:
        The report, one entry for each module; a module used in several places is reported once.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such backend, or ``fold`` is asked of a module in training mode.
            The model is then untouched.
    """
    check_name(backend, "backend")
    found = [(module, _examine(name, module)) for name, module in _named_modules(model)]
    if verify:
        found = [(module, _tried(module, entry, backend)) for module, entry in found]
    if fold and any(module.training for module in model.modules()):
        raise ValueError("fold: expected a model in eval mode throughout; call model.eval() first")
    shared = folding.shared_modules(model)
    entries = []
    for module, entry in found:
        if entry is None:
            continue
        if entry.fused and entry.reason is None:
            original = core(type(module))
            module.__class__ = with_core(type(module), registry.fused_class(original))
            vars(module)["_unfused_class"] = original
        if _is_swapped(module):
            vars(module)["backend"] = backend
        if entry.fused:
            notes = folding.fold_attention(module, shared) if fold else []
            reason = "; ".join([*([entry.reason] if entry.reason else []), *notes]) or None
            entry = entry._replace(reason=reason, folded=folding.count_folded(module) > 0)
        entries.append(entry)
    if fold:
        folding.fold_network(model)
    return FuseReport(tuple(entries), folding.count_folded(model))


def _tried(module: nn.Module, entry: FuseEntry | None, backend: str) -> FuseEntry | None:
    """The entry after a trial, which leaves a module alone if its results would change."""
    if entry is None or not entry.fused or entry.reason is not None:
        return entry
    problem = proof.difference(module, registry.fused_class(core(type(module))), backend)
    return entry._replace(fused=problem is None, reason=problem)


def unfuse(model: nn.Module) -> None:
    """Give every module that :func:`fuse` fused its own class back, in place, and unfold its norms.

    ::

        rf.fuse(model, fold=True)
        rf.unfuse(model)  # as it was before
        torch.save(model.state_dict(), "checkpoint.pth")

    Modules built as ``FusedSplitAttention`` or ``FusedSplitAttentionConv2d`` stay fused. The layers
    that folding replaced come back unchanged, on the model's device and in its dtype.

    Raises:
        TypeError: ``model`` is not a module.
    """
    for _, module in list(_named_modules(model)):
        if _is_swapped(module):
            module.__class__ = with_core(type(module), vars(module).pop("_unfused_class"))
            vars(module).pop("backend", None)
    folding.unfold(model)


def unfused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a fused module replaces; None for a module that is not fused."""
    if _is_swapped(module):
        return vars(module)["_unfused_class"]
    return type(module).__bases__[-1] if _is_fused_class(type(module)) else None


def _is_swapped(module: nn.Module) -> bool:
    return "_unfused_class" in vars(module)


def _is_fused_class(cls: type) -> bool:
    # Each of them keeps its own; a subclass, which may compute something else, does not.
    return "_unfused_forward" in vars(cls)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model.named_modules()


def _examine(name: str, module: nn.Module) -> FuseEntry | None:
    """The entry for one module before it is changed; None if it is no split attention."""
    if _is_swapped(module):
        return FuseEntry(name, path_of(vars(module)["_unfused_class"]), True, "already fused")
    cls = core(type(module))
    if _is_fused_class(cls):
        return FuseEntry(name, path_of(cls), True, "already fused, as built")
    known = next((path_of(base) for base in cls.__mro__ if path_of(base) in registry.KNOWN), None)
    if known == path_of(cls):
        replaced = "forward" in vars(module) or own_method(cls) is None
        reason = "its forward was replaced" if replaced else None
    elif known is not None:
        reason = f"a subclass of {known}, which may compute something else"
    elif re.search("splat|split_?att", cls.__name__, re.IGNORECASE):
        reason = "unknown class"
    else:
        return None
    return FuseEntry(name, path_of(cls), reason is None, reason)
