"""Writes ``results/predicted.md``: what the CUDA kernels would take on six GPUs, by ``model.py``.

    python benchmarks/predicted.py                      # compiles csrc/, for minutes
    python benchmarks/predicted.py --library _cuda.so   # reads a library built for all of them
    python benchmarks/predicted.py --measured gpu.json  # with what gpu.py measured for constants

It needs nvcc and cuobjdump, and no GPU. Where ``gpu.py`` has measured one, as its results under
``results/*/gpu.json`` tell, what was measured stands beside what is predicted.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import sass
from grid import LAYOUTS, STAGES, Case
from model import GPUS, KB, MAPS, Gpu, Prediction, predict, workload

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Kernels = Mapping[str, sass.Kernel]
# Of the page: 16-bit maps behind a convolution, in blocks of radix 2.
CASES = [
    Case(*stage, 256, False, "bf16", layout, form="after conv")
    for layout in reversed(LAYOUTS)
    for stage in STAGES
]
BATCHES = (1, 32, 256)
# The kernels that those calls use, among which are those of a few more dtypes.
USED = r"\w+_kernel<(float|__nv_bfloat16, (true|false), (2, )?[48](, true)?)>$"


class Timed(NamedTuple):
    """What gpu.py times as one: the launches of an op, or of a whole pass.

    Attributes:
        passed: the pass of the call that it belongs to.
        coupled: with the batch's statistics.
        launches: its launches' names; empty for all.
    """

    passed: str
    coupled: bool
    launches: tuple[str, ...] = ()


# Of the ops alone only that whose launches a whole pass has, too.
OPS = {
    "batch_statistics": Timed("train", True, ("statistics", "combine")),
    "eval": Timed("eval", False),
    "train": Timed("train", True),
    "backward": Timed("backward", True),
}
PASSES = ("eval", "train", "backward")


def predict_op(gpu: Gpu, kernels: Kernels, case: Case, op: str) -> list[Prediction]:
    """The launches of what gpu.py calls ``op``."""
    timed = OPS[op]
    launches = predict(gpu, kernels, workload(case, timed.passed, coupled=timed.coupled))
    return [launch for launch in launches if launch.name in (timed.launches or launch.name)]


def microseconds(launches: Sequence[Prediction]) -> float:
    return sum(launch.seconds for launch in launches) * 1e6


class Judged(NamedTuple):
    """A measurement beside its prediction, in microseconds."""

    op: str
    case: Case
    measured: float
    predicted: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def is_old(results: Mapping[str, Any]) -> bool:
    """Whether gpu.py measured the code before 2026-11-27, when nearly all of it was changed."""
    return str(results["date"]) < "2026-11-27"


def judge(gpu: Gpu, kernels: Kernels, results: Mapping[str, Any]) -> Iterator[Judged]:
    """What gpu.py measured of the cases here, each once.

    Beside what was measured before there were clusters stand the launches of a phase each.
    """
    then = replace(gpu, cluster_blocks=1) if is_old(results) else gpu
    seen = set()
    for row in results["rows"]:
        op = row["what"] if row["what"] == "eval" and row["contender"] == "fused" else ""
        op = row["contender"] if row["what"] == "op" else op
        for case in CASES:
            case = replace(case, batch=row.get("batch", 0))
            about = (row.get("shape"), row.get("layout"), row.get("dtype"), row.get("form"))
            same = about == (case.shape, case.layout, case.dtype, case.form)
            if op in OPS and same and row["radix"] == case.radix and (op, case) not in seen:
                seen.add((op, case))
                launches = predict_op(then, kernels, case, op)
                yield Judged(op, case, row["median_us"], microseconds(launches))


def mean_ratio(judged: Sequence[Judged]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(one.ratio) for one in judged) / len(judged))


# --- the page


def _table(title: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    return [line(title), "|---" + "|--:" * (len(title) - 1) + "|", *map(line, rows), ""]


def _setting(case: Case) -> str:
    return f"{case.layout} {case.shape} B={case.batch}"


def _by_op(judged: Sequence[Judged]) -> list[str]:
    rows = []
    for op in OPS:
        of_op = [one for one in judged if one.op == op]
        if of_op:
            ratios = sorted(one.ratio for one in of_op)
            cells = (len(of_op), mean_ratio(of_op), ratios[0], ratios[-1])
            rows.append((op, cells[0], *(f"{cell:.2f}" for cell in cells[1:])))
    return _table(("predicted today over measured", "cases", "mean", "least", "most"), rows)


def _judged(judged: Sequence[Judged]) -> list[str]:
    ops = [op for op in OPS if any(one.op == op for one in judged)]
    found = {(one.case, one.op): f"{one.measured:.1f} / {one.predicted:.1f}" for one in judged}
    cases = sorted({one.case for one in judged}, key=lambda c: (c.batch, c.layout, -c.side))
    rows = [(_setting(case), *(found.get((case, op), "") for op in ops)) for case in cases]
    return _table(("measured / predicted, us", *ops), rows)


def _in_flight(gpu: Gpu, kernels: Kernels) -> list[str]:
    rows = []
    for case, batch in itertools.product(CASES, (32, 256)):
        of_batch = replace(case, batch=batch)
        launches = {
            launch.name: launch
            for name in ("train", "backward")
            for launch in predict(gpu, kernels, workload(of_batch, name, coupled=True))
        }
        cells = [launches[name] for name in MAPS]
        rows.append(
            (
                _setting(of_batch),
                *(f"{one.in_flight / KB:.0f} of {one.share / KB:.0f}" for one in cells),
            )
        )
    return _table(("predicted, KB", *MAPS), rows)


def _by_gpu(
    title: str,
    cases: Sequence[Case],
    gpus: Mapping[str, Gpu],
    kernels: Mapping[str, Kernels],
    times: Callable[[Gpu, Kernels, Case], Mapping[str, float]],
) -> list[str]:
    rows = []
    for case in cases:
        columns = [times(gpu, kernels[gpu.arch], case) for gpu in gpus.values()]
        for name in dict.fromkeys(itertools.chain.from_iterable(columns)):
            cells = (f"{of[name]:.1f}" if name in of else "-" for of in columns)
            rows.append((f"{_setting(case)} {name}", *cells))
    return _table((title, *gpus), rows)


def _kernel_times(gpu: Gpu, kernels: Kernels, case: Case) -> dict[str, float]:
    """Of a training step; of a kernel that runs twice, as each of them takes the same."""
    times = {}
    for name in ("train", "backward"):
        for launch in predict(gpu, kernels, workload(case, name, coupled=True)):
            times[launch.name] = launch.seconds * 1e6
    return times


def _call_times(gpu: Gpu, kernels: Kernels, case: Case) -> dict[str, float]:
    return {op: microseconds(predict_op(gpu, kernels, case, op)) for op in PASSES}


def _measured_constants(gpus: Mapping[str, Gpu]) -> list[str]:
    """Which constants of the model were measured, on which GPU."""
    lines = []
    for name, gpu in gpus.items():
        used, usual = asdict(gpu.constants), asdict(GPUS[name].constants)
        changes = [
            f"{key} {used[key]:.3g} for {usual[key]:.3g}" for key in used if used[key] != usual[key]
        ]
        if changes:
            lines += [f"Constants measured on this {name}: {', '.join(changes)}.", ""]
    return lines


OF_OLD_CODE = (
    "And by 2026-11-27 all of it was changed: launches became stages of one, and maps come",
    "by way of shared memory. So this is what those changes are predicted to give, and no",
    "test of the model; how well it fits the code that was measured is in NOTES.md. That",
    "did not keep x on chip: what is predicted here does not, either.",
)


def page(
    kernels: Mapping[str, Kernels],
    measured: Mapping[str, Mapping[str, Any]],
    gpus: Mapping[str, Gpu] = GPUS,
) -> str:
    """The page, from the kernels by architecture, gpu.py's results by the GPU's name, and GPUs."""
    lines = [
        "# Predicted times of the CUDA kernels",
        "",
        "Written by `python benchmarks/predicted.py`; do not edit. **All numbers are predicted**",
        "by `benchmarks/model.py`, from the launch plan and the compiled code, but for those that",
        "a title calls measured. bf16, radix 2, everything after the convolution.",
        "",
        *_measured_constants(gpus),
    ]
    for name, results in measured.items():
        judged = list(judge(gpus[name], kernels[gpus[name].arch], results))
        lines += [
            f"## {name}: measured beside predicted",
            "",
            f"Measured on {str(results['date'])[:10]} at commit {str(results['commit'])[:7]}, each",
            "op alone in a graph, with inputs that no cache holds. The prediction is for the code",
            "of today: where it was changed since, they differ for that reason, too.",
            *(OF_OLD_CODE if is_old(results) else ()),
            "",
            *_by_op(judged),
            *_judged(judged),
        ]
    lines += [
        "## Predicted bytes in flight",
        "",
        "Bytes of maps that an H100's or an H200's multiprocessor loads at a time in a training",
        "step, in the mean over turns, of the bytes that it loads in all. To reach a copy's speed",
        "an H100 needs about 40 KB, an H200 about 64 KB.",
        "",
        *_in_flight(gpus["H100"], kernels[gpus["H100"].arch]),
        "## Predicted time of calls",
        "",
        *_by_gpu(
            "predicted, us",
            [replace(case, batch=batch) for batch in BATCHES for case in CASES],
            gpus,
            kernels,
            _call_times,
        ),
        "## Predicted time of each kernel in a training step",
        "",
        *_by_gpu("predicted, us", CASES, gpus, kernels, _kernel_times),
    ]
    return "\n".join(lines)


# --- what it is made from


def compile_kernels(arch: str, folder: Path, sources: Sequence[str] = ()) -> Kernels:
    """The kernels of ``csrc/cuda``, or of some of its files, compiled as the build does."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    flags = [*build.NVCC_FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-cubin"]
    paths = [ROOT / "csrc/cuda" / name for name in sources] or sorted(
        path
        for path in (ROOT / "csrc/cuda").glob("*.cu")
        if '"cuda/dispatch.h"' in path.read_text()
    )
    found: dict[str, sass.Kernel] = {}
    for path in paths:
        binary = folder / f"{path.stem}.{arch}.cubin"
        command = [sass.find_tool("nvcc"), *flags, str(path), "-o", str(binary)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"nvcc: {path.name}: {run.stderr.strip()}")
        found |= sass.read(binary, arch, USED)
    return found


