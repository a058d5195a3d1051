"""Measures whole timm networks, and each of their stages, fused, against eager and the compiler.

``python benchmarks/ancestors.py seresnet50 regnety_032`` prints a table of the networks;
``--stages`` one of their fused modules, of each size once. Times are of the wall clock.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import timm
import torch
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused.measure.timing import Speedup, Timing, Work, take_turns

_TOLERANCE = 1e-3


def step_of(module: nn.Module, x: Tensor, train: bool) -> Callable[[], object]:
    """A call, and in training its backward to the parameters and to ``x``."""
    if not train:
        return lambda: module(x)
    x = x.detach().requires_grad_()
    inputs = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x).sum(), inputs)


def stages(eager: nn.Module, fused: nn.Module, side: int, batch: int) -> Iterator[tuple]:
    """Of each fused module's class and input size the first: name, both forms, and an input."""
    found: dict[object, tuple[str, tuple[int, ...]]] = {}
    handles = []
    for entry in rf.fuse(fused).fused:

        def note(module: nn.Module, args: tuple[Tensor], name: str = entry.name) -> None:
            shape = tuple(args[0].shape[1:])
            found.setdefault((type(module), shape), (name, (batch, *shape)))

        module = fused.get_submodule(entry.name)
        handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        fused.eval()(torch.randn(1, 3, side, side))
    for handle in handles:
        handle.remove()
    for name, shape in found.values():
        x = torch.randn(shape)
        yield name, eager.get_submodule(name), fused.get_submodule(name), x


def row(name: str, eager: nn.Module, fused: nn.Module, x: Tensor, args: argparse.Namespace) -> str:
    """One line of the table."""
    forms = {"eager": eager, "fused": fused}
    if args.compile:
        forms["compile"] = torch.compile(copy.deepcopy(eager))
    steps = {}
    with torch.set_grad_enabled(args.train):
        for form, module in forms.items():
            module.train(args.train)
            found = module(x)
            if form == "eager":
                expected = found
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            assert error <= _TOLERANCE, f"{name}: {form} differs from eager by {error:.1e}"
            steps[form] = Work(step_of(module, x, args.train))
        samples = take_turns(steps, 6, seconds=args.seconds, burst=1e-3, settle=args.stages)
    cells = [name, "x".join(map(str, x.shape)), f"{Timing.of(samples['eager']).median * 1e3:.3g}"]
    for base in list(forms)[::2]:
        ratio = Speedup.of(samples[base], samples["fused"])
        noise = " (noise)" if ratio.is_noise else ""
        cells.append(f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f}){noise}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", help="names of timm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--train", action="store_true", help="training steps; else inference")
    parser.add_argument("--stages", action="store_true", help="the fused modules of each size")
    parser.add_argument("--compile", action="store_true", help="against torch.compile, too")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each line of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {'train' if args.train else 'eval'}")
    print("| | input | eager, ms | fused over eager | over torch.compile |\n|---|---|---|---|---|")
    for name in args.networks:
        torch.manual_seed(0)
        eager = timm.create_model(name).train(args.train)
        fused = copy.deepcopy(eager)
        assert rf.fuse(fused)
        if args.stages:
            for part in stages(eager, copy.deepcopy(eager), args.side, args.batch):
                print(row(f"{name}: {part[0]}", *part[1:], args), flush=True)
        else:
            x = torch.randn(args.batch, 3, args.side, args.side)
            print(row(name, eager, fused, x, args), flush=True)


if __name__ == "__main__":
    main()
