"""Measures timm's networks and their fused modules, fused against eager and ``torch.compile``.

With ``--compile`` there are two contenders more: compiled, and first fused and then compiled.

``python benchmarks/ancestors.py seresnet50 regnety_032`` prints a table of the networks;
``--stages`` one of their fused modules, of each size once. Times are of the wall clock, and all
contenders take turns. Compiled code has a process of its own, as it brings other threads; the other
two share one, as the same network may differ by 5% from process to process.

A network's compilation takes minutes. Inductor keeps its result, so that the run that measures, on
a machine that does nothing else, begins sooner after one with ``--prepare``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import timm
import torch
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused.measure.timing import FEWEST_ROUNDS, Speedup, Timing

_TOLERANCE = 1e-3
# One measurement of a small module lasts at least that long.
_BURST = 5e-3

# The contenders, and which is compared with which.
_EAGER, _FUSED, _COMPILED, _BOTH = "eager", "fused", "torch.compile", "fused and compiled"
_RATIOS = (_FUSED, _EAGER), (_FUSED, _COMPILED), (_BOTH, _COMPILED)

# The name of a module, "" for the whole network, and the shape of its input.
Part = tuple[str, tuple[int, ...]]


def parts_of(network: nn.Module, images: tuple[int, ...], stages: bool) -> list[Part]:
    """The whole network, or of each fused module's class and input size the first."""
    if not stages:
        return [("", images)]
    found: dict[object, Part] = {}
    handles = []
    for entry in rf.fuse(network).fused:

        def note(module: nn.Module, args: tuple[Tensor], name: str = entry.name) -> None:
            shape = tuple(args[0].shape)
            found.setdefault((type(module), shape), (name, shape))

        module = network.get_submodule(entry.name)
        handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        network.eval()(torch.randn(images))
    for handle in handles:
        handle.remove()
    return list(found.values())


def step_of(module: nn.Module, x: Tensor, train: bool, stage: bool) -> Callable[[], object]:
    """A call, and in training its backward to the parameters and, in a stage, to its input."""
    if not train:
        return lambda: module(x)
    inputs = [*module.parameters(), *([x.requires_grad_()] if stage else [])]
    return lambda: torch.autograd.grad(module(x).sum(), inputs)


def contend(pipe: Connection, name: str, forms: list[str], args: argparse.Namespace) -> None:
    """The process of some contenders: gets parts, sends results, then seconds as they are asked."""
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(args.train)
    networks = {}
    for form in forms:
        torch.manual_seed(0)
        networks[form] = timm.create_model(name).train(args.train)
        if form in (_FUSED, _BOTH):
            assert rf.fuse(networks[form]), f"{name}: nothing was fused"
    with suppress(EOFError):
        while True:
            part, shape = pipe.recv()
            steps = {}
            for form, network in networks.items():
                module = network.get_submodule(part)
                if form in (_COMPILED, _BOTH):
                    called: Any = torch.compile(module, dynamic=False)
                else:
                    called = module
                x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
                torch.manual_seed(2)  # of dropout
                pipe.send(called(x).detach().numpy())
                steps[form] = step_of(called, x, args.train, args.stages)
                steps[form]()  # compiles the backward
            start = time.perf_counter()
            steps[forms[0]]()
            runs = 1 + int(_BURST / (time.perf_counter() - start)) if args.stages else 1
            pipe.send("ready")
            while form := pipe.recv():
                if args.stages:
                    steps[form]()  # caches are then as this contender leaves them
                start = time.perf_counter()
                for _ in range(runs):
                    steps[form]()
                pipe.send((time.perf_counter() - start) / runs)


def samples_of(
    pipes: dict[str, Connection], part: Part, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each contender for one part, an entry for each round."""
    expected = None
    processes = list(dict.fromkeys(pipes.values()))
    for pipe in processes:
        pipe.send(part)
    for form, pipe in pipes.items():
        found = torch.from_numpy(pipe.recv())
        expected = found if expected is None else expected
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error <= _TOLERANCE, f"{part}: {form} differs from eager by {error:.1e}"
    for pipe in processes:
        assert pipe.recv() == "ready"
    samples: dict[str, list[float]] = {form: [] for form in pipes}
    rounds, end = 0 if args.prepare else FEWEST_ROUNDS, time.perf_counter() + args.seconds
    while rounds > 0 or (time.perf_counter() < end and not args.prepare):
        for form, pipe in pipes.items():
            pipe.send(form)
            samples[form].append(pipe.recv())
        rounds -= 1
    for pipe in processes:
        pipe.send("")
    return samples


def rows(name: str, args: argparse.Namespace) -> Iterator[str]:
    """The lines of the table for one network."""
    network = timm.create_model(name)
    parts = parts_of(network, (args.batch, 3, args.side, args.side), args.stages)
    context = multiprocessing.get_context("spawn")
    groups = [] if args.prepare else [[_EAGER, _FUSED]]
    groups += [[_COMPILED, _BOTH]] if args.compile or args.prepare else []
    pipes, processes = {}, []
    for forms in groups:
        pipe, other = context.Pipe()
        pipes |= dict.fromkeys(forms, pipe)
        processes.append(
            context.Process(target=contend, args=(other, name, forms, args), daemon=True)
        )
        processes[-1].start()
        other.close()
    for part in parts:
        samples = samples_of(pipes, part, args)
        if args.prepare:
            continue
        shape = "x".join(map(str, part[1]))
        cells = [f"{name} {part[0]}".strip(), "train" if args.train else "eval", shape]
        cells.append(f"{Timing.of(samples[_EAGER]).median * 1e3:.3g}")
        for form, base in _RATIOS[: len(pipes) - 1]:
            ratio = Speedup.of(samples[base], samples[form])
            noise = ", noise" if ratio.is_noise else ""
            cells.append(f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}{noise})")
        yield f"| {' | '.join([*cells, str(len(samples[_EAGER]))])} |"
    for pipe in set(pipes.values()):
        pipe.close()
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", help="names of timm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--train", action="store_true", help="training steps; else inference")
    parser.add_argument("--stages", action="store_true", help="the fused modules of each size")
    parser.add_argument("--compile", action="store_true", help="against torch.compile, too")
    parser.add_argument("--prepare", action="store_true", help="compile and measure nothing")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each line of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    ratios = [f"{form} over {base}" for form, base in (_RATIOS if args.compile else _RATIOS[:1])]
    titles = ["", "mode", "input", "eager, ms", *ratios, "rounds"]
    print(f"torch {torch.__version__}, timm {timm.__version__}, {args.threads} threads\n")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for name in args.networks:
        for row in rows(name, args):
            print(row, flush=True)


if __name__ == "__main__":
    main()
