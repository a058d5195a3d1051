"""``resnest-fused convert``: a checkpoint's weights in another layout, with the same numbers."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from resnest_fused.cli import screen
from resnest_fused.cli.errors import bad, blame


class _Layout(str, Enum):
    official = "official"
    timm = "timm"
    mm = "mm"
    mmdet = "mmdet"
    d2 = "d2"
    gluon = "gluon"


def run(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A checkpoint of any layout: a file, or a URL.")
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="The file to write, as safetensors if its name ends so."
        ),
    ],
    to: Annotated[
        _Layout,
        typer.Option(
            help="The layout of OUT: official, timm (the same), mm (MMPretrain), mmdet, "
            "d2 (detectron2) or gluon.",
            metavar="NAME",
        ),
    ],
    sha256: Annotated[
        str | None,
        typer.Option(
            help="The hash of IN or its first digits, eight at least. A URL needs it.",
            metavar="HASH",
        ),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(help="Which of several state_dicts in IN, such as ema.", metavar="NAME"),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Take only what stands under this prefix, as backbone. in a detector's file.",
            metavar="TEXT",
        ),
    ] = None,
    output_stride: Annotated[
        int,
        typer.Option(
            help="Of the network, 8 or 16 if it is dilated: mm names its shortcuts otherwise.",
            metavar="N",
        ),
    ] = 32,
) -> None:
    """Write a checkpoint's weights to another file, under the names of another layout.

    The numbers stay the same to the bit.

    Exit code: 0 written, 2 wrong arguments or files; then nothing is written.
    """
    from resnest_fused.models import CheckpointError, convert_checkpoint, read_checkpoint
    from resnest_fused.models.dilation import OUTPUT_STRIDES

    if output_stride not in OUTPUT_STRIDES:
        raise bad("--output-stride", f"expected 8, 16 or 32, got {output_stride}")
    with blame("IN", CheckpointError):
        found = read_checkpoint(source, sha256=sha256, entry=entry, prefix=prefix)
    with blame("OUT", CheckpointError):
        left_out = convert_checkpoint(found, target, to.value, output_stride=output_stride)
    facts = screen.make_facts()
    origin = found.layout.title if found.layout is not None else "an unknown"
    under = f", under {found.prefix}" if found.prefix else ""
    facts.add_row("read", f"{source}: {origin} layout{under}, {len(found.state)} tensors")
    facts.add_row("written", f"{target}: {len(found.state) - len(left_out)} tensors for {to.value}")
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        facts.add_row("left out", f"{', '.join(left_out[:3])}{more}: the layout has none")
    screen.make_console().print(facts)
