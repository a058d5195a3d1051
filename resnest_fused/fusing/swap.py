"""Swaps the split-attention modules of a model for fused ones, in place, and back.

A module is fused by giving it another class. Its forward runs the convolution and then the fused
op for all that follows. Children, parameters, hooks and state_dict stay the same. A peer's fused
class derives from the peer's own, so ``isinstance`` holds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from torch import nn

from resnest_fused.backends import check_name
from resnest_fused.children import own_method, path_of
from resnest_fused.fusing import folding, proof, recognition
from resnest_fused.fusing.peers import fused_class
from resnest_fused.fusing.report import FuseEntry, FuseReport
from resnest_fused.fusing.wrapping import core, with_core
from resnest_fused.layout import Layout, read
from resnest_fused.modules import FusedModule


def fuse(
    model: nn.Module, *, backend: str = "auto", fold: bool = False, verify: bool = False
) -> FuseReport:
    """Fuse every split-attention module of ``model`` that can be fused, in place.

    ::

        model = timm.create_model("resnest50d", pretrained=True)
        print(rf.fuse(model))

    A split attention is known by what it computes, not by where its class is. Our own classes,
    ``SplAtConv2d`` of the official ``resnest`` package and ``SplitAttn`` of timm are trusted. Any
    other class is fused if its parts have known names (such as ``fc1``, ``fc2``, ``radix``), or
    those given to :func:`resnest_fused.register`, and if a proof succeeds: a copy of the module, as
    it is and fused, runs in float64 with random parameters and statistics, in eval and training.
    Outputs, all gradients and buffers must agree. That takes some 0.1 seconds for each class and
    configuration. If it fails, the module is left alone, and the report says how much it differs.

    Squeeze-and-excitation with a ReLU and a sigmoid is split attention of radix 1, and selective
    kernels are split attention whose splits are paths. In a block where a batch normalisation and a
    ReLU lead to the squeeze-and-excitation, the op takes these too, and the block is the module
    that is proven and fused.

    The model itself may be a split attention. Results, parameters, state_dict, hooks and
    ``isinstance`` stay the same. deepcopy and pickle work.

    Everything after the convolution becomes one op if ``bn0`` is a batch normalisation and the
    activations are ReLU. Other norms, activations and softmaxes and an active DropBlock are called
    as before, and the op does the rest. The same holds for children that are hooked or patched,
    now or later. While hooks for all modules are registered, every child is called. What is
    replaced elsewhere is not noticed, such as a function of ``torch.nn.functional``, by name or by
    a ``TorchFunctionMode``, how a module looks an attribute up, or a method other than a forward.
    A proven module runs unfused from when one of its attributes is set to another value.

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
        verify: prove the trusted classes too, and every module by itself. The proof comes before
            folding. :func:`resnest_fused.verify` checks fused modules with their folded norms on
            real inputs. It does not check the norms that are folded elsewhere in the network.

    Returns:
        The report, one entry for each module; a module used in several places is reported once.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such backend, or ``fold`` is asked of a module in training mode.
            The model is then untouched.
    """
    check_name(backend, "backend")
    found = list(_examined(model, backend, verify))
    if fold and any(module.training for module in model.modules()):
        raise ValueError("fold: expected a model in eval mode throughout; call model.eval() first")
    shared = folding.shared_modules(model)
    entries = []
    for module, entry, fused in found:
        if fused is not None:
            original = core(type(module))
            module.__class__ = with_core(type(module), fused)
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


def unfuse(model: nn.Module) -> None:
    """Give every module that :func:`fuse` fused its own class back, in place, and unfold its norms.

    ::

        rf.fuse(model, fold=True)
        rf.unfuse(model)  # as it was before
        torch.save(model.state_dict(), "checkpoint.pth")

    Modules built as ``FusedSplitAttention`` or ``FusedSplitAttentionConv2d`` stay fused; those of
    the networks in ``resnest_fused.models`` do not. The layers that folding replaced come back
    unchanged, on the model's device and in its dtype.

    Raises:
        TypeError: ``model`` is not a module.
    """
    for _, module in list(_named_modules(model)):
        if _is_swapped(module):
            module.__class__ = with_core(type(module), vars(module).pop("_unfused_class"))
            for added in ("backend", "_changed_attribute"):
                vars(module).pop(added, None)
    folding.unfold(model)


def unfused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a fused module replaces; None for a module that is not fused."""
    if _is_swapped(module):
        return vars(module)["_unfused_class"]
    return type(module).__bases__[-1] if _is_fused_class(type(module)) else None


