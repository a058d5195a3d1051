"""The option that holds all contenders to the instructions of an older CPU.

PyTorch, oneDNN and the kernels each read an environment variable when they are imported or first
used. So the option is read from the command line before any of them, by importing this module.
``torch.compile`` takes code from its cache whatever instructions it was made for, so each set has a
cache of its own.
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
import tempfile

OPTION = "--cpu-capability"
VARIABLES = ("RESNEST_FUSED_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
VALUES = {
    "baseline": ("baseline", "default", "SSE41"),
    "avx2": ("avx2", "avx2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512_CORE"),
}

_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_parser.add_argument(OPTION)
_wanted = _parser.parse_known_args(sys.argv[1:])[0].cpu_capability
if _wanted in VALUES:
    os.environ.update(zip(VARIABLES, VALUES[_wanted], strict=True))
    _cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    _cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _cache
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{_cache}_{_wanted}"


def missed(wanted: str, native: str, aten: str) -> str | None:
    """Why a run does not use what the option asks for, or None.

    Args:
        wanted: the option's value, a key of ``VALUES``.
        native: the instruction set of resnest_fused's kernels.
        aten: that of PyTorch's.
    """
    if (native, aten.lower()) == VALUES[wanted][:2]:
        return None
    settings = " ".join(
        f"{name}={value}" for name, value in zip(VARIABLES, VALUES[wanted], strict=True)
    )
    return (
        f"{OPTION}={wanted}: the kernels use {native} and PyTorch {aten.lower()}; this CPU may not "
        f"have it, or pytest was not started from the command line (then set {settings})"
    )