def gpu_named(results: Mapping[str, Any]) -> str | None:
    """Which of the GPUs here gpu.py's results are from."""
    found = [name for name in GPUS if re.search(rf"\b{name}\b", str(results.get("device")))]
    return found[0] if found else None


def with_measured(paths: Iterable[Path]) -> dict[str, Gpu]:
    """The GPUs, with the constants that these files of gpu.py give.

    Raises:
        ValueError: a file is not such a file, or from none of these GPUs.
    """
    gpus = dict(GPUS)
    for path in paths:
        try:
            results = json.loads(path.read_text())
            if not isinstance(results, dict) or (name := gpu_named(results)) is None:
                raise ValueError(f"expected a device that is one of {', '.join(GPUS)}")
            gpus[name] = gpus[name].measured(results)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
    return gpus


def measured_gpus() -> dict[str, Mapping[str, Any]]:
    """gpu.py's results by the name of a GPU here."""
    found = {}
    for path in sorted(RESULTS.glob("*/gpu.json")):
        results = json.loads(path.read_text())
        if (name := gpu_named(results)) is not None:
            found[name] = results
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", type=Path, help="a built library, instead of compiling")
    parser.add_argument("--out", type=Path, default=RESULTS / "predicted.md", help="the page")
    parser.add_argument(
        "--measured", type=Path, nargs="+", default=[], help="gpu.json of gpu.py, for constants"
    )
    options = parser.parse_args()
    try:
        gpus = with_measured(options.measured)
    except ValueError as error:
        parser.error(f"--measured: {error}")
    if options.library and not options.library.is_file():
        parser.error(f"--library {options.library}: there is no such file")
    if options.out.is_dir() or not options.out.absolute().parent.is_dir():
        parser.error(f"--out {options.out}: expected a file in a folder that is there")
    archs = dict.fromkeys(gpu.arch for gpu in GPUS.values())
    with tempfile.TemporaryDirectory() as folder:
        kernels = {
            arch: sass.read(options.library, arch, USED)
            if options.library
            else compile_kernels(arch, Path(folder))
            for arch in archs
        }
    options.out.write_text(page(kernels, measured_gpus(), gpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
