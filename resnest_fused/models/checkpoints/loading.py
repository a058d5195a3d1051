"""Loads checkpoints of every layout into a model, whole or not at all, and saves a model's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from resnest_fused.models.checkpoints import detectron2, files, gluon, mmdet, mmpretrain, official
from resnest_fused.models.checkpoints.files import CheckpointError, Source
from resnest_fused.models.checkpoints.layout import Layout, unknown_keys
from resnest_fused.models.dilation import OUTPUT_STRIDES
from resnest_fused.models.options import check_choice

_NAMED = 3  # how many keys an error names
_COUNTER = "num_batches_tracked"

# The official mark is found in most of the others, too, so it comes last.
_LAYOUTS = (*(m.LAYOUT for m in (mmpretrain, mmdet, detectron2, gluon)), official.LAYOUT)
LAYOUTS = {layout.name: layout for layout in _LAYOUTS} | {"timm": official.LAYOUT}


class Checkpoint(NamedTuple):
    """What a file holds, under the names of the official layout.

    Attributes:
        source: the file or URL.
        state: tensors by name.
        layout: the layout of the file; None if it is not that of a ResNeSt.
        prefix: what stood in front of the network's names in the file.
    """

    source: str
    state: dict[str, Tensor]
    layout: Layout | None
    prefix: str


def read_checkpoint(
    source: Source,
    *,
    sha256: str | None = None,
    entry: str | None = None,
    prefix: str | None = None,
) -> Checkpoint:
    """The weights in a file, whoever wrote it, under the names of the official layout.

    Files are those of ``torch.save``, read with ``weights_only=True``, and ``.safetensors``. The
    weights are the content itself or an entry of it, such as "state_dict", "model" or "ema".
    Prefixes of wrappers are taken off: "module.", "_orig_mod.", "model.", "backbone." and others.
    The layouts are those of the official package and timm, of MMPretrain, MMDetection, detectron2
    and the official Gluon code, which is recognised by its names.

    Example::

        checkpoint = read_checkpoint("resnest50.pth")
        checkpoint = read_checkpoint("https://.../resnest50-528c19ca.pth", sha256="528c19ca")
        model = create("resnest50", read_checkpoint("trained.pth", entry="ema"))

    Args:
        source: a file, or a URL, which is downloaded once into torch.hub's folder.
        sha256: the file's hash or its first digits, eight at least; a URL needs it.
        entry: which of several state_dicts in the file, such as "ema". By default the first of
            these that it has: {entries}.
        prefix: take only what stands under this prefix, as "backbone." in a detector's file.

    Raises:
        CheckpointError: not a file, truncated or damaged, another hash, or something else than
            tensors by name. The message names a training script's own objects beside the weights,
            and what to do.
    """
    state = files.read_tensors(source, sha256, entry)
    name = os.fspath(source)
    if prefix is not None:
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not state:
            raise CheckpointError(f"{name}: nothing in it begins with {prefix!r}")
    state.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    return _recognised(name, {bare: state[key] for bare, key in _bare_names(state).items()})


read_checkpoint.__doc__ = (read_checkpoint.__doc__ or "").format(entries=", ".join(files.ENTRIES))


def _bare_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names in ``state`` by those of the network that training's wrappers are around."""
    # torch.compile wraps a part of a network, too.
    names = {key.replace("_orig_mod.", ""): key for key in state}
    # DataParallel and others put this in front of every name of any network.
    while names and all(name.startswith("module.") for name in names):
        names = {name.removeprefix("module."): key for name, key in names.items()}
    return names


def _recognised(name: str, state: dict[str, Tensor]) -> Checkpoint:
    """With the official layout's names, if the names are those of a layout."""
    for layout in _LAYOUTS:
        found = layout.find_prefix(state)
        if found is not None:
            names = layout.without_prefix(state, found)
            if len(names) < len(state):
                raise CheckpointError(
                    f"{name}: has some tensors twice, with and without {found!r} in front"
                )
            return Checkpoint(name, layout.to_official(names), layout, found)
    return Checkpoint(name, state, None, "")


