"""Times the kernels on a GPU beside device copies, eager PyTorch and torch.compile.

    python benchmarks/gpu.py --seconds 120 --out gpu.json

``tests/gpu.sh`` builds the package and runs this. The most important comes first; what the time
does not suffice for is named. ``--device cpu --quick`` goes through all of it on a machine without
a GPU, in small sizes and without graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import gc
import importlib
import importlib.util
import itertools
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_summary
import torch
from capture import prepare
from contenders import check, exact_step, make_module, make_step, random_maps
from grid import DTYPES, STAGES, Case
from torch import Tensor, nn

import resnest_fused as rf
from resnest_fused.measure import agreement
from resnest_fused.measure.networks import step as train_step
from resnest_fused.measure.timing import Timing, take_turns
from resnest_fused.ops import (
    FcArguments,
    MapArguments,
    NormArguments,
    SavedArguments,
    TrainResults,
)

OPS = {"native": torch.ops.resnest_fused, "triton": torch.ops.resnest_fused_triton}
CONTENDERS = ("fused", "eager")
# Later, as Triton compiles for seconds at each case.
WITH_TRITON = ("fused", "triton")
LAYOUTS = ("channels_last", "NCHW")
# Below this many bytes a call's kernels may take less than its way through Python: it is replayed.
GRAPH_BYTES = 2e9
MAX_SETS = 128
# What is timed at once lasts as long, far above an event's resolution and its own cost.
BURST_S = 2e-3
ROUNDS = 15
NETWORK_ROUNDS = 7
# Bound on the relative difference of logits in bfloat16, there to notice a wrong network.
NETWORK_TOLERANCE = 0.2
# The compiler rounds to 16 bits between its kernels, which the fused ones do not.
COMPILED_SLACK = 4

Step = Callable[[], object]


def _of_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name)


# Networks of other packages, by the package; and what of torch.compile's modes is timed.
PEERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "official": ("resnest", lambda: importlib.import_module("resnest.torch").resnest50()),
    "timm resnest50d": ("timm", _of_timm("resnest50d")),
    "timm resnet50d": ("timm", _of_timm("resnet50d")),
}
COMPILER_MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class Bench:
    """Measures, and keeps what it measured.

    ``backend`` is that of the fused modules; ``has_triton`` says that beside the native one
    Triton's takes part too.
    """

    def __init__(self, device: torch.device, quick: bool, backend: str) -> None:
        self.device, self.quick, self.backend = device, quick, backend
        available = {status.name for status in rf.backends() if status.available}
        self.has_triton = backend == "native" and "triton" in available
        self.rows: list[dict[str, Any]] = []
        self.copy_bytes_per_s: float = math.nan
        self.launch_s: float | None = None
        self.l2_bytes = 1 << 20
        if device.type == "cuda":
            self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size

    def time(
        self,
        what: str,
        case: object,
        contenders: Mapping[str, Sequence[Step]],
        *,
        floor_bytes: Mapping[str, int],
        graph: bool = False,
        rounds: int = ROUNDS,
        facts: Mapping[str, object],
    ) -> None:
        """A row for each contender, whose steps are calls with different inputs."""
        works = {}
        for name, steps in contenders.items():
            try:
                works[name] = prepare(steps, self.device, graph)
            except (RuntimeError, ValueError) as error:
                if not graph:
                    raise
                print(f"  {name} cannot be captured: {error}".partition("\n")[0], flush=True)
                works[name] = prepare(steps, self.device, graph=False)
        samples = take_turns(works, 2 if self.quick else rounds, burst=BURST_S, settle=True)
        for name, seconds in samples.items():
            timing = Timing.of(seconds)
            moved = floor_bytes.get(name)
            rate = moved / timing.median if moved else None
            self.rows.append(
                {
                    "what": what,
                    "case": str(case),
                    "contender": name,
                    "how": works[name].how,
                    "input_sets": works[name].calls,
                    "median_us": timing.median * 1e6,
                    "p20_us": timing.low * 1e6,
                    "p80_us": timing.high * 1e6,
                    "floor_bytes": moved,
                    "of_copy": rate / self.copy_bytes_per_s if rate else None,
                    **facts,
                }
            )

    def sets_for(self, moved: int) -> int:
        """Input sets of a call that moves so many bytes: together they are too large for L2."""
        return min(max(math.ceil(2.5 * self.l2_bytes / moved), 1), 2 if self.quick else MAX_SETS)

    def copies(self) -> None:
        """``tensor.copy_``, bytes read and written; the largest is what all is compared with."""
        for megabytes in (1, 2) if self.quick else (16, 64, 256, 1024, 2048):
            source = torch.rand(megabytes << 18, device=self.device)
            target = torch.empty_like(source)
            moved = 2 * source.nbytes
            steps = {"copy": [lambda to=target, source=source: to.copy_(source)]}
            floors = {"copy": moved}
            self.time("copy", f"{2 * megabytes} MiB moved", steps, floor_bytes=floors, facts={})
            self.copy_bytes_per_s = moved / self.rows[-1]["median_us"] * 1e6
        for row in self.rows:
            row["of_copy"] = row["floor_bytes"] / row["median_us"] * 1e6 / self.copy_bytes_per_s

    def launch(self) -> None:
        """What a launch takes in a graph with next to no work: one element, added to."""
        element = torch.zeros(1, device=self.device)
        steps = {"launch": [lambda: element.add_(1)] * (2 if self.quick else 100)}
        self.time("launch", "one element", steps, floor_bytes={}, graph=True, facts={})
        self.launch_s = self.rows[-1]["median_us"] / 1e6

    def case(
        self,
        case: Case,
        names: Sequence[str],
        what: str | None = None,
        *,
        amp: bool = False,
        graph: bool = True,
    ) -> None:
        """The contenders of a case; checks the results of each but eager's first.

        With ``amp`` parameters are in float32 and calls under autocast, as users train. Without
        ``graph`` a call has its way through Python in its time.
        """
        torch.manual_seed(0)
        torch.compiler.reset()
        graph = graph and case.floor_bytes < GRAPH_BYTES
        with torch.set_grad_enabled(case.train):
            eager, fused, sets = self._modules_and_maps(case)
            if amp:
                eager, fused = eager.float(), fused.float()
            modules = {"eager": eager, "fused": fused}
            if "triton" in names:
                modules["triton"] = copy.deepcopy(fused)
                modules["triton"].backend = "triton"
            if "compile" in names:
                modules["compile"] = torch.compile(copy.deepcopy(eager), dynamic=False)
            contenders = {
                name: [make_step(modules[name], *maps) for maps in sets] for name in names
            }
            if amp:
                dtype = DTYPES[case.dtype]
                contenders = {
                    name: [self._autocast(step, dtype) for step in steps]
                    for name, steps in contenders.items()
                }
            exact = exact_step(eager, *sets[0])()
            for name in names:
                if name != "eager":
                    slack = COMPILED_SLACK if name == "compile" else 1
                    check(case, contenders[name][0](), exact, name, slack)
            del exact
            self.time(
                what or ("train" if case.train else "eval"),
                case,
                contenders,
                floor_bytes=dict.fromkeys(names, case.floor_bytes),
                graph=graph,
                facts=_facts(case),
            )

    def _autocast(self, step: Callable[[], Any], dtype: torch.dtype) -> Callable[[], Any]:
        def under() -> Any:
            with torch.autocast(self.device.type, dtype):
                return step()

        return under

    def _modules_and_maps(
        self, case: Case
    ) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
        count = self.sets_for((case.radix + 1) * case.floor_bytes // case.floor_units)
        with self.device:
            eager, fused = make_module(case, fused=False), make_module(case, fused=True)
            fused.load_state_dict(eager.state_dict())
            fused.backend = self.backend
            return eager, fused, [random_maps(case) for _ in range(count)]

    def compile(self, case: Case) -> None:
        """Only compiles, to fill the compiler's cache on disk."""
        torch.compiler.reset()
        with torch.set_grad_enabled(case.train), self.device:
            x, dout = random_maps(case)
            compiled = torch.compile(make_module(case, fused=False), dynamic=False)
            make_step(compiled, x, dout)()

    @torch.no_grad()
    def phases(self, case: Case, *others: str) -> None:
        """Each op alone, of the backend and of others, at the bytes that it must move."""
        torch.manual_seed(0)
        _, module, sets = self._modules_and_maps(case)
        calls = [
            {
                name if backend == self.backend else f"{backend} {name}": phase
                for backend in (self.backend, *others)
                for name, phase in _phases(case, module, *maps, OPS[backend]).items()
            }
            for maps in sets
        ]
        unit = case.floor_bytes // case.floor_units
        contenders = {name: [steps[name][1] for steps in calls] for name in calls[0]}
        floors = {name: units * unit for name, (units, _) in calls[0].items()}
        graph = case.floor_bytes < GRAPH_BYTES
        self.time("op", case, contenders, floor_bytes=floors, graph=graph, facts=_facts(case))

    def network(self, batch: int, train: bool, layout: str, names: Sequence[str]) -> None:
        """ResNeSt-50 in bfloat16: its parameters in inference, under autocast in training.

        ``names`` are of what stands beside eager and the fused one. Those of ``PEERS`` are networks
        of other packages with weights of their own; one that is not installed is left out.
        """
        torch.manual_seed(0)
        torch.compiler.reset()
        side = 64 if self.quick else 224
        memory_format = (
            torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )
        dtype = torch.float32 if train else torch.bfloat16
        with self.device:
            eager = rf.models.create("resnest50", fused=False)
            x = torch.randn(batch, 3, side, side, dtype=dtype)
            x = x.contiguous(memory_format=memory_format)
            target = torch.randint(1000, (batch,))

        def placed(network: nn.Module) -> nn.Module:
            return network.to(self.device, dtype, memory_format=memory_format).train(train)

        networks = {"eager": placed(eager)}
        for name in ("fused", *names):
            if name in PEERS:
                package, create = PEERS[name]
                if importlib.util.find_spec(package) is not None:
                    networks[name] = placed(create())
                else:
                    print(f"  {name} is left out: {package} is not installed", flush=True)
            elif name in COMPILER_MODES:
                networks[name] = torch.compile(
                    copy.deepcopy(eager), dynamic=False, mode=COMPILER_MODES[name]
                )
            else:
                networks[name] = copy.deepcopy(eager)
                rf.fuse(networks[name], backend=self.backend, fold=name == "folded")

        def step(network: nn.Module) -> Tensor:
            if not train:
                return network(x)
            with torch.autocast(self.device.type, torch.bfloat16):
                return train_step(network, x, target)

        steps = {
            name: [lambda network=network: step(network)] for name, network in networks.items()
        }
        with torch.set_grad_enabled(train):
            expected = step(networks["eager"])
            peaks = {}
            for name, network in networks.items():
                result = step(network)  # compiles
                if name not in PEERS:
                    error = agreement.relative_error(result, expected, order=2)
                    assert error <= NETWORK_TOLERANCE, f"{name} differs from eager by {error:.1e}"
                del result
                peaks[name] = self._peak_bytes(steps[name][0])
            first = len(self.rows)
            mode = "train step" if train else "inference"
            self.time(
                "network",
                f"ResNeSt-50 {mode} bf16 {layout} B={batch}",
                steps,
                floor_bytes={},
                graph=batch == 1 and not names,
                rounds=NETWORK_ROUNDS,
                facts={"train": train, "batch": batch},
            )
            for row in self.rows[first:]:
                row["images_per_s"] = batch / row["median_us"] * 1e6
                row["peak_bytes"] = peaks[row["contender"]]

    def _peak_bytes(self, step: Step) -> int | None:
        """The most memory that a call takes beside what is there before it."""
        if self.device.type != "cuda":
            return None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        return torch.cuda.max_memory_allocated(self.device) - before

    def once(self) -> None:
        """Each case's evaluation and training step, for a profiler to see the kernels of."""
        for case in itertools.chain(*cases(self.quick)):
            with torch.set_grad_enabled(case.train), self.device:
                module = make_module(case, fused=True)
                module.backend = self.backend
                make_step(module, *random_maps(case))()


