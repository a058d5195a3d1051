"""``resnest-fused compare``: one network and its fused copy on the same weights and input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnest_fused.cli import environment, screen
from resnest_fused.cli.devices import Device, find_device
from resnest_fused.cli.errors import bad, blame

# Commands import what is heavy when they run, so that `resnest-fused --help` is quick.
if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from rich.console import Console
    from torch import Tensor, nn

    from resnest_fused import FuseReport, VerifyReport
    from resnest_fused.measure.agreement import Check
    from resnest_fused.measure.timing import Speedup
    from resnest_fused.models.registry import Preprocessing

_SEED = 0
_LISTED = 4  # the inputs whose top-5 is printed, of the batch

# Batch normalisation over two samples gives about +1 and -1 whatever they are, and turns rounding
# into large errors; with three it can come near that.
_TRAIN_BATCH = 4

_DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}


class _DType(str, Enum):
    fp32 = "fp32"
    fp64 = "fp64"
    bf16 = "bf16"
    fp16 = "fp16"
    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


class _Backend(str, Enum):
    auto = "auto"
    native = "native"
    triton = "triton"
    reference = "reference"


def run(
    model: Annotated[
        str,
        typer.Option(
            help="A name of `resnest-fused models`, official:NAME (package resnest) or timm:NAME.",
            metavar="NAME",
        ),
    ] = "resnest50",
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="A photo as input; repeat for several. Default: seeded random pictures.",
            metavar="FILE",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint of the model. Default: seeded random weights.", metavar="FILE"
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Batch size; images are repeated, with --train as random crops. "
            f"Default: the number of images; with --train at least {_TRAIN_BATCH}.",
        ),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Compare training steps, forward and backward.")
    ] = False,
    dtype: Annotated[
        _DType,
        typer.Option(
            help=f"Of weights and input: {', '.join(_DTYPES)}, or a long name such as bfloat16.",
            metavar="NAME",
        ),
    ] = _DType.fp32,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Weights and input in channels_last format.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time torch.compile of both as well.")
    ] = False,
    device: Device = None,
    backend: Annotated[
        _Backend,
        typer.Option(
            help=f"Of the fused network: {', '.join(name.value for name in _Backend)}.",
            metavar="NAME",
        ),
    ] = _Backend.auto,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed calls of each network.", metavar="N")
    ] = 10,
) -> None:
    """Run a network and its fused copy on the same weights and input.

    Prints how far they agree, the time of both and the memory they take.

    Exit code: 0 they agree, 1 they do not, 2 wrong arguments or files.
    """
    import torch

    import resnest_fused as rf
    from resnest_fused import models
    from resnest_fused.backends import choose
    from resnest_fused.models import images, registry
    from resnest_fused.models.random_norms import randomize_norms

    console = screen.make_console()
    place = find_device(device)
    statuses = rf.backends()
    status = {s.name: s for s in statuses}.get(backend.value)
    if status is not None and not status.available:
        raise bad("--backend", f"{status.name} cannot run: {status.reason}")
    with blame("--backend", (ValueError, RuntimeError)):
        chosen = choose(backend.value, torch.empty(0, device=place))
    with blame("--image"):
        pictures = [images.read_image(path) for path in image or []]
    size = batch or max(len(pictures), _TRAIN_BATCH if train else 1)
    if size < len(pictures):
        raise bad("--batch", f"must hold all {len(pictures)} images, got {size}")
    if train and size < _TRAIN_BATCH:
        raise bad("--batch", f"--train needs at least {_TRAIN_BATCH}, got {size}")
    with (
        blame("--model"),
        blame("--weights", models.CheckpointError),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(_SEED)
        # The other packages' models are plain as they are.
        plain: dict[str, Any] = {} if ":" in model else {"fused": False}
        reference = models.create(model, weights, **plain)
        preprocessing = registry.preprocessing(model, reference)
    if weights is None:
        randomize_norms(reference, preprocessing.size, _SEED)
    fused = copy.deepcopy(reference)
    report = rf.fuse(fused, backend=backend.value)
    if not report:
        raise bad("--model", f"{model} has no split attention that can be fused")

    x = _make_input(preprocessing, pictures, size, train)
    options: dict[str, Any] = {
        "device": place,
        "dtype": getattr(torch, _DTYPES.get(dtype.value, dtype.value)),
        "memory_format": torch.channels_last if channels_last else torch.contiguous_format,
    }
    x = x.to(**options)
    for network in (reference, fused):
        network.to(**options)
    target = _make_target(reference, x) if train else None
    for network in (reference, fused):
        network.train(train)

    facts = screen.make_facts()
    facts.add_row("model", f"{model}, {'training step' if train else 'eval'}")
    facts.add_row("weights", str(weights or "random: classes mean nothing, agreement does"))
    names = [path.name for path in image or []]
    facts.add_row("input", f"{', '.join(names) or 'random pictures'}: {_describe(x)}")
    facts.add_row("fused", _summary(report))
    settings = environment.active_settings(statuses)
    asked = backend.value == chosen or any(s.name == "RESNEST_FUSED_BACKEND" for s in settings)
    reason = ", as no fused one can run; see info"
    facts.add_row("backend", chosen + (reason if chosen == "reference" and not asked else ""))
    facts.add_row("device", _describe_device(place))
    for setting in settings:
        facts.add_row(setting.name, f"{setting.value}: {setting}")
    console.print(facts)

    with blame("--batch", torch.OutOfMemoryError):
        if target is not None:
            agreed = _training_agrees(console, reference, fused, x, target)
        else:
            agreed = _eval_agrees(console, reference, fused, x, names or ["random picture"])
        speedup = _print_costs(console, reference, fused, compiled, repeats, x, target)
    verdict = "The fused network agrees with the reference."
    if not agreed:
        verdict = "The fused network does NOT agree with the reference."
    console.print(verdict, style="bold green" if agreed else "bold red")
    console.print(_describe_speed(speedup, repeats))
    raise typer.Exit(0 if agreed else 1)


def _make_input(
    preprocessing: Preprocessing, pictures: list[Image], size: int, train: bool
) -> Tensor:
    import torch

    from resnest_fused.models import images

    if not pictures:
        # Another seed than that of the picture by which the random norms were set.
        return images.random_images(size, preprocessing.size, _SEED + 1)
    x = torch.stack([preprocessing.transform(picture) for picture in pictures])
    # Copies of one picture would leave batch normalisation nothing but rounding errors.
    return images.random_crops(x, size, _SEED) if train else x[torch.arange(size) % len(x)]


def _eval_agrees(
    console: Console, reference: nn.Module, fused: nn.Module, x: Tensor, names: list[str]
) -> bool:
    import torch

    import resnest_fused as rf
    from resnest_fused.measure import networks

    with screen.progress("comparing"), torch.no_grad():
        logits, tops = networks.check_eval(reference, fused, x)
        modules = rf.verify(fused, x)
    same = sum(top.reference == top.fused for top in tops)
    ties = sum(top.reference != top.fused and top.tied for top in tops)
    _print_checks(console, logits, modules)
    table = screen.make_table("input", "reference", "fused", "")
    for index, top in enumerate(tops[:_LISTED]):
        classes = (" ".join(map(str, best)) for best in (top.reference, top.fused))
        table.add_row(names[index % len(names)], *classes, screen.mark(top.passed))
    title = f"Top-5 classes: the same for {same} of {len(tops)}"
    note = (
        f"{ties} differ only between logits that are as close as the allowed error" if ties else ""
    )
    screen.print_table(console, title, table, note)
    return logits.passed and modules.passed and all(top.passed for top in tops)


def _training_agrees(
    console: Console, reference: nn.Module, fused: nn.Module, x: Tensor, target: Tensor
) -> bool:
    import resnest_fused as rf
    from resnest_fused.measure import networks

    with screen.progress("comparing"):
        loss = networks.check_train(reference, fused, x, target)
        modules = rf.verify(fused, x)
    _print_checks(console, loss, modules)
    return loss.passed and modules.passed


def _print_checks(console: Console, network: Check, modules: VerifyReport) -> None:
    """Print the network's check and, by kind and dtype, the modules' worst."""
    from resnest_fused.measure.agreement import worst

    groups: dict[tuple[str, torch.dtype], list[Check]] = {}
    for entry in modules.entries:
        for each in entry.checks:
            groups.setdefault((f"module {each.kind}", each.dtype), []).append(each)
    rows = [(network.kind, network), *((kind, worst(them)) for (kind, _), them in groups.items())]
    table = screen.make_table("", "in", "reference", "fused", "allowed", "")
    for kind, check in rows:
        dtype = str(check.dtype).removeprefix("torch.")
        own = "-" if check.reference_error is None else f"{check.reference_error:.1e}"
        errors = (own, f"{check.error:.1e}", f"{check.allowed:.1e}")
        table.add_row(kind, dtype, *errors, screen.mark(check.passed))
    title = "Agreement: relative errors, of modules the one nearest to what is allowed"
    note = "where there is a -, fused against reference; else both against a wider run"
    screen.print_table(console, title, table, note)
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
    target: Tensor | None,
) -> Speedup:
    """Print the time and memory of a call of each network; returns the fused one's speed-up."""
    import torch

    from resnest_fused.measure import memory
    from resnest_fused.measure.timing import Speedup, Timing, Work, take_turns

    networks: dict[str, Any] = {"reference": reference, "fused": fused}
    if compiled:
        networks["compiled reference"] = torch.compile(reference)
        networks["compiled fused"] = torch.compile(fused)
    calls = {name: _make_call(network, x, target) for name, network in networks.items()}
    on_gpu = x.device.type == "cuda"
    works = {name: Work(call, how="calls" if on_gpu else "clock") for name, call in calls.items()}
    with screen.progress("measuring", total=repeats * len(calls)) as advance:
        peak = {n: memory.peak_memory(calls[n], x.device) for n in ("reference", "fused")}
        saved = {}
        if target is not None:
            saved = {n: memory.saved_for_backward(networks[n], x, target) for n in peak}
        if compiled:
            with blame("--compile", Exception):
                calls["compiled reference"]()
                calls["compiled fused"]()
        # On a CPU no untimed run comes between, as a network is far larger than the caches.
        samples = take_turns(works, repeats, settle=on_gpu, advance=advance)
    base = samples["reference"]
    speedups = {name: Speedup.of(base, own) for name, own in samples.items()}
    columns = ["", "median ms", "20-80 %", "speed-up", "peak MiB"]
    table = screen.make_table(*columns, *(["saved MiB"] if saved else []))
    for name, own in samples.items():
        timing, speedup = Timing.of(own), speedups[name]
        table.add_row(
            name,
            f"{1e3 * timing.median:.1f}",
            f"{1e3 * timing.low:.1f}-{1e3 * timing.high:.1f}",
            "-" if own is base else f"{speedup.low:.2f}-{speedup.high:.2f}x",
            *(f"{sizes[name] / 2**20:.1f}" for sizes in (peak, saved) if name in sizes),
        )
    for column in table.columns[1:]:
        column.justify = "right"
    whose = "the CUDA allocator" if on_gpu else "the tensors"
    title = f"Time of {repeats} calls each, in turn, and memory of {whose} in a call"
    note = "speed-up: 20-80 % of the rounds"
    if saved:
        note += "; saved: what the forward keeps for the backward"
    screen.print_table(console, title, table, note)
    console.print()
    return speedups["fused"]