def load_checkpoint(
    model: nn.Module,
    source: Source | Checkpoint,
    *,
    sha256: str | None = None,
    leave_out: Sequence[str] = (),
    in_chans: int | None = None,
) -> None:
    """Load a checkpoint into ``model``; every key and shape is compared before the first copy.

    Counters (``num_batches_tracked``) may be absent if all are. A backbone takes the checkpoint of
    a whole network.

    Example::

        load_checkpoint(model, "resnest50.pth")
        load_checkpoint(model, "resnest50.pth", leave_out=("fc",))  # another number of classes

    Args:
        model: a network with the official layout's names, or any other with names of its own; it
            may be compiled, or in ``DistributedDataParallel``.
        source, sha256: as of :func:`read_checkpoint`, or what it returned.
        leave_out: modules of the model that keep their weights, whatever the file has for them.
        in_chans: the model's number of input channels, to which the checkpoint's first convolution
            is adapted; None takes it as it is.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or keys or shapes differ from the model's, or
            weights are integers, or there is no such module to leave out. The model is then as it
            was.
        RuntimeError: the model's norms are folded; see :func:`resnest_fused.fuse`.
    """
    if isinstance(leave_out, str):
        raise CheckpointError(f"leave_out: expected several names, got {leave_out!r}")
    checkpoint = source
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint, sha256=sha256)
    if in_chans is not None:
        adapted = official.adapt_input(checkpoint.state, in_chans)
        checkpoint = checkpoint._replace(state=adapted)
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise CheckpointError("the model is on the device meta, where it has no weights")
    names = _bare_names(own)
    expected = {name: own[key] for name, key in names.items()}
    parts = tuple(f"{name}." for name in leave_out)
    absent = tuple(f"{name}." for name in getattr(model, "absent_modules", ()))
    for part in parts:
        if not any(key.startswith(part) for key in expected) and part not in absent:
            raise CheckpointError(f"leave_out: the model has no {part.removesuffix('.')!r}")
    state = {k: v for k, v in checkpoint.state.items() if not k.startswith(parts + absent)}
    expected = {key: value for key, value in expected.items() if not key.startswith(parts)}
    # Frozen norms have no counters, nor has Gluon.
    if not any(_is_counter(key) for key in state):
        expected = {key: value for key, value in expected.items() if not _is_counter(key)}
    if not any(_is_counter(key) for key in expected):
        state = {key: value for key, value in state.items() if not _is_counter(key)}
    complaints = [
        _listing("missing", (key for key in expected if key not in state)),
        _listing("unexpected", (key for key in state if key not in expected)),
        _listing(
            "of another shape",
            (
                f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
                for key, value in expected.items()
                if key in state and state[key].shape != value.shape
            ),
        ),
        _listing(
            "not of floating point",
            (
                f"{key} {state[key].dtype}"
                for key, value in expected.items()
                if key in state and value.is_floating_point() > state[key].is_floating_point()
            ),
        ),
    ]
    if any(complaints):
        raise CheckpointError(
            f"{checkpoint.source}: not a checkpoint of this {type(model).__name__}: "
            + "; ".join(filter(None, complaints))
            + _advice(checkpoint, expected, state)
        )
    model.load_state_dict({names[name]: value for name, value in state.items()}, strict=False)


def save_checkpoint(model: nn.Module, path: Source, layout: str = "official") -> list[str]:
    """Write a model's weights to a file, in any layout; see :func:`convert_checkpoint`.

    Example::

        save_checkpoint(model, "resnest50_mm.pth", "mm")

    Args:
        model: a network with the official layout's names: this package's, the official, timm's. It
            may be compiled, or in ``DistributedDataParallel``.
        path: is written as safetensors if it ends so, else by ``torch.save``.
        layout: "official", "timm", "mm" (MMPretrain), "mmdet", "d2" (detectron2) or "gluon".

    Returns:
        The names that the layout has no place for: the classifier's, or Gluon's lack of counters.

    Raises:
        CheckpointError: no such layout, no ResNeSt, one that the layout has no names for (such as
            one without a deep stem in "mm"), or the file cannot be written. What was there before
            is then still there.
    """
    own = model.state_dict()
    state = {name: own[key] for name, key in _bare_names(own).items()}
    return _write(state, type(model).__name__, path, layout, _output_stride(model))