def _facts(case: Case) -> dict[str, object]:
    return {
        "shape": case.shape,
        "form": case.form,
        "train": case.train,
        "dtype": case.dtype,
        "layout": case.layout,
        "radix": case.radix,
        "batch": case.batch,
    }


def _phases(
    case: Case, module: nn.Module, x: Tensor, dout: Tensor, ops: Any
) -> dict[str, tuple[int, Step]]:
    """Each op of the case with the units of out that it must move, reading each map once."""
    radix, bn0, bn1 = case.radix, case.form == "after conv", module.bn1
    m = MapArguments(x, bn0, radix)
    norm0 = NormArguments(None, None, None, None, 0.0, False)
    if bn0:
        norm0 = norm0._replace(
            weight=module.bn0.weight, bias=module.bn0.bias, eps=module.bn0.eps, batch_stats=True
        )
    fc1, fc2 = module.fc1, module.fc2
    fcs = FcArguments(fc1.weight, fc1.bias, fc2.weight, fc2.bias, 1)
    norm1 = NormArguments(bn1.weight, bn1.bias, None, None, bn1.eps, True)
    running1 = NormArguments(*norm1[:2], bn1.running_mean, bn1.running_var, bn1.eps, False)

    def train() -> tuple[Tensor, ...]:
        return ops.split_attention_train(*m, *norm0, *fcs, *norm1)

    results = TrainResults._make(train())
    saved = SavedArguments(results.gap, results.hidden, results.attention)
    of_batch0 = norm0._replace(mean=results.bn0_mean, var=results.bn0_var) if bn0 else norm0
    of_batch1 = norm1._replace(mean=results.bn1_mean, var=results.bn1_var)
    given0 = of_batch0._replace(batch_stats=False)
    dgap = torch.randn_like(saved.gap)
    means = [torch.randn_like(results.bn0_mean) if bn0 else None for _ in range(2)]
    needed = [True, bn0, bn0, *[True] * 6]

    def backward() -> tuple[Tensor, ...]:
        return ops.split_attention_backward(dout, *m, *of_batch0, *fcs, *of_batch1, *saved, needed)

    def evaluate() -> Tensor:
        return ops.split_attention(*m, *given0, *fcs, *running1)

    def recombine_backward() -> Tensor:
        return ops.recombine_backward(dout, *m, *given0, saved.attention, dgap, *means)

    phases: dict[str, tuple[int, Step]] = {
        "pool": (radix, lambda: ops.pool(*m, *given0)),
        "recombine": (radix + 1, lambda: ops.recombine(*m, *given0, saved.attention)),
        "eval": (radix + 1, evaluate),
        "pool_backward": (radix + 1, lambda: ops.pool_backward(dout, *m, *given0)),
        "recombine_backward": (
            # Without a bn0 dx is made of dout alone.
            2 * radix + 1 if bn0 else radix + 1,
            recombine_backward,
        ),
        "train": ((3 if bn0 else 2) * radix + 1, train),
        "backward": ((3 if bn0 else 2) * radix + 2, backward),
    }
    if bn0:
        phases["batch_statistics"] = (radix, lambda: ops.batch_statistics(x))
    return phases