def layout_of(module: nn.Module) -> Layout | None:
    """Where a fused module has its parts; None for a module that is not fused."""
    return getattr(type(module), "_layout", None)


def _is_swapped(module: nn.Module) -> bool:
    return "_unfused_class" in vars(module)


def _is_fused_class(cls: type) -> bool:
    # Each of them keeps its own; a subclass, which may compute something else, does not.
    return "_unfused_forward" in vars(cls)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        hint = "; OpenMMLab's eval() and train() return None" if model is None else ""
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}{hint}")
    return model.named_modules()


# A module, what is reported of it, and the class that it gets, if any.
_Examined = tuple[nn.Module, FuseEntry, type[FusedModule] | None]


def _examined(model: nn.Module, backend: str, verify: bool) -> Iterator[_Examined]:
    """Every split attention of the model, before anything is changed."""
    # The parts of a module that becomes one op, which may look like a split attention themselves.
    parts: set[nn.Module] = set()
    disproved: proof.Disproved = {}
    for name, module in _named_modules(model):
        if module in parts:
            continue
        examined = _examine(name, module, backend, verify, disproved)
        if examined is None:
            continue
        entry, fused = examined
        yield module, entry, fused
        layout = layout_of(module) if fused is None else fused._layout
        if layout is not None:
            parts.update(read(module, other.path) for other in layout.others)


def _examine(
    name: str, module: nn.Module, backend: str, verify: bool, disproved: proof.Disproved
) -> tuple[FuseEntry, type[FusedModule] | None] | None:
    """The entry of one module, and the class that it gets; None if it is no split attention."""
    if _is_swapped(module):
        path = path_of(vars(module)["_unfused_class"])
        changed = getattr(module, "_changed_attribute", None)
        note = f", but {changed} was set, so it runs unfused: unfuse it before" if changed else ""
        return FuseEntry(name, path, True, f"already fused{note}"), None
    cls = core(type(module))
    if _is_fused_class(cls):
        return FuseEntry(name, path_of(cls), True, "already fused, as built"), None
    try:
        layout = recognition.find(module)
    except AttributeError as error:
        return FuseEntry(name, path_of(cls), False, f"not as registered: {error}"), None
    if layout is None and not _is_called_like_one(cls):
        return None
    left_alone = FuseEntry(name, path_of(cls), False, None)
    if layout is None:
        reason = "its parts were not found under the names that are known"
        return left_alone._replace(reason=f"{reason}; see resnest_fused.register"), None
    known = recognition.is_known(cls)
    if "forward" in vars(module) or (known and own_method(cls) is None):
        return left_alone._replace(reason="its forward was replaced"), None
    try:
        fused = fused_class(cls, layout)
    except Exception as error:  # of a metaclass or __init_subclass__, which may refuse
        reason = f"its class refuses a subclass: {type(error).__name__}: {error}"
        return left_alone._replace(reason=reason), None
    if not known or verify:
        problem = recognition.problem_of(module, layout)
        if problem is None:
            try:
                problem = (
                    proof.difference(module, layout, fused, backend)
                    if verify
                    else proof.difference_by_class(module, layout, fused, backend, disproved)
                )
            except proof.Unproven as error:
                problem = f"it cannot be tried out: {error}"
        if problem is not None:
            return left_alone._replace(reason=problem), None
    return left_alone._replace(fused=True, proven=not known or verify), fused


@functools.lru_cache(1024)
def _is_called_like_one(cls: type) -> bool:
    return re.search("splat|split_?att", cls.__name__, re.IGNORECASE) is not None
