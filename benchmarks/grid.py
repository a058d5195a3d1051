"""What is measured: the cases, the contenders, and the bytes that every contender must move."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# ResNeSt-50's four stages at 224 pixels, (channels, side).
STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
# The first block of stages 2 to 4 halves the map after its attention. The others are the stages of
# the larger models, which take 320 pixels.
OTHERS = ((128, 56), (256, 28), (512, 14), (64, 80), (128, 40), (256, 20), (512, 10))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# The attention alone, and all that a SplitAttentionConv2d does after its convolution: bn0, ReLU and
# the attention.
FORMS = ("attention", "after conv")
CONTENDERS = ("eager", "compile", "fused", "copy")


@dataclass(frozen=True)
class Case:
    """One call of split attention, ``(B, R*C, side, side)`` to ``(B, C, side, side)``."""

    channels: int
    side: int
    batch: int
    train: bool
    dtype: str = "fp32"
    layout: str = "NCHW"
    radix: int = 2
    form: str = "attention"

    @property
    def shape(self) -> str:
        return f"{self.channels}@{self.side}x{self.side}"

    @property
    def setting(self) -> str:
        """All but the shape: the cases of a setting share a table."""
        mode = "train" if self.train else "eval"
        return f"{self.form} {mode} {self.dtype} {self.layout} R={self.radix} B={self.batch}"

    def __str__(self) -> str:
        return f"{self.shape} {self.setting}"

    @property
    def elements(self) -> int:
        """Elements of ``out``; x has radix times as many."""
        return self.batch * self.channels * self.side**2

    @property
    def _reads(self) -> int:
        """Reads of x in train's forward: one for each batch normalisation, and one for out."""
        return 3 if self.form == "after conv" else 2

    @property
    def floor(self) -> str:
        """Units, each of out's size, to read and write if no data stay on chip between passes.

        Eval reads x (R) and writes out (1). Train's forward reads x two or three times and writes
        out. Backward reads x and dout (R+1), then dout again (1), x again after a bn0 (R), and
        writes dx (R).
        """
        return f"({self._reads}R+1)+({self._reads}R+2)" if self.train else "R+1"

    @property
    def floor_units(self) -> int:
        """:attr:`floor` as a number."""
        moved = self._reads * self.radix
        return (moved + 1) + (moved + 2) if self.train else self.radix + 1

    @property
    def floor_bytes(self) -> int:
        return self.floor_units * self.elements * DTYPES[self.dtype].itemsize


def stage_grid() -> Iterator[tuple[Case, str]]:
    """The default: every contender in fp32 NCHW, and other formats at one batch size.

    The other formats are without ``compile``, which takes most of a run's time.
    """
    for form in FORMS:
        for train, batch, (channels, side) in itertools.product((False, True), (2, 32), STAGES):
            for contender in CONTENDERS:
                yield Case(channels, side, batch, train, form=form), contender
        for (dtype, layout), train, (channels, side) in itertools.product(
            (("fp32", "channels_last"), ("bf16", "NCHW")), (False, True), STAGES
        ):
            for contender in CONTENDERS:
                if contender != "compile":
                    yield Case(channels, side, 32, train, dtype, layout, form=form), contender


def full_grid() -> Iterator[tuple[Case, str]]:
    """Everything, for hours; ``-k`` takes a part of it."""
    for form, train, dtype, layout, radix, batch, (channels, side) in itertools.product(
        FORMS, (False, True), DTYPES, LAYOUTS, (2, 1, 4), (1, 2, 8, 32, 64), STAGES + OTHERS
    ):
        if train and batch == 1:
            continue  # one sample has no batch statistics
        for contender in CONTENDERS:
            yield Case(channels, side, batch, train, dtype, layout, radix, form), contender


GRIDS = {"stages": stage_grid, "all": full_grid}