def cases(quick: bool) -> tuple[list[Case], list[Case]]:
    """All after a convolution in bfloat16 at a large batch: in eval, and in training."""
    stages = ((8, 6), (16, 3)) if quick else STAGES
    batch = 3 if quick else 256
    evals = [
        Case(*stage, batch, False, "bf16", layout, form="after conv")
        for layout in LAYOUTS
        for stage in stages
    ]
    return evals, [replace(case, train=True) for case in evals]


def compiled_cases(quick: bool) -> list[Case]:
    """The few that torch.compile takes part in, as each takes it seconds."""
    evals, trains = cases(quick)
    half = len(evals) // 2  # where NCHW begins
    picked = [evals[0], trains[0], evals[half], trains[half], evals[half - 1], trains[half - 1]]
    return [*picked, replace(evals[0], form="attention")]


def plan(quick: bool, has_triton: bool) -> Iterator[tuple[str, Callable[[Bench], None]]]:
    """What to measure, the most important first."""
    evals, trains = cases(quick)
    small, middle = (1, 2) if quick else (1, 32)
    large = evals[0].batch

    def of(case: Case, names: Sequence[str], what: str | None = None) -> Any:
        return str(case), lambda bench: bench.case(case, names, what)

    def network(batch: int, train: bool, layout: str, *names: str) -> Any:
        mode = "train" if train else "inference"
        label = " and ".join((f"ResNeSt-50 {mode} {layout} B={batch}", *names))
        size = 2 if quick else batch
        names = names or (() if train else ("folded",))
        return label, lambda bench: bench.network(size, train, layout, names)

    def amp(case: Case) -> Any:
        def run(bench: Bench) -> None:
            bench.case(case, CONTENDERS, "amp", amp=True)

        return f"{case} under autocast", run

    def calls(case: Case) -> Any:
        def run(bench: Bench) -> None:
            bench.case(case, CONTENDERS, "calls", graph=False)

        return f"{case} without a graph", run

    def ops(case: Case, *others: str) -> Any:
        label = " and ".join((f"ops of {case}", *others))
        return label, lambda bench: bench.phases(case, *others)

    yield "copies", lambda bench: bench.copies()
    yield "a launch", lambda bench: bench.launch()
    yield from (of(case, CONTENDERS) for case in evals)
    yield from (of(case, CONTENDERS) for case in trains)
    yield from (of(replace(case, batch=small), CONTENDERS) for case in evals)
    for case in trains:
        yield ops(case)
    yield network(128, False, "channels_last")
    yield network(64, True, "channels_last")
    yield network(1, False, "channels_last")
    # What users run: parameters in float32, and small calls that wait for Python.
    yield from (amp(case) for case in trains)
    for case in (evals[0], evals[-1]):
        yield calls(replace(case, batch=small))
        yield calls(replace(case, batch=2, train=True))
    for case in compiled_cases(quick):
        label, run = of(case, ("fused", "compile"), "compile")
        yield f"torch.compile of {label}", run
    for train in (False, True):
        yield network(64, train, "channels_last", *PEERS)
        yield network(64, train, "channels_last", *COMPILER_MODES)
    if has_triton:
        yield from (of(case, WITH_TRITON) for case in evals)
        yield from (ops(case, "triton") for case in trains)
        yield from (of(case, WITH_TRITON) for case in trains)
    plain = [replace(case, form="attention") for case in evals]
    yield from (of(case, CONTENDERS) for case in plain)
    yield from (of(replace(case, train=True), CONTENDERS) for case in plain)
    for radix in (4, 1):
        for case in (evals[0], plain[0]):
            other = replace(case, radix=radix)
            yield from (of(other, CONTENDERS), of(replace(other, train=True), CONTENDERS))
    yield from (of(replace(case, batch=middle), CONTENDERS) for case in evals)
    yield from (of(replace(case, batch=middle), CONTENDERS) for case in trains)
    yield ops(replace(plain[0], train=True))
    for batch in (large, small, middle):
        yield from (of(replace(case, batch=batch, dtype="fp32"), CONTENDERS) for case in evals)
    yield from (of(replace(case, dtype="fp32"), CONTENDERS) for case in trains)
    yield network(128, True, "channels_last")
    yield network(128, False, "NCHW")
    yield network(64, True, "NCHW")


