"""``resnest-fused train``: train a network by the published recipe, or go on with a run."""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from resnest_fused.cli import screen
from resnest_fused.cli.errors import bad, blame
from resnest_fused.training.config import PRESETS, Config, ConfigError, make_config, parse_yaml

_Preset = Enum("_Preset", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]


class _Shape(str, Enum):
    imagenet = "imagenet"
    cifar = "cifar"


def _run(
    context: typer.Context,
    preset: Annotated[
        _Preset | None,
        typer.Option(
            help=f"The published recipe of {', '.join(list(PRESETS)[:-1])}, or a small run, "
            f"{list(PRESETS)[-1]}. Other options count over it.",
            metavar="NAME",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Options from a YAML file, over the preset's.", metavar="FILE"),
    ] = None,
    plot_with: Annotated[
        list[Path] | None,
        typer.Option(help="Draw another run's curves into the plot, too.", metavar="DIR"),
    ] = None,
    synthetic: Annotated[
        _Shape | None,
        typer.Option(
            help="Train nothing; time loading, steps and the all-reduce, on pictures of random "
            "numbers shaped like those of imagenet or cifar.",
            metavar="NAME",
        ),
    ] = None,
    **options: Any,
) -> None:
    """Train a network, on one process or, by torchrun, on many; or go on with a run.

    The run's folder gets all options (config.yaml), checkpoints, metrics.jsonl, TensorBoard's
    files and a plot. The same command goes on with a run that ended early, from its last
    checkpoint, to the same weights. torchrun --nproc-per-node N -m resnest_fused.training takes
    the same options.

    Exit code: 0 the end was reached, 1 the run failed, 2 wrong arguments, 75 stopped by SIGTERM,
    SIGUSR1 or SIGINT, with a checkpoint of all steps that were done.
    """
    given = {name: value for name, value in options.items() if value not in (None, [])}
    try:
        for name in {"options", "lr_of"} & set(given):
            given[name] = _by_name(given[name])
        chosen = make_config(preset and preset.value, config, given)
        if synthetic is not None:
            _time(chosen, synthetic.value)
            return
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    with blame("train", ImportError):
        from resnest_fused.training.run import train
    raise typer.Exit(train(chosen, tuple(plot_with or ()), context.obj))


def _time(config: Config, shape: str) -> None:
    """Measure the parts of a run, and print them in the first process."""
    with blame("train", ImportError):
        from resnest_fused.training.dryrun import measure
    found = measure(config, shape)
    if os.environ.get("RANK", "0") != "0":
        return
    table: Any = screen.make_table("part", "images/s", "ms a step")
    for column in table.columns[1:]:
        column.justify = "right"
    of_all = found.processes * found.batch
    table.add_row("loading", f"{found.loading:.1f}", f"{1e3 * of_all / found.loading:.1f}")
    table.add_row("step", f"{found.stepping:.1f}", f"{1e3 * found.step_seconds:.1f}")
    if found.processes > 1:
        table.add_row("all-reduce, beyond the step", "", f"{1e3 * found.exchange_seconds:.1f}")
        table.add_row("all-reduce alone", "", f"{1e3 * found.reduce_seconds:.1f}")
    table.add_row("all together", f"{found.training:.1f}", f"{1e3 * of_all / found.training:.1f}")
    processes = "1 process" if found.processes == 1 else f"{found.processes} processes"
    title = (
        f"{config.model}, {shape}-shaped: {processes} of {found.batch} samples, "
        f"{found.gradient_bytes / 1e6:.1f} MB of gradients"
    )
    screen.print_table(screen.make_console(), title, table)


def _by_name(pairs: list[str]) -> dict[str, Any]:
    """Values by name, of NAME=VALUE in YAML's form."""
    import yaml

    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise bad("NAME=X", f"expected a name, = and a value, got {pair!r}")
        try:
            found[name] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise bad(name, f"expected a value in YAML's form, got {value!r}") from error
    return found


def _parameters() -> list[inspect.Parameter]:
    """The command's own parameters, and one for each option of a run."""
    own = inspect.signature(_run, eval_str=True).parameters.values()
    found = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind = hints[field.name]
        if typing.get_origin(kind) is dict:
            kind = list[str]
        empty = field.default is dataclasses.MISSING or field.default in ("", 0, False)
        default = "" if empty else f" Default: {_shown(field.default)}."
        text = field.metadata["help"] + default
        flag = {} if kind is bool else {"metavar": field.metadata["metavar"]}
        annotation = Annotated[kind | None, typer.Option(help=text, **flag)]  # type: ignore[valid-type]
        keyword = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(field.name, keyword, default=None, annotation=annotation))
    return found


def _shown(value: Any) -> str:
    return "on" if value is True else str(value)


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a function a signature that typer can read, of all options of a run."""
    parameters = _parameters()
    made: Any = function
    made.__signature__ = inspect.Signature(parameters)
    made.__annotations__ = {each.name: each.annotation for each in parameters}
    return function


run = _with_options(_run)


def main() -> None:
    """The entry point ``python -m resnest_fused.training``."""
    from resnest_fused.cli import app

    app.main("train")
