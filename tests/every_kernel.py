"""Runs every CUDA kernel on small maps, for compute-sanitizer to watch; compares no numbers.

tests/gpu.sh runs it. In every dtype, layout and prologue.
"""

from __future__ import annotations

import torch
from cases import NORMS, PROLOGUES, Call, Case, draw_any
from test_op import ARGUMENTS

# (batch, channels, height, width, radix, cardinality, inter_channels): maps in vectors of 16 bytes
# and in single elements, few and many blocks, each radix that has code of its own, small and large
# rows of pixels.
SIZES = (
    (3, 16, 9, 8, 2, 1, 32),
    (5, 6, 5, 3, 2, 2, 10),
    (2, 72, 14, 14, 1, 3, 33),
    (2, 24, 9, 4, 4, 2, 16),
    (2, 8, 45, 45, 2, 1, 8),  # in NCHW slabs begin between vectors,
    (2, 8, 91, 91, 2, 1, 8),  # and are chunks of a channel
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(call: Call) -> None:
    """Evaluation, where it has statistics, and a training step."""
    if "batch" not in (call.case.prologue, call.case.norm):
        call.forward()
    call.gradients()


def run_phases(call: Call) -> None:
    """Every op alone: modules other than ours between the FCs take those of the phases.

    Without such a module, as racecheck of compute-sanitizer 2025.3 breaks down in PyTorch's
    convolutions.
    """
    for name in ARGUMENTS:
        if name == "prologue_backward" and not call.case.has_bn0:
            continue
        getattr(torch.ops.resnest_fused, name)(**ARGUMENTS[name](call))


def main() -> None:
    torch.set_default_device("cuda")
    calls = 0
    for index, sizes in enumerate(SIZES):
        for dtype in DTYPES:
            for layout in ("nchw", "channels_last"):
                for prologue in PROLOGUES:
                    norm = NORMS[(index + len(prologue)) % 3]
                    options = {"layout": layout, "norm": norm, "prologue": prologue}
                    call = draw_any(Case(*sizes, dtype, **options))
                    run(call)
                    run_phases(call)
                    calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls, forward and backward")


if __name__ == "__main__":
    main()
