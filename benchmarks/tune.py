"""Tries the planner's constants on this machine's GPU and writes the fastest to a file.

    python benchmarks/tune.py --seconds 560 --out tuning.txt
    RESNEST_FUSED_CUDA_TUNING=tuning.txt python ...

One constant after the other, each at half and at twice its value; what makes the ops faster in the
geometric mean stays. The file is read when the package is loaded, so each try is a process. It
times evaluation, the training forward and the backward of all after a convolution in bfloat16 at
ResNeSt-50's four stages, in both memory formats and at two batches. ``--device cpu --quick`` goes
through all of it on a machine without a GPU, where no constant makes a difference.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

VARIABLE = "RESNEST_FUSED_CUDA_TUNING"
# From one process to the next a time moves by about a hundredth; what seems faster has to be so
# twice.
GAIN = 0.02
PASSES = ("eval", "train", "backward")
Tunables = Mapping[str, tuple[int, int, int]]


def tried(value: int, least: int, most: int) -> Iterator[int]:
    """Half and twice the value, and zero where that turns something off."""
    others = {value // 2, 2 * value, 0} - {value}
    return (other for other in sorted(others) if least <= other <= most)


def search(
    cost_of: Callable[[Mapping[str, int]], float],
    tunables: Tunables,
    end: float,
    keep: Callable[[Mapping[str, int], float], None],
) -> tuple[dict[str, int], float, float]:
    """What to change, and the cost without and with it.

    Args:
        cost_of: the cost with these values in place of the defaults.
        tunables: (value, least, most) by name.
        end: by ``time.monotonic()``, after which nothing more is tried.
        keep: called with what to change so far, and the part of the time that it takes.
    """
    changes: dict[str, int] = {}
    first = best = min(cost_of({}), cost_of({}))
    print(f"{first:10.2f} us  as it is", flush=True)
    keep(changes, 1.0)
    for name, limits in tunables.items():
        before = dict(changes)
        for value in tried(*limits):
            if time.monotonic() > end:
                print(f"the time is over before {name} = {value}", flush=True)
                return changes, first, best
            try:
                cost = cost_of({**before, name: value})
                if cost < best * (1 - GAIN):
                    cost = max(cost, cost_of({**before, name: value}))
            except RuntimeError as error:
                print(f"    failed     {name} = {value}: {error}", flush=True)
                continue
            faster = cost < best * (1 - GAIN)
            print(f"{cost:10.2f} us  {name} = {value}{'  kept' * faster}", flush=True)
            if faster:
                best, changes = cost, {**before, name: value}
                keep(changes, best / first)
    return changes, first, best


def time_once(device: str, quick: bool) -> float:
    """The geometric mean of the ops' times in microseconds, in this process."""
    import gpu
    import torch

    from resnest_fused import _C

    _C.tuning()  # raises where the file is wrong, which the ops do on a GPU alone
    bench = gpu.Bench(torch.device(device), quick, "native")
    _, trains = gpu.cases(quick)
    for case in trains:
        for batch in (2, case.batch):
            bench.phases(replace(case, batch=batch))
    times = [row["median_us"] for row in bench.rows if row["contender"] in PASSES]
    return math.exp(sum(map(math.log, times)) / len(times))


def cost_in_a_process(changes: Mapping[str, int], device: str, quick: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuning.txt")
        path.write_text(as_text(changes))
        command = [sys.executable, __file__, "--time-once", f"--device={device}"]
        run = subprocess.run(
            command + ["--quick"] * quick,
            env={**os.environ, VARIABLE: str(path)},
            stdout=subprocess.PIPE,
            text=True,
        )
    if run.returncode != 0:
        raise RuntimeError(f"what is tried cannot be timed: {dict(changes)}")
    return float(run.stdout.splitlines()[-1])


def as_text(changes: Mapping[str, int]) -> str:
    return "".join(f"{name} = {value}\n" for name, value in changes.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=560, help="after which no more is tried")
    parser.add_argument("--out", type=Path, help="the file")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--time-once", action="store_true", help="time what is set, as a try does")
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU; --device cpu --quick goes through all of it")
    if options.time_once:
        print(time_once(options.device, options.quick))
        return 0
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds}: expected more than 0")
    if options.out and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        parser.error(f"--out {options.out}: expected a file in a folder that is there")
    end = time.monotonic() + options.seconds
    os.environ.pop(VARIABLE, None)  # the tries begin with the defaults
    from resnest_fused import _C

    where = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU"
    today = datetime.datetime.now(datetime.timezone.utc).date()

    def cost_of(changes: Mapping[str, int]) -> float:
        return cost_in_a_process(changes, options.device, options.quick)

    def keep(changes: Mapping[str, int], part: float) -> None:
        if options.out:
            title = f"# {where}, {today}: {part:.3f} of the time\n"
            options.out.write_text(title + as_text(changes))

    changes, before, after = search(cost_of, _C.tuning(), end, keep)
    print(f"=== {where}: {len(changes)} constants, {before:.2f} us before, {after:.2f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
