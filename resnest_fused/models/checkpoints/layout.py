"""What a layout says about the names of a ResNeSt's tensors, and how names are translated by it.

Names inside the package are the official package's. A layout is a table of what others call the
same modules, read in both directions, so a round trip changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.(.+)")
_KEY = re.compile(
    r"(conv1|conv1\.\d|bn1|fc|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[012]|"
    r"conv2\.(conv|bn0|fc1|bn1|fc2)))\.(weight|bias|running_mean|running_var|num_batches_tracked)|"
    # Of what a conv_layer made: any names.
    r"(conv1(\.[036])?|layer[1-4]\.\d+\.conv2(\.conv)?)\..+"
)


@dataclass(frozen=True)
class Layout:
    """The names in one kind of file.

    Attributes:
        name: how it is asked for.
        title: what it is called in messages.
        mark: a pattern of a name that only this layout has; what stands in front of it in a file's
            names is a wrapper's prefix.
        stem, block: modules of the stem and of a block, by their official names; those that are not
            there have these names already.
        stage: what a stage is called, and how much is added to its number.
        prefix: stands in front of every name but the classifier's, in files that are written.
        head: the classifier's name; None in a layout without one.
        outer_head: what else the classifier is called, where the network is a part of a larger one.
        shifts_shortcuts: whether a shortcut without a pooling is numbered from 0.
        norm_tensors: what the norms' weight and bias are called; other files have no counters.
    """

    name: str
    title: str
    mark: str
    stem: Mapping[str, str] = field(default_factory=dict)
    block: Mapping[str, str] = field(default_factory=dict)
    stage: tuple[str, int] = ("layer", 0)
    prefix: str = ""
    head: str | None = "fc"
    outer_head: str | None = None
    shifts_shortcuts: bool = False
    norm_tensors: Mapping[str, str] = field(default_factory=dict)

    def find_prefix(self, keys: Iterable[str]) -> str | None:
        """What stands in front of the names of this layout among ``keys``; None if none is."""
        pattern = re.compile(rf"((?:.+\.)?){self.mark}")
        matches = filter(None, map(pattern.match, keys))
        return next((match[1] for match in matches), None)

    def without_prefix(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Without the prefix, and without what of it stands in front of the classifier's name."""
        heads = "|".join(re.escape(head) for head in (self.head, self.outer_head) if head)
        pattern = re.compile(rf"((?:.+?\.)??)((?:{heads})\.\w+)")
        found = {}
        for key, value in state.items():
            match = pattern.fullmatch(key) if heads else None
            if match and prefix.startswith(match[1]):
                key = match[2]
            found[key.removeprefix(prefix)] = value
        return found

    def to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state_dict with official names; a name that the layout does not know stays."""
        stem, block = _invert(self.stem), _invert(self.block)
        tensors = _invert(self.norm_tensors)
        name, offset = self.stage
        pattern = re.compile(rf"{name}(\d)\.(\d+)\.(.+)")
        shifted = {
            key.removesuffix("downsample.0.weight")
            for key in state
            if self.shifts_shortcuts and key.endswith(".downsample.0.weight")
        }
        found = {}
        for key, value in state.items():
            module, _, tensor = key.rpartition(".")
            if not module:
                found[key] = value
                continue
            match = pattern.fullmatch(module)
            if module in (self.head, self.outer_head):
                module = "fc"
            elif match:
                inner = _rename(match[3], block)
                if module.removesuffix(match[3]) in shifted:
                    inner = _renumber(inner, 1)
                module = f"layer{int(match[1]) - offset}.{match[2]}.{inner}"
            else:
                module = _rename(module, stem)
            found[f"{module}.{tensors.get(tensor, tensor)}"] = value
        return found

    def from_official(
        self, state: Mapping[str, Tensor], output_stride: int = 32
    ) -> dict[str, Tensor]:
        """The state_dict with this layout's names; without the classifier if it has none.

        Args:
            state: names of the official layout.
            output_stride: the network's, on which the names of shortcuts may depend.
        """
        norms = {key.removesuffix(".running_mean") for key in state if key.endswith("running_mean")}
        name, offset = self.stage
        found = {}
        for key, value in state.items():
            module, _, tensor = key.rpartition(".")
            if module in norms and self.norm_tensors:
                if tensor == "num_batches_tracked":
                    continue
                tensor = self.norm_tensors.get(tensor, tensor)
            match = _BLOCK.fullmatch(module)
            if module == "fc":
                if self.head is not None:
                    found[f"{self.head}.{tensor}"] = value
                continue
            if match:
                stage, number, inner = match.groups()
                keeps_size = stage == "1" or 2 << int(stage) > output_stride
                if self.shifts_shortcuts and number == "0" and keeps_size:
                    inner = _renumber(inner, -1)
                module = f"{name}{int(stage) + offset}.{number}.{_rename(inner, self.block)}"
            else:
                module = _rename(module, self.stem)
            found[f"{self.prefix}{module}.{tensor}"] = value
        return found


def unknown_keys(state: Mapping[str, Tensor]) -> list[str]:
    """The names that no ResNeSt of the official layout has."""
    return [key for key in state if not _KEY.fullmatch(key)]


def _rename(module: str, names: Mapping[str, str]) -> str:
    """Another name of the module, as of itself or of the module that it is inside of."""
    outer, inner = module, ""
    while outer and outer not in names:
        outer, _, last = outer.rpartition(".")
        inner = f".{last}{inner}"
    return f"{names[outer]}{inner}" if outer else module


def _invert(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: official for official, theirs in names.items()}


def _renumber(inner: str, by: int) -> str:
    parent, _, number = inner.rpartition(".")
    return f"{parent}.{int(number) + by}" if parent == "downsample" else inner
