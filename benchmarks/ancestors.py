"""Measures timm's networks and their fused modules, fused against eager and ``torch.compile``.

``python benchmarks/ancestors.py seresnet50 regnety_032`` prints a table of the networks;
``--stages`` one of their fused modules, of each size once. Times are of the wall clock. Each
contender has a process of its own, as compiled code brings other threads, and they take turns.

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

import timm
import torch
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused.measure.timing import FEWEST_ROUNDS, Speedup, Timing

_TOLERANCE = 1e-3
# One measurement of a small module lasts at least that long.
_BURST = 5e-3

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


def contend(pipe: Connection, name: str, form: str, args: argparse.Namespace) -> None:
    """One contender's process. It gets parts, whose results it sends, and requests for a time."""
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(args.train)
    torch.manual_seed(0)
    network = timm.create_model(name)
    if form == "fused":
        assert rf.fuse(network), f"{name}: nothing was fused"
    network.train(args.train)
    with suppress(EOFError):
        while True:
            part, shape = pipe.recv()
            module = network.get_submodule(part)
            called = torch.compile(module, dynamic=False) if form == "compile" else module
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            pipe.send(called(x).detach().numpy())
            step = step_of(called, x, args.train, args.stages)
            step()  # compiles the backward
            start = time.perf_counter()
            step()
            runs = 1 + int(_BURST / (time.perf_counter() - start)) if args.stages else 1
            pipe.send("ready")
            while pipe.recv():
                if args.stages:
                    step()  # caches are then as this contender leaves them
                start = time.perf_counter()
                for _ in range(runs):
                    step()
                pipe.send((time.perf_counter() - start) / runs)


def samples_of(
    pipes: dict[str, Connection], part: Part, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each contender for one part, an entry for each round."""
    expected = None
    for pipe in pipes.values():
        pipe.send(part)
    for form, pipe in pipes.items():
        found = torch.from_numpy(pipe.recv())
        expected = found if expected is None else expected
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error <= _TOLERANCE, f"{part}: {form} differs from eager by {error:.1e}"
    for pipe in pipes.values():
        assert pipe.recv() == "ready"
    samples: dict[str, list[float]] = {form: [] for form in pipes}
    rounds, end = 0 if args.prepare else FEWEST_ROUNDS, time.perf_counter() + args.seconds
    while len(samples[next(iter(pipes))]) < rounds or (rounds and time.perf_counter() < end):
        for form, pipe in pipes.items():
            pipe.send(True)
            samples[form].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    return samples


def rows(name: str, args: argparse.Namespace) -> Iterator[str]:
    """The lines of the table for one network."""
    network = timm.create_model(name)
    parts = parts_of(network, (args.batch, 3, args.side, args.side), args.stages)
    context = multiprocessing.get_context("spawn")
    forms = ["eager", "fused", *(["compile"] if args.compile else [])]
    if args.prepare:
        forms = ["compile"]
    pipes, processes = {}, []
    for form in forms:
        pipes[form], other = context.Pipe()
        processes.append(context.Process(target=contend, args=(other, name, form, args)))
        processes[-1].start()
        other.close()
    for part in parts:
        samples = samples_of(pipes, part, args)
        if args.prepare:
            continue
        shape = "x".join(map(str, part[1]))
        cells = [f"{name} {part[0]}".strip(), "train" if args.train else "eval", shape]
        cells.append(f"{Timing.of(samples['eager']).median * 1e3:.3g}")
        for base in forms[::2]:
            ratio = Speedup.of(samples[base], samples["fused"])
            noise = ", noise" if ratio.is_noise else ""
            cells.append(f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}{noise})")
        yield f"| {' | '.join([*cells, str(len(samples['eager']))])} |"
    for pipe in pipes.values():
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
    compiled = ["fused over torch.compile"] if args.compile else []
    titles = ["", "mode", "input", "eager, ms", "fused over eager", *compiled, "rounds"]
    print(f"torch {torch.__version__}, timm {timm.__version__}, {args.threads} threads\n")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for name in args.networks:
        for row in rows(name, args):
            print(row, flush=True)


if __name__ == "__main__":
    main()
