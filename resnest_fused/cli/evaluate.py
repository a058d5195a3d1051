"""``resnest-fused evaluate``: how good a checkpoint is on pictures with labels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnest_fused.cli import screen
from resnest_fused.cli.devices import Device, find_device
from resnest_fused.cli.errors import blame
from resnest_fused.training.config import ConfigError

if TYPE_CHECKING:
    from resnest_fused.training.assessment import Assessment

_SHOWN = 20  # classes in the table: the worst ones, if there are more


def run(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="WEIGHTS", help="A checkpoint of `resnest-fused train`, or of any layout."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="As of train, or a folder that has a folder for each class. Default: the run's.",
            metavar="SOURCE",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A name of `resnest-fused models`, official:NAME or timm:NAME. Default: the run's,"
            " else resnest50.",
            metavar="NAME",
        ),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(
            help="Which weights of the file, such as model. Default: a run's moving average, if "
            "it has one.",
            metavar="NAME",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Pixels of the side. Default: the network's own.", metavar="N"),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="The share of the shorter side that is seen. Default: size/(size+32).",
            metavar="X",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures at a time.", metavar="N")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that load data.", metavar="N")
    ] = None,
    amp: Annotated[
        str | None, typer.Option(help="Mixed precision: none, bf16 or fp16.", metavar="NAME")
    ] = None,
    fuse: Annotated[
        bool | None, typer.Option(help="Run each split attention as one op. Default: on.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Where torchvision's datasets are kept.", metavar="DIR")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for scores.json and the confusion matrix, as PNG and SVG.",
            metavar="DIR",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    device: Device = None,
) -> None:
    """Score a checkpoint: accuracy, by class too, confusion and calibration.

    Exit code: 0 done, 2 wrong arguments or files.
    """
    given = {
        **{"data": data, "model": model, "eval_crop": size, "eval_ratio": ratio, "batch": batch},
        **{"workers": workers, "amp": amp, "fuse": fuse, "root": root},
    }
    options = {name: value for name, value in given.items() if value is not None}
    place = find_device(device)
    with blame("evaluate", ImportError):
        from resnest_fused.models import CheckpointError
        from resnest_fused.training.assessment import assess
    try:
        with blame("WEIGHTS", CheckpointError):
            found = assess(weights, options, entry=entry, device=place)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None:
        _write(found, out)
    if as_json:
        print(json.dumps(_as_values(found), indent=2))
    else:
        _print(weights, found)


def _as_values(found: Assessment) -> dict[str, Any]:
    scores = found.scores
    by_class = scores.by_class().tolist()[: len(found.classes)]
    return {
        "pictures": int(scores.confusion.sum()),
        "loss": scores.loss,
        "top1": scores.top1,
        "top5": scores.top5,
        "calibration_error": scores.calibration_error,
        "by_class": {
            name: None if math.isnan(value) else value
            for name, value in zip(found.classes, by_class, strict=True)
        },
        "confusion": scores.confusion.tolist(),
        "bad_pictures": scores.complaints,
    }


def _write(found: Assessment, out: Path) -> None:
    from resnest_fused.training.plots import draw_confusion

    with blame("--out", OSError):
        out.mkdir(parents=True, exist_ok=True)
        (out / "scores.json").write_text(json.dumps(_as_values(found)), encoding="utf-8")
        for suffix in (".png", ".svg"):
            draw_confusion(found.scores.confusion, found.classes, out / f"confusion{suffix}")


def _print(weights: str, found: Assessment) -> None:
    values = _as_values(found)
    console = screen.make_console()
    facts = screen.make_facts()
    which = f", its {found.entry}" if found.entry else ""
    facts.add_row("weights", f"{weights}{which}: {found.config.model}")
    facts.add_row("data", f"{found.config.data}: {values['pictures']} pictures")
    facts.add_row("top-1", f"{values['top1']:.2f} %")
    facts.add_row("top-5", f"{values['top5']:.2f} %")
    facts.add_row("loss", f"{values['loss']:.4f}")
    facts.add_row("calibration", f"off by {values['calibration_error']:.2f} % (15 bins)")
    bad = found.scores.complaints
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        facts.add_row("bad pictures", f"{bad[0]}{more}; others took their places")
    console.print(facts)
    known = {name: value for name, value in values["by_class"].items() if value is not None}
    worst = sorted(known.items(), key=lambda pair: pair[1])[:_SHOWN]
    table: Any = screen.make_table("class", "top-1")
    table.columns[1].justify = "right"
    for name, value in worst:
        table.add_row(name, f"{value:.2f} %")
    count = "by class" if len(worst) == len(known) else f"the {_SHOWN} worst classes"
    screen.print_table(console, f"Accuracy {count}, worst first", table)
