"""``resnest-fused models``: the family's networks, their sizes and what was published of them."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from resnest_fused.cli import screen


def run(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same facts as one JSON list.")
    ] = False,
) -> None:
    """List the networks of the family: parameters, multiply-adds and published accuracy."""
    from resnest_fused.models.variants import VARIANTS

    if as_json:
        print(json.dumps([variant._asdict() for variant in VARIANTS.values()], indent=2))
        return
    console = screen.make_console()
    table = screen.make_table("name", "parameters", "GMACs", "pixels", "top-1 %", "published by")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for variant in VARIANTS.values():
        table.add_row(
            variant.name,
            f"{variant.parameters / 1e6:.1f} M",
            f"{variant.macs / 1e9:.2f}",
            str(variant.size),
            "-" if variant.top1 is None else f"{variant.top1:.2f}",
            variant.source or "-",
        )
    note = (
        "top-1: on ImageNet, as published by the official repository or by timm, not measured "
        "here.\nGMACs: of the convolutions and the FC, at these pixels.\nAlso known to compare and "
        "predict: official:NAME (package resnest) and timm:NAME."
    )
    screen.print_table(console, "ResNeSt's networks", table, note, whole=True)
