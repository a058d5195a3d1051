"""The command line: what is installed here, and a fused network against its reference."""

from __future__ import annotations

import contextlib
import copy
import platform
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL.Image import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from typer.core import TyperGroup

import resnest_fused
from resnest_fused import compare, images, models, sources
from resnest_fused.agreement import KINDS, Check
from resnest_fused.backends import backends, choose, native
from resnest_fused.fusing import FuseReport, VerifyReport, fuse

_SEED = 0
_CLASSES = 1000
_LISTED = 4  # the inputs whose top-5 is printed, of the batch

# Batch normalisation over two samples gives about +1 and -1 whatever they are, and turns rounding
# into large errors; with three it can come near that.
_TRAIN_BATCH = 4

# What typer raises for wrong arguments; click's, which newer releases carry inside.
_UsageError: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """Reports a wrong command line in one line, where typer draws a box."""

    def main(self, *args: Any, **options: Any) -> Any:
        # In this mode errors are raised and exit codes returned.
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
        except _UsageError as error:
            print("resnest-fused:", *error.format_message().split(), file=sys.stderr)
            code = 2
        except typer.Abort:
            code = 130
        sys.exit(code or 0)


class _DType(str, Enum):
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


class _Backend(str, Enum):
    auto = "auto"
    native = "native"
    triton = "triton"
    reference = "reference"


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    help="ResNeSt's split attention as one operator: what is installed, and how it compares.",
)


def main() -> None:
    """The entry point ``resnest-fused``."""
    app(prog_name="resnest-fused")


@app.command("info")
def _info() -> None:
    """Show what is built and installed, and which backends can run."""
    console = _console()
    facts = _facts()
    facts.add_row("resnest_fused", f"{resnest_fused.__version__} in {Path(__file__).parent}")
    facts.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    facts.add_row("torch", f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads")
    reason = native.unavailable()
    if reason is None:
        built = native.build_info()
        facts.add_row("native kernels", f"built against torch {built['torch_version']}")
        facts.add_row("compiler", built["compiler"])
        facts.add_row("flags", built["cxx_flags"])
        facts.add_row("instructions", f"{built['cpu_capability']}, chosen for this CPU at run time")
        facts.add_row("CUDA kernels", native.cuda_status())
    else:
        facts.add_row("native kernels", "none")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        runs = reason is None and native.gpu_unavailable(index) is None
        kernels = "CUDA kernels run on it" if runs else "no CUDA kernels for it"
        facts.add_row(f"GPU {index}", f"{gpu.name}, {gpu.major}.{gpu.minor}: {kernels}")
    console.print(facts)
    table = _table("name", "available", "")
    for status in backends():
        table.add_row(status.name, "yes" if status.available else "no", status.reason)
    _print_table(console, "Backends, in the order in which auto tries them", table)


@app.command("compare")
def _compare(
    model: Annotated[
        str,
        typer.Option(
            help="resnest50, or official:NAME (package resnest), or timm:NAME.", metavar="NAME"
        ),
    ] = "resnest50",
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A photo as input; repeat for several. Default: seeded random pictures."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="A checkpoint of the model. Default: seeded random weights."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Batch size; images are repeated, with --train as random crops. "
            f"Default: the number of images; with --train at least {_TRAIN_BATCH}.",
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Compare training steps, forward and backward.")
    ] = False,
    dtype: Annotated[_DType, typer.Option(help="Of weights and input.")] = _DType.float32,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Weights and input in channels_last format.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time torch.compile of both as well.")
    ] = False,
    backend: Annotated[_Backend, typer.Option(help="Of the fused network.")] = _Backend.auto,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each network.")] = 10,
) -> None:
    """Run a network and its fused copy on the same weights and input.

    Prints how far they agree, the time of both and the memory they take.

    Exit code: 0 they agree, 1 they do not, 2 wrong arguments or files.
    """
    console = _console()
    status = {s.name: s for s in backends()}.get(backend.value)
    if status is not None and not status.available:
        raise _bad("--backend", f"{status.name} cannot run: {status.reason}")
    with _blame("--backend", (ValueError, RuntimeError)):
        chosen = choose(backend.value, torch.empty(0))
    with _blame("--image"):
        pictures = [images.read_image(path) for path in image or []]
    size = batch or max(len(pictures), _TRAIN_BATCH if train else 1)
    if size < len(pictures):
        raise _bad("--batch", f"must hold all {len(pictures)} images, got {size}")
    if train and size < _TRAIN_BATCH:
        raise _bad("--batch", f"--train needs at least {_TRAIN_BATCH}, got {size}")
    with _blame("--model"):
        source = sources.build(model, _SEED)
    reference = source.model
    if weights is None:
        sources.randomize_norms(reference, source.size, _SEED)
    else:
        with _blame("--weights"):
            models.load_checkpoint(reference, weights)
    fused = copy.deepcopy(reference)
    report = fuse(fused, backend=backend.value)
    if not report:
        raise _bad("--model", f"{model} has no split attention that can be fused")

    x = _input(source, pictures, size, train)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    options: dict[str, Any] = {"dtype": getattr(torch, dtype.value), "memory_format": layout}
    x = x.to(**options)
    for network in (reference, fused):
        network.to(**options).train(train)

    facts = _facts()
    facts.add_row("model", f"{model}, {'training step' if train else 'eval'}")
    facts.add_row("weights", str(weights or "random: classes mean nothing, agreement does"))
    names = [path.name for path in image or []]
    facts.add_row("input", f"{', '.join(names) or 'random pictures'}: {_describe(x)}")
    facts.add_row("fused", _summary(report))
    unfused = chosen == "reference" and backend is _Backend.auto
    facts.add_row("backend", chosen + (", for want of a fused one: see info" if unfused else ""))
    facts.add_row("threads", str(torch.get_num_threads()))
    console.print(facts)

    if train:
        agreed = _training_agrees(console, reference, fused, x)
    else:
        agreed = _eval_agrees(console, reference, fused, names or ["random picture"], x)
    _print_costs(console, reference, fused, compiled, repeats, x)
    verdict = "The fused network agrees with the reference."
    if not agreed:
        verdict = "The fused network does NOT agree with the reference."
    console.print(verdict, style="bold green" if agreed else "bold red")
    raise typer.Exit(0 if agreed else 1)


