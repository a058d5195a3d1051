"""Joins the commands to one command line, whose errors are one line and exit code 2.

Where standard output cannot be written, that is one line too; a pipe that is closed is none.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import resnest_fused
from resnest_fused.cli import compare, convert, evaluate, info, models, output, predict, train
from resnest_fused.training import stopping

# What typer raises for wrong arguments; click's, which newer releases carry inside.
_UsageError: Any = typer.BadParameter.__base__


class _PlainFlags:
    """Shows flags without a type, which typer would show as <bool>."""

    def get_params(self, context: Any) -> list[Any]:
        params = super().get_params(context)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Commands(_PlainFlags, TyperGroup):
    """Reports a wrong command line in one line, where typer draws a box."""

    def main(self, *args: Any, **options: Any) -> Any:
        # In this mode errors are raised and exit codes returned.
        options["standalone_mode"] = False
        code = 0
        try:
            code = super().main(*args, **options)
            output.finish()
        except _UsageError as error:
            message = error.format_message().replace("Value error, ", "")  # pydantic's words
            print("resnest-fused:", *message.split(), file=sys.stderr)
            code = 2
        except typer.Abort:
            code = 130
        except output.OutputError as error:
            output.give_up()
            if error.reason is not None:
                print("resnest-fused:", error.reason, file=sys.stderr)
            code = code or 2
        sys.exit(code or 0)


class _Command(_PlainFlags, TyperCommand):
    """Imports all of the package, which is not needed to start and to show help, and then runs."""

    def invoke(self, context: Any) -> Any:
        importlib.reload(resnest_fused)
        return super().invoke(context)


class _Stoppable(_Command):
    """Notes signals to stop from its beginning on; none of them changes an exit code at its end."""

    def invoke(self, context: Any) -> Any:
        if context.params["synthetic"]:
            return super().invoke(context)  # it has nothing to save
        try:
            with stopping.StopRequest() as context.obj:
                return super().invoke(context)
        finally:
            if context.obj.made:
                stopping.ignore()


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    help="ResNeSt's split attention as one operator: its networks, and what they gain by it.",
)
app.command("info", cls=_Command)(info.run)
app.command("models", cls=_Command)(models.run)
app.command("predict", cls=_Command)(predict.run)
app.command("compare", cls=_Command)(compare.run)
app.command("convert", cls=_Command)(convert.run)
app.command("train", cls=_Stoppable)(train.run)
app.command("evaluate", cls=_Command)(evaluate.run)


def main(*command: str) -> None:
    """The entry point ``resnest-fused``; with ``command`` that of one command alone."""
    output.prepare()
    app([*command, *sys.argv[1:]], prog_name="resnest-fused")


def _print_version(wanted: bool) -> None:
    if wanted:
        print("resnest-fused", resnest_fused.__version__)
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
