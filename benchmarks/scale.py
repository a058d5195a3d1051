"""Predicts how ResNeSt-50's training scales over GPUs, from what was measured on one.

``python benchmarks/scale.py`` prints the tables of SCALE.md, whose text has the formulas.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from resnest_fused.models.variants import VARIANTS

_MEASURED = Path(__file__).parent / "results/h100/gpu.json"
_CASE = "ResNeSt-50 train step bf16 channels_last B=64"
_BATCH = 64
_IMAGES = 1_281_167  # of ImageNet-1k's training
_IN_NODE = 8

# Assumed, not measured here. Bytes per second at which gradients are passed on: of NVLink 4 in a
# node, and of a network card of 400 Gb/s for each GPU, each at 80 % of its rate. Seconds of a hop.
_NVLINK, _NETWORK = 0.8 * 450e9, 0.8 * 50e9
_HOP = 10e-6
# Of a step: the part that is backward, as a convolution's backward is two forwards.
_BACKWARD = 2 / 3
_BUCKET = 25 * 2**20  # DDP's default, of which the last one cannot overlap with backward


def reduce_seconds(gpus: int, count: float) -> float:
    """An all-reduce of so many bytes over so many GPUs: a ring's bytes, a tree's hops."""
    if gpus == 1:
        return 0.0
    rate = _NVLINK if gpus <= _IN_NODE else _NETWORK
    return 2 * (gpus - 1) / gpus * count / rate + 2 * _HOP * math.log2(gpus)


def predict(gpus: int, alone: float, count: float) -> tuple[float, float, float]:
    """Seconds of the all-reduce, of the part of it that backward does not hide, and of a step."""
    whole = reduce_seconds(gpus, count)
    last = reduce_seconds(gpus, min(_BUCKET, count))
    exposed = last + max(0.0, whole - last - _BACKWARD * alone)
    return whole, exposed, alone + exposed


def measured() -> dict[str, float]:
    """Seconds of a step on one GPU, by contender."""
    rows = json.loads(_MEASURED.read_text())["rows"]
    return {row["contender"]: row["median_us"] / 1e6 for row in rows if row["case"] == _CASE}


def main() -> None:
    count = 4 * VARIANTS["resnest50"].parameters
    steps = measured()
    print("| GPUs | | all-reduce, ms | not hidden, ms | share of the step | images/s | epoch |")
    print("|---|---|---|---|---|---|---|")
    for gpus in (1, 8, 64, 512):
        for name in ("eager", "fused"):
            whole, exposed, step = predict(gpus, steps[name], count)
            rate = gpus * _BATCH / step
            print(
                f"| {gpus} | {name} | {1e3 * whole:.2f} | {1e3 * exposed:.2f} | "
                f"{exposed / step:.1%} | {rate:,.0f} | {_IMAGES / rate:,.1f} s |"
            )


if __name__ == "__main__":
    main()
