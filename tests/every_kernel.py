"""Runs every CUDA kernel on small maps, for compute-sanitizer to watch; compares no numbers.

tests/gpu.sh runs it. In every dtype, layout and prologue.
"""

from __future__ import annotations

import torch
from cases import NORMS, PROLOGUES, Call, Case, draw_any
from torch import nn

import resnest_fused as rf

# (batch, channels, height, width, radix, cardinality, inter_channels): maps in vectors of 16 bytes
# and in single elements, few and many blocks, each radix that has code of its own.
SIZES = (
    (3, 16, 9, 8, 2, 1, 32),
    (5, 6, 5, 3, 2, 2, 10),
    (2, 72, 14, 14, 1, 3, 33),
    (2, 24, 9, 4, 4, 2, 16),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def run(call: Call) -> None:
    """Evaluation, where it has statistics, and a training step."""
    if "batch" not in (call.case.prologue, call.case.norm):
        call.forward()
    call.gradients()


def run_phases(x: torch.Tensor) -> None:
    """The ops that other modules than ours between the FCs take."""
    module = rf.FusedSplitAttentionConv2d(x.shape[1], x.shape[1] // 2, 1)
    module.conv, module.bn1 = nn.Identity(), nn.GroupNorm(4, module.inter_channels)
    module.to(x.dtype)(x.requires_grad_()).sum().backward()


def main() -> None:
    torch.set_default_device("cuda")
    torch.backends.cudnn.enabled = False  # compute-sanitizer 2025.3 fails on kernels of cuDNN 9
    calls = 0
    for index, sizes in enumerate(SIZES):
        for dtype in DTYPES:
            for layout in ("nchw", "channels_last"):
                for prologue in PROLOGUES:
                    norm = NORMS[(index + len(prologue)) % 3]
                    options = {"layout": layout, "norm": norm, "prologue": prologue}
                    run(draw_any(Case(*sizes, dtype, **options)))
                    calls += 1
                if sizes[4] == 2:
                    run_phases(draw_any(Case(*sizes, dtype, layout=layout)).x)
    torch.cuda.synchronize()
    print(f"{calls} calls, forward and backward")


if __name__ == "__main__":
    main()