def _first_line(*command: str) -> str:
    """Of what a command prints; "unknown" where it cannot tell."""
    if shutil.which(command[0]) is None:
        return "unknown"
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    lines = run.stdout.splitlines() if run.returncode == 0 else []
    return lines[0].strip() if lines else "unknown"


def _machine(device: torch.device) -> dict[str, object]:
    gpu = device.type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or "CPU",
        "driver": _first_line(*query) if gpu else None,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "resnest_fused": rf.__version__,
        "backends": {status.name: status.reason for status in rf.backends()},
        "commit": _first_line("git", "rev-parse", "HEAD"),
        "settings": "TF32 off, cudnn.benchmark on; torch.compile(dynamic=False)",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--seconds", type=float, default=120, help="time after which no more starts"
    )
    parser.add_argument("--out", type=Path, help="file for all numbers, as JSON")
    parser.add_argument("--backend", default="native", choices=tuple(OPS), help="of what is fused")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument(
        "--compile-only", action="store_true", help="fill torch.compile's cache and measure nothing"
    )
    parser.add_argument("--once", action="store_true", help="call each case once, under a profiler")
    return parser.parse_args()


def main() -> int:
    options = _options()
    end = time.monotonic() + options.seconds
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    bench = Bench(torch.device(options.device), options.quick, options.backend)
    if options.compile_only:
        for case in compiled_cases(options.quick):
            bench.compile(case)
        return 0
    if options.once:
        bench.once()
        return 0
    # Each capture of a graph collects garbage; what is imported by now is none.
    torch.compiler.reset()
    gc.freeze()
    failed: dict[str, str] = {}
    skipped: list[str] = []
    for label, measure in plan(options.quick, bench.has_triton):
        if time.monotonic() > end:
            skipped.append(label)
            continue
        start = time.monotonic()
        try:
            measure(bench)
        except KeyboardInterrupt:  # the time is over: what was measured is to be shown
            end = -math.inf
            skipped.append(label)
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"{time.monotonic() - start:6.1f} s  {label}  {failed.get(label, '')}", flush=True)
        if bench.device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
    results = {
        **_machine(bench.device),
        "backend": bench.backend,
        "copy_bytes_per_s": bench.copy_bytes_per_s,
        "launch_s": bench.launch_s,
        "rows": bench.rows,
        "failed": failed,
        "skipped": skipped,
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(*gpu_summary.lines(results), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
