"""``resnest-fused predict``: the likeliest classes of photos, by any network and checkpoint."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from resnest_fused.cli import screen
from resnest_fused.cli.devices import Device, find_device
from resnest_fused.cli.errors import bad, blame

if TYPE_CHECKING:
    from torch import nn

    from resnest_fused.models.registry import Preprocessing

_SEED = 0
_IMAGENET = 1000
# What Pillow knows beside pictures: data, films and drawings, most of which it cannot read.
_NO_PHOTOS = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


class _Format(str, Enum):
    table = "table"
    csv = "csv"
    json = "json"


class _Guess(NamedTuple):
    """One of a photo's likeliest classes: its number, its name and its probability."""

    number: int
    name: str
    probability: float


def run(
    photo: Annotated[
        list[Path],
        typer.Argument(metavar="PHOTO", help="Photos, and folders of photos with theirs."),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="A name of `resnest-fused models`, official:NAME (package resnest) or timm:NAME.",
            metavar="NAME",
        ),
    ] = "resnest50",
    weights: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint of the model, of any layout: a file, or a URL. Default: random "
            "weights, whose guesses mean nothing.",
            metavar="FILE",
        ),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option(
            help="The hash of the checkpoint or its first digits, eight at least. A URL needs it.",
            metavar="HASH",
        ),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(
            help="Which of several state_dicts in the checkpoint, such as ema.", metavar="NAME"
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="The names of the classes, one a line. Default: ImageNet's, where there are 1000.",
            metavar="FILE",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show.", metavar="N")] = 5,
    form: Annotated[
        _Format,
        typer.Option("--format", help="Of what is printed: table, csv or json.", metavar="NAME"),
    ] = _Format.table,
    batch: Annotated[int, typer.Option(min=1, help="Photos at a time.", metavar="N")] = 8,
    device: Device = None,
) -> None:
    """Name the likeliest classes of photos, with their probabilities.

    Photos are cropped and scaled as the network's own evaluation does. Those that cannot be read
    are left out and named on stderr.

    Exit code: 0 done, 1 some photos could not be read, 2 wrong arguments or files.
    """
    import torch

    import resnest_fused as rf
    from resnest_fused import models
    from resnest_fused.models import registry

    if weights is None:
        for option, given in (("--sha256", sha256), ("--entry", entry)):
            if given is not None:
                raise bad(option, "expected --weights beside it")
    place = find_device(device)
    paths = _find_photos(photo)
    names = None if classes is None else _read_names(classes)
    checkpoint = None
    if weights is not None:
        with blame("--weights", models.CheckpointError):
            checkpoint = models.read_checkpoint(weights, sha256=sha256, entry=entry)
        if (
            checkpoint.layout is not None
            and models.checkpoints.num_classes(checkpoint.state) is None
        ):
            raise bad("--weights", f"{weights}: a backbone's, without a classifier to predict by")
    with (
        blame("--model"),
        blame("--weights", models.CheckpointError),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(_SEED)
        network = models.create(model, checkpoint)
    rf.fuse(network)
    preprocessing = registry.preprocessing(model, network)
    unreadable: list[str] = []
    network = network.eval().to(place)
    answers = list(_guess(network, preprocessing, paths, batch, top, names, unreadable))
    if form is _Format.json:
        rows = [
            {"photo": _text(path), "classes": [guess._asdict() for guess in found]}
            for path, found in answers
        ]
        print(json.dumps(rows, indent=2))
    elif form is _Format.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("photo", "rank", *_Guess._fields))
        for path, found in answers:
            for rank, guess in enumerate(found, 1):
                shown = (guess.number, guess.name, f"{guess.probability:.6f}")
                writer.writerow((_text(path), rank, *shown))
    else:
        _print_tables(answers)
    if weights is None:
        print("random weights: the classes mean nothing; give --weights", file=sys.stderr)
    if unreadable:
        for reason in unreadable:
            print(f"resnest-fused: {reason}", file=sys.stderr)
        count = f"{len(unreadable)} of {len(paths)} photos"
        print(f"resnest-fused: {count} could not be read", file=sys.stderr)
        raise typer.Exit(1)


def _find_photos(given: Sequence[Path]) -> list[Path]:
    """The files that were given, and the pictures in folders, whose names tell what they are."""
    from PIL import Image

    suffixes = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NO_PHOTOS
    }
    paths = []
    for path in given:
        if not path.is_dir():
            if not path.is_file():
                raise bad("PHOTO", f"{path}: not a file that exists")
            paths.append(path)
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
        if not found:
            raise bad("PHOTO", f"{path}: a folder without pictures")
        paths += found
    return paths


def _guess(
    network: nn.Module,
    preprocessing: Preprocessing,
    paths: Sequence[Path],
    batch: int,
    top: int,
    names: Sequence[str] | None,
    unreadable: list[str],
) -> Iterator[tuple[Path, list[_Guess]]]:
    """Each photo with its likeliest classes, best first; what is wrong with the other photos."""
    import torch

    from resnest_fused.models import images

    place = next(network.parameters()).device
    with screen.progress("predicting", total=len(paths)) as advance, torch.inference_mode():
        for start in range(0, len(paths), batch):
            readable, pictures = [], []
            for path in paths[start : start + batch]:
                try:
                    pictures.append(preprocessing.transform(images.read_image(path)))
                    readable.append(path)
                except ValueError as error:
                    unreadable.append(" ".join(str(error).split()))
                    advance()
            if not pictures:
                continue
            with blame("--batch", torch.OutOfMemoryError):
                odds = network(torch.stack(pictures).to(place)).double().softmax(dim=1).cpu()
            if names is None:
                names = _usual_names(odds.shape[1])
            if len(names) != odds.shape[1]:
                raise bad("--classes", f"expected {odds.shape[1]} names, got {len(names)}")
            for path, row in zip(readable, odds, strict=True):
                if not row.isfinite().all():
                    raise bad("--weights", f"{path}: its classes' probabilities are not finite")
                best = row.topk(min(top, len(row)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                yield path, [_Guess(number, names[number], odds) for number, odds in pairs]
                advance()


def _read_names(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise bad("--classes", f"{file}: cannot be read ({error})") from error


def _usual_names(count: int) -> Sequence[str]:
    """The names of so many classes: ImageNet's, or numbers."""
    from resnest_fused.models.imagenet import class_names

    return class_names() if count == _IMAGENET else [f"class {i}" for i in range(count)]


def _text(path: Path) -> str:
    """The path in UTF-8, which readers of CSV and JSON expect; other bytes of it as ``\\xff``."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _print_tables(answers: Sequence[tuple[Path, list[_Guess]]]) -> None:
    console = screen.make_console()
    for path, found in answers:
        table: Any = screen.make_table("class", "name", "probability")
        for column in (table.columns[0], table.columns[2]):
            column.justify = "right"
        for guess in found:
            table.add_row(str(guess.number), guess.name, f"{100 * guess.probability:.1f} %")
        screen.print_table(console, str(path), table)
