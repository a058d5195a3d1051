"""What the kernels need to know of Triton's version and settings."""

from __future__ import annotations

import os

import triton

VERSION: str = triton.__version__
# The oldest release that the kernels are tested with; PyTorch 2.10 brings it.
OLDEST = (3, 6)


def too_old() -> str | None:
    """Why this Triton cannot run the kernels, or None."""
    release = tuple(int(part) for part in VERSION.split(".")[:2])
    if release < OLDEST:
        return f"Triton {VERSION} is older than {OLDEST[0]}.{OLDEST[1]}"
    return None


# Whether kernels run in Triton's interpreter, on CPU tensors. It is fixed when they are defined.
INTERPRETED: bool = too_old() is None and triton.knobs.runtime.interpret


def wrong_environment() -> str | None:
    """What is wrong with an environment variable, or None."""
    value = os.environ.get("RESNEST_FUSED_AUTOTUNE") or "0"
    return (
        None if value in ("0", "1") else f"RESNEST_FUSED_AUTOTUNE: expected 0 or 1, got {value!r}"
    )


def autotunes() -> bool:
    """Whether block sizes are found by timing."""
    return os.environ.get("RESNEST_FUSED_AUTOTUNE") == "1" and not INTERPRETED


def cache_folder() -> str:
    """Where Triton keeps compiled kernels."""
    return triton.knobs.cache.dir
