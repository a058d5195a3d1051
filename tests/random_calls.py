"""Random calls of the functional form and of the modules on the CPU, each against a truth.

    python tests/random_calls.py --count 10000 --seed 0 --log calls.log

Calls of ``rf.split_attention`` are compared with the oracle, as in the tests (``cases.check``).
Calls of modules, with any children, are compared with the unfused modules in float64
(``rf.verify``): output, gradients and buffers. Each call also runs twice in memory filled with
different bytes, and must repeat to the bit. A failing call prints a line with the command that
repeats it alone.

Exit code: 0 none failed, 1 some did.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cases
import torch
from cases import DIFFERENTIABLE, DOUT_LAYOUTS, LAYOUTS, NORMS, PROLOGUES, Case, fill_memory
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from stand_ins import FrozenBatchNorm2d
from test_fuse import features
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused.backends import choose, native
from resnest_fused.fusing.peers import fused_class
from resnest_fused.layout import Layout
from resnest_fused.measure import agreement
from resnest_fused.measure.agreement import Call, Form

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Outcome(NamedTuple):
    """One call: its description, the properties that are counted, and what was wrong, or None."""

    text: str
    properties: list[str]
    problem: str | None


class Failure(AssertionError):
    """A call gave what it must not."""


# --- what is drawn


def _sizes(rng: random.Random) -> dict[str, int]:
    """Mostly small sizes: 3 in 100 are as large as a network's."""
    large = rng.random() < 0.03
    cardinality = rng.choice((1, 1, 1, 2, 3, 4))
    return {
        "batch": rng.choice((1, 2, 8, 17) if large else (0, 1, 1, 2, 3, 3, 4, 5, 7, 9)),
        "channels": cardinality * rng.choice((16, 24, 32) if large else (1, 2, 3, 5, 8, 13, 16)),
        "height": rng.randint(14, 32) if large else rng.randint(1, 11),
        "width": rng.randint(14, 32) if large else rng.randint(1, 19),
        "radix": rng.choice((1, 2, 2, 2, 3, 4, 5)),
        "cardinality": cardinality,
        "inter": cardinality * rng.choice((1, 2, 3, 4, 7, 8, 16)),
    }


def _subset(rng: random.Random, names: Any) -> list[str]:
    """All of them in half of the draws, otherwise any."""
    return [name for name in names if rng.random() < 0.6] if rng.random() < 0.5 else list(names)


def _case(rng: random.Random) -> Case:
    sizes = _sizes(rng)
    dtype = rng.choice(DTYPES)
    norm, prologue = rng.choice(NORMS), rng.choice(PROLOGUES)
    layout = rng.choice(list(LAYOUTS))
    # Batch statistics of two samples, of equal samples or of few pixels may be mere rounding. Only
    # modules' calls have them, because rf.verify draws again if rounding decides.
    if norm == "batch" and (sizes["batch"] == 2 or layout == "expanded_batch"):
        norm = "running"
    if prologue == "batch" and sizes["batch"] * sizes["height"] * sizes["width"] < 6:
        prologue = "running"
    return Case(
        **sizes,
        dtype=dtype,
        param_dtype=rng.choice((None, torch.float32)),
        layout=layout,
        dout_layout=rng.choice(list(DOUT_LAYOUTS)),
        bias=rng.random() < 0.8,
        norm=norm,
        affine=rng.random() < 0.8,
        prologue=prologue,
    )


# By name, from the number of features; None for no norm.
_NORM_LAYERS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda _: None,
    "identity": lambda _: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "not affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "untracked": lambda n: nn.BatchNorm2d(n, track_running_stats=False),
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "large eps": lambda n: nn.BatchNorm2d(n, eps=0.3, momentum=0.7),
    "sync": nn.SyncBatchNorm,
    "frozen": FrozenBatchNorm2d,
    "group": lambda n: nn.GroupNorm(1 if n % 2 else 2, n),
    "dropout": lambda n: nn.Sequential(nn.BatchNorm2d(n), nn.Dropout(0.3)),
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "SiLU": nn.SiLU,
    "LeakyReLU": nn.LeakyReLU,
    "Tanh": nn.Tanh,
}
_DROPS: dict[str, Callable[[], nn.Module]] = {
    "no drop": nn.Identity,
    "Hardtanh": nn.Hardtanh,
    "Dropout": lambda: nn.Dropout(0.2),
}


