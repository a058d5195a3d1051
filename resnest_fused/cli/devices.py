"""The device on which a command runs: the option, and what it means."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from resnest_fused.cli.errors import bad

if TYPE_CHECKING:
    import torch

Device = Annotated[
    str | None,
    typer.Option(
        help="Where to run: cpu, cuda or cuda:N. Default: the GPU if there is one.", metavar="NAME"
    ),
]


def find_device(wanted: str | None) -> torch.device:
    """The device that was asked for, or the GPU if there is one."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is None:
        wanted = "cuda" if gpus else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", wanted)
    if match is None:
        raise bad("--device", f"expected cpu, cuda or cuda:N, got {wanted!r}")
    if wanted == "cpu":
        return torch.device("cpu")
    index = int(match[1] or 0)
    if index >= gpus:
        seen = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU"
        raise bad("--device", f"PyTorch sees {seen}, got {wanted!r}")
    torch.cuda.set_device(index)
    # TF32 has no more digits than half precision, and float32 is compared in all of its own.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", index)