def _input(source: sources.Source, pictures: list[Image], size: int, train: bool) -> Tensor:
    if not pictures:
        # Another seed than that of the picture by which the random norms were set.
        return images.random_images(size, source.size, _SEED + 1)
    x = torch.stack([source.preprocess(picture) for picture in pictures])
    # Copies of one picture would leave batch normalisation nothing but rounding errors.
    return images.random_crops(x, size, _SEED) if train else x[torch.arange(size) % len(x)]


def _eval_agrees(
    console: Console, reference: nn.Module, fused: nn.Module, names: list[str], x: Tensor
) -> bool:
    with _progress("comparing"), torch.no_grad():
        logits, tops = compare.check_eval(reference, fused, x)
        modules, checks = compare.check_modules(fused, x)
    same = sum(top.reference == top.fused for top in tops)
    ties = sum(top.reference != top.fused and top.tied for top in tops)
    _print_checks(console, [logits, *checks], modules)
    table = _table("input", "reference", "fused", "")
    for index, top in enumerate(tops[:_LISTED]):
        classes = (" ".join(map(str, best)) for best in (top.reference, top.fused))
        table.add_row(names[index % len(names)], *classes, _mark(top.passed))
    title = f"Top-5 classes: the same for {same} of {len(tops)}"
    note = (
        f"{ties} differ only between logits that are as close as the allowed error" if ties else ""
    )
    _print_table(console, title, table, note)
    return logits.passed and modules.passed and all(top.passed for top in tops)


def _training_agrees(console: Console, reference: nn.Module, fused: nn.Module, x: Tensor) -> bool:
    with _progress("comparing"):
        loss = compare.check_train(reference, fused, x, _target(x))
        modules, checks = compare.check_modules(fused, x)
    _print_checks(console, [loss, *checks], modules)
    return loss.passed and modules.passed