class _RSoftmax(nn.Module):
    """An r-softmax of no known class, so fused modules must call it."""

    def __init__(self, radix: int, cardinality: int) -> None:
        super().__init__()
        self.radix, self.cardinality = radix, cardinality

    def forward(self, logits: Tensor) -> Tensor:
        batch = len(logits)
        if self.radix == 1:
            return logits.sigmoid()
        grouped = logits.view(batch, self.cardinality, self.radix, -1)
        return grouped.softmax(2).transpose(1, 2).reshape(batch, -1)


class Peer(nn.Module):
    """Split attention whose every operation is a child, like timm's."""

    def __init__(self, plain: nn.Module, act0: nn.Module, act1: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.radix = plain.radix
        self.conv, self.bn0, self.drop, self.act0 = plain.conv, plain.bn0, drop, act0
        self.fc1, self.bn1, self.act1, self.fc2 = plain.fc1, plain.bn1, act1, plain.fc2
        self.bn0, self.bn1 = self.bn0 or nn.Identity(), self.bn1 or nn.Identity()
        self.rsoftmax = _RSoftmax(plain.radix, plain.cardinality)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act0(self.drop(self.bn0(self.conv(x))))
        splits = x.unflatten(1, (self.radix, -1))
        gap = splits.sum(1).mean((2, 3), keepdim=True)
        logits = self.fc2(self.act1(self.bn1(self.fc1(gap))))
        attention = self.rsoftmax(logits).view(len(x), self.radix, -1, 1, 1)
        return (attention.to(x.dtype) * splits).sum(1)


FusedPeer = fused_class(
    Peer,
    Layout(
        conv=("conv",),
        bn0=("bn0",),
        drop=("drop",),
        act0=("act0",),
        fc1=("fc1",),
        bn1=("bn1",),
        act1=("act1",),
        fc2=("fc2",),
        softmax=("rsoftmax",),
        radix=("radix",),
        cardinality=("rsoftmax", "cardinality"),
    ),
)


def _fuse(module: nn.Module) -> None:
    if type(module) is Peer:
        vars(module)["_unfused_class"], module.__class__ = Peer, FusedPeer
    else:
        assert rf.fuse(module)


def _module(rng: random.Random) -> tuple[nn.Module, Tensor, list[str]]:
    """A fused module in some state, an input for it, and what both are in words."""
    sizes = _sizes(rng)
    kind = rng.choice(("SplitAttention", "SplitAttentionConv2d", "Peer"))
    channels, radix, cardinality = (sizes[n] for n in ("channels", "radix", "cardinality"))
    options: dict[str, Any] = {
        "radix": radix,
        "cardinality": cardinality,
        "inter_channels": sizes["inter"],
        "norm_layer": None,
    }
    words = [kind]
    entering = channels * radix
    if kind == "SplitAttention":
        module: nn.Module = rf.SplitAttention(channels, **options)
    else:
        kernel = rng.choice((1, 3))
        conv = {"stride": rng.choice((1, 1, 2)), "padding": kernel // 2, "bias": rng.random() < 0.3}
        module = rf.SplitAttentionConv2d(entering, channels, kernel, **conv, **options)
        name = rng.choice(list(_NORM_LAYERS))
        module.bn0 = _NORM_LAYERS[name](entering)
        words.append(f"bn0 {name}")
    name = rng.choice(list(_NORM_LAYERS))
    module.bn1 = _NORM_LAYERS[name](sizes["inter"])
    words.append(f"bn1 {name}")
    if kind == "Peer":
        acts = [rng.choice(("ReLU", *_ACTIVATIONS)) for _ in range(2)]
        drop = rng.choice(("no drop", *_DROPS))
        module = Peer(module, *(_ACTIVATIONS[act]() for act in acts), _DROPS[drop]())
        words += [*acts, drop]
    if rng.random() < 0.2:
        module.fc1.register_parameter("bias", None)
        words.append("no fc1 bias")

    dtype = rng.choice(DTYPES)
    _randomise(module)
    module.to(dtype)
    training = rng.random() < 0.6
    module.train(training)
    words += [str(dtype).removeprefix("torch."), "train" if training else "eval"]
    for norm in ("bn0", "bn1"):
        child = module._modules.get(norm)
        if child is not None and rng.random() < 0.15:
            child.train(not training)
            words.append(f"{norm} {'eval' if training else 'train'}")
    wanted = _subset(rng, [name for name, _ in module.named_parameters()])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in wanted)
    if len(wanted) < len(list(module.parameters())):
        words.append(f"gradients of {'+'.join(wanted) or 'nothing'}")
    layout = rng.choice(list(LAYOUTS))
    shape = (sizes["batch"], entering, sizes["height"], sizes["width"])
    x = LAYOUTS[layout](features(*shape, seed=rng.getrandbits(30)).to(dtype))
    # Without an input gradient PyTorch's GroupNorm crashes on the CPU in channels_last (2.13).
    grouped = isinstance(module._modules.get("bn0"), nn.GroupNorm)
    x = x.detach().requires_grad_(rng.random() < 0.8 or grouped)
    words += [str(tuple(x.shape)), f"R{radix}K{cardinality}I{sizes['inter']}", layout]
    words += [] if x.requires_grad else ["no input gradient"]
    words += _hooks(rng, module)
    _fuse(module)
    return module, x, words


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Give every parameter and statistic a value of its own, with attention far from uniform."""
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        nn.init.normal_(parameter, std=(2 / fan_in) ** 0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.3)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)


def _hooks(rng: random.Random, module: nn.Module) -> list[str]:
    """Put hooks on some of the children, in a quarter of the draws."""
    if rng.random() < 0.75:
        return []
    words = []
    names = [name for name, child in module.named_children() if name != "rsoftmax"]
    for name in rng.sample(names, rng.randint(1, len(names))):
        child = module.get_submodule(name)
        kinds = {
            "hook": lambda m: m.register_forward_hook(lambda *_: None),
            "scaled": lambda m: m.register_forward_hook(lambda m, args, out: out * 1.5),
            "pre-hook": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] + 0.25,)),
        }
        # PyTorch forbids in-place changes of such a hook's output, which our module's ReLU makes.
        if type(module) is Peer or name not in ("conv", "bn0"):
            kinds["backward hook"] = lambda m: m.register_full_backward_hook(lambda *_: None)
        kind = rng.choice(list(kinds))
        kinds[kind](child)
        words.append(f"{kind} on {name}")
    return words


# --- what must hold


def _assert_repeats(run: Callable[[], dict[str, Tensor]]) -> None:
    results = []
    for byte in (0x00, 0xFE):  # zeros, and the largest numbers, or NaN in float16
        with fill_memory() as fill:
            fill(byte)
            results.append(run())
    for name, one in results[0].items():
        bits = [r.contiguous().flatten().view(torch.uint8) for r in (one, results[1][name])]
        if not torch.equal(*bits):
            raise Failure(f"{name} does not repeat to the bit")


def _run_function(rng: random.Random) -> tuple[list[str], Callable[[], None]]:
    case, wanted = _case(rng), _subset(rng, DIFFERENTIABLE)
    words = ["split_attention", *str(case).split("-")]
    words.append(f"gradients of {'+'.join(wanted) or 'nothing'}")

    def run() -> None:
        one_value = "more than 1 value per channel"
        if (case.batch == 1 and case.norm == "batch") or (
            case.batch * case.height * case.width == 1 and case.prologue == "batch"
        ):
            try:
                cases.draw_any(case).gradients(names=())
            except ValueError as error:
                if one_value in str(error):
                    return
                raise
            raise Failure("normalising one value raised nothing")
        call = cases.draw(case)
        names = [name for name in call.differentiable() if name in wanted]

        def results() -> dict[str, Tensor]:
            out, grads = call.gradients(names=names)
            return {"out": out, **grads}

        _assert_repeats(results)
        if case.batch == 0:
            for name, result in results().items():
                like = (0, case.channels, case.height, case.width)
                shape = like if name == "out" else call.tensor(name).shape
                if result.shape != shape or result.any():
                    raise Failure(f"{name} of an empty batch is {tuple(result.shape)}, {result}")
            return
        try:
            cases.check_calls([call], wanted)
        except AssertionError:
            # One draw can fail by bad luck, so the median of nine decides.
            cases.check(case, wanted)

    return words, run


def _run_module(rng: random.Random) -> tuple[list[str], Callable[[], None]]:
    module, x, words = _module(rng)
    autocast = x.dtype == torch.float32 and rng.random() < 0.25
    words += ["autocast"] if autocast else []

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                report = rf.verify(module, x)
            except (ValueError, RuntimeError) as error:
                unfused = copy.deepcopy(module)
                rf.unfuse(unfused)
                try:
                    unfused(x)
                except type(error):
                    return  # both refuse it
                raise
        if not report:
            raise Failure(str(report).replace("\n", " | "))
        form = Form("fused", module, contextlib.nullcontext)
        call = Call((x,), {}, autocast=torch.bfloat16 if autocast else None)
        out = agreement.run(form, call)["outputs"][""]
        call = call._replace(gradients=(torch.randn_like(out),))

        def results() -> dict[str, Tensor]:
            torch.manual_seed(0)
            found = agreement.run(form, call)
            return {f"{kind} {name}": t for kind in found for name, t in found[kind].items()}

        _assert_repeats(results)

    return words, run


def run_one(seed: int, index: int) -> Outcome:
    """Draw call number ``index`` and run it; the number of threads stays as it was."""
    rng = random.Random(f"{seed}/{index}")
    torch.manual_seed(rng.getrandbits(60))
    make = rng.choice((_run_function, _run_module))
    threads = rng.choice((1, 1, 2, 3))
    words, run = make(rng)
    words.append(f"{threads} threads")
    before, problem = torch.get_num_threads(), None
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            # A backward hook on a child whose input requires no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            run()
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        torch.set_num_threads(before)
    # Without sizes and sets of gradients, which hardly ever repeat.
    properties = [word for word in words if not re.match(r"[(\d]|R\d|gradients of", word)]
    return Outcome(", ".join(words), properties, problem)


def _outcomes(seed: int, indices: range, minutes: float) -> Iterator[tuple[int, Outcome]]:
    end = time.monotonic() + 60 * minutes
    for index in indices:
        if time.monotonic() > end:
            return
        yield index, run_one(seed, index)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", type=int, metavar="N", help="run call number N alone")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this many")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="a line for each call")
    options = parser.parse_args(arguments)
    if choose("auto", torch.empty(0)) != "native":
        raise SystemExit(f"the native kernels do not run here: {native.unavailable()}")
    one = options.only
    indices = range(options.count) if one is None else range(one, one + 1)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    columns = (TextColumn("calls"), MofNCompleteColumn(), TimeElapsedColumn())
    counts: Counter[str] = Counter()
    failures = done = 0
    with (
        options.log.open("w", buffering=1) as log,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):

        def tell(line: str) -> None:
            console.print(line)
            log.write(f"{line}\n")

        capability = native.build_info()["cpu_capability"]
        tell(f"resnest_fused {rf.__version__}, torch {torch.__version__}, {capability} kernels")
        task = progress.add_task("", total=len(indices))
        for index, outcome in _outcomes(options.seed, indices, options.minutes):
            done += 1
            counts.update(outcome.properties)
            log.write(f"{index}: {outcome.text}\n")
            if outcome.problem is not None:
                failures += 1
                command = f"python tests/random_calls.py --seed {options.seed} --only {index}"
                tell(f"FAILED {command}: {outcome.text}: {outcome.problem}")
            progress.advance(task)
        tell(f"{done} of {len(indices)} calls, seed {options.seed}: {failures} failed")
        tell(", ".join(f"{word} {number}" for word, number in sorted(counts.items())))
        tell(f"{time.process_time():.0f} s of CPU time")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