def _make_call(network: Any, x: Tensor, target: Tensor | None) -> Callable[[], object]:
    import torch

    from resnest_fused.measure import networks

    if target is not None:
        return lambda: networks.step(network, x, target)
    return torch.no_grad()(lambda: network(x))


def _make_target(reference: nn.Module, x: Tensor) -> Tensor:
    """Random classes of those that the network knows."""
    import torch

    with torch.no_grad():
        classes = reference.eval()(x[:1]).shape[1]
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(classes, (len(x),), generator=generator).to(x.device)


def _describe_speed(speedup: Speedup, rounds: int) -> str:
    """What can be said of the speed-up, and with which spread."""
    from resnest_fused.measure.timing import FEWEST_ROUNDS

    if rounds < FEWEST_ROUNDS:
        return f"Too few --repeats to tell speed from noise: {rounds}, at least {FEWEST_ROUNDS}."
    spread = f"{speedup.low:.2f}x to {speedup.high:.2f}x (20-80 % of {rounds} rounds)"
    if speedup.is_noise:
        return f"The speed-up cannot be told from noise: {spread}."
    if speedup.is_figure:
        return f"It is {speedup.median:.2f}x as fast: {spread}."
    verdict = "faster" if speedup.median > 1 else "slower"
    return f"It is {verdict}, but unevenly: {spread}."


def _describe(x: Tensor) -> str:
    import torch

    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    layout = "channels_last" if nhwc else "contiguous"
    return f"{tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}, {layout}"


def _describe_device(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return f"{device}, {torch.cuda.get_device_name(device)}, TF32 off"


def _summary(report: FuseReport) -> str:
    kinds = sorted({entry.kind.rpartition(".")[2] for entry in report.fused})
    text = f"{len(report)} modules ({', '.join(kinds)})"
    for entry in report.left_alone:
        text += f"; left alone: {entry.name}, {entry.reason}"
    return text