def _print_checks(console: Console, checks: list[Check], modules: VerifyReport) -> None:
    table = _table("", "in", "reference", "fused", "allowed", "")
    for check in checks:
        # Those of the whole network come first, and have another name.
        kind = f"module {check.kind}" if check.kind in KINDS else check.kind
        dtype = str(check.dtype).removeprefix("torch.")
        own = "-" if check.reference_error is None else f"{check.reference_error:.1e}"
        errors = (own, f"{check.error:.1e}", f"{check.allowed:.1e}")
        table.add_row(kind, dtype, *errors, _mark(check.passed))
    title = "Agreement: relative errors, of modules the one nearest to what is allowed"
    note = "where there is a -, fused against reference; else both against a wider run"
    _print_table(console, title, table, note)
    for entry in modules.entries:
        if not entry.passed:
            console.print(str(entry))


def _print_costs(
    console: Console,
    reference: nn.Module,
    fused: nn.Module,
    compiled: bool,
    repeats: int,
    x: Tensor,
) -> None:
    networks: dict[str, Any] = {"reference": reference, "fused": fused}
    if compiled:
        networks["compiled reference"] = torch.compile(reference)
        networks["compiled fused"] = torch.compile(fused)
    calls = {name: _call(network, x) for name, network in networks.items()}
    with _progress("measuring", total=(repeats + 1) * len(calls)) as advance:
        memory = {name: compare.peak_memory(calls[name]) for name in ("reference", "fused")}
        saved = {}
        if reference.training:
            for name in memory:
                saved[name] = compare.saved_for_backward(networks[name], x, _target(x))
        if compiled:
            with _blame("--compile", Exception):
                calls["compiled reference"]()
                calls["compiled fused"]()
        timings = compare.time_interleaved(calls, repeats, advance)
    columns = ["", "median ms", "20-80 %", "speed-up", "peak MiB"]
    table = _table(*columns, *(["saved MiB"] if saved else []))
    base = timings["reference"].median
    for name, timing in timings.items():
        table.add_row(
            name,
            f"{1e3 * timing.median:.1f}",
            f"{1e3 * timing.low:.1f}-{1e3 * timing.high:.1f}",
            f"{base / timing.median:.2f}x",
            *(f"{sizes[name] / 2**20:.1f}" for sizes in (memory, saved) if name in sizes),
        )
    for column in table.columns[1:]:
        column.justify = "right"
    title = f"Time of {repeats} calls each, in turn, and memory of the tensors in a call"
    note = "saved: what the forward keeps for the backward" if saved else ""
    _print_table(console, title, table, note)
    console.print()


def _call(network: nn.Module, x: Tensor) -> Callable[[], object]:
    if network.training:
        return lambda: compare.step(network, x, _target(x))
    return torch.no_grad()(lambda: network(x))


def _target(x: Tensor) -> Tensor:
    return torch.randint(_CLASSES, (len(x),), generator=torch.Generator().manual_seed(_SEED))


def _describe(x: Tensor) -> str:
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    layout = "channels_last" if nhwc else "contiguous"
    return f"{tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}, {layout}"


def _summary(report: FuseReport) -> str:
    kinds = sorted({entry.kind.rpartition(".")[2] for entry in report.fused})
    text = f"{len(report)} modules ({', '.join(kinds)})"
    for entry in report.left_alone:
        text += f"; left alone: {entry.name}, {entry.reason}"
    return text


def _console() -> Console:
    # Captured output has no width of its own: rich then takes 80 columns.
    return Console(markup=False, highlight=False, emoji=False)


def _facts() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _print_table(console: Console, title: str, table: Table, note: str = "") -> None:
    console.print()
    # Not the table's own title and caption, which wrap at its width instead of the screen's.
    console.print(title, style="bold")
    console.print(table)
    if note:
        console.print(note, style="dim")


def _mark(passed: bool) -> str:
    return "ok" if passed else "DIFFERS"


@contextlib.contextmanager
def _progress(text: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A bar on stderr while the block runs, where that is a terminal; yields what advances it."""
    console = Console(stderr=True)
    columns = (TextColumn(text), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def _blame(
    option: str, kind: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[None]:
    """Report an error of the block as the fault of ``option``, in one line, exit code 2."""
    try:
        yield
    except kind as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise _bad(option, lines[0]) from error


def _bad(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)


if __name__ == "__main__":
    main()