def _output_stride(model: nn.Module) -> int:
    """The stride of a network's last map: the stem's and those of the poolings in shortcuts."""
    stride = 4
    for name, module in model.named_modules():
        if re.search(r"(^|\.)layer[234]\.0\.downsample\.0$", name):
            given = getattr(module, "stride", 1)
            stride *= given if isinstance(given, int) else given[0]
    return stride


def convert_checkpoint(
    source: Source | Checkpoint, path: Source, layout: str, *, output_stride: int = 32
) -> list[str]:
    """Write a file's weights to another file, in another layout, with the same numbers.

    Example::

        convert_checkpoint("resnest50-528c19ca.pth", "resnest50_mm.pth", "mm")

    Args:
        source: as of :func:`read_checkpoint`, or what it returned.
        path, layout: as of :func:`save_checkpoint`.
        output_stride: the network's, 8, 16 or 32. MMPretrain's names of shortcuts depend on it.

    Returns:
        As :func:`save_checkpoint`.

    Raises:
        CheckpointError: as :func:`read_checkpoint` and :func:`save_checkpoint`.
        ValueError: another ``output_stride``.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    check_choice(OUTPUT_STRIDES, output_stride=output_stride)
    return _write(checkpoint.state, checkpoint.source, path, layout, output_stride)


def _write(
    state: Mapping[str, Tensor], whose: str, path: Source, layout: str, output_stride: int
) -> list[str]:
    if layout not in LAYOUTS:
        raise CheckpointError(f"expected one of {', '.join(LAYOUTS)} as a layout, got {layout!r}")
    strangers = _listing("unknown", unknown_keys(state))
    if strangers or not any(key.startswith("layer1.0.conv2.") for key in state):
        raise CheckpointError(f"{whose}: not the weights of a ResNeSt: {strangers or 'no blocks'}")
    written = LAYOUTS[layout].from_official(state, output_stride)
    kept = _recognised(whose, dict(written)).state
    lost = sorted(key for key in state if key not in kept)
    nameless = [key for key in lost if not (key.startswith("fc.") or _is_counter(key))]
    strange = sorted(key for key in kept if key not in state)
    if nameless or strange:
        told = _listing("names that would not be read as they are", nameless or strange)
        raise CheckpointError(f"{whose}: the layout {layout!r} is not for this network: {told}")
    files.write_tensors(written, path)
    return lost


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == _COUNTER


def _advice(
    checkpoint: Checkpoint, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> str:
    """What may help, for the mistakes that are made most."""
    wrong = {k for k in expected if k not in state or state[k].shape != expected[k].shape}
    if wrong and wrong <= {"fc.weight", "fc.bias"} and set(state) <= set(expected):
        return "; leave_out=('fc',) keeps the model's own classifier"
    if not wrong and checkpoint.prefix:
        return f"; prefix={checkpoint.prefix!r} takes what stands under it alone"
    in_file, in_model = _blocks(state), _blocks(expected)
    if in_file != in_model and any(in_file) and any(in_model):
        return f"; its stages have {in_file} blocks, the model's {in_model}"
    return ""


def _blocks(state: Iterable[str]) -> tuple[int, ...]:
    """How many blocks each stage of a ResNeSt has."""
    blocks = {match[1] for match in map(re.compile(r"(layer\d\.\d+)\.").match, state) if match}
    return tuple(sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in "1234")


def _listing(what: str, keys: Iterable[str]) -> str:
    """How many ``keys`` there are, and the first few; empty when there are none."""
    found = list(keys)
    if not found:
        return ""
    named = ", ".join(found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    return f"{len(found)} {what} ({named})"
