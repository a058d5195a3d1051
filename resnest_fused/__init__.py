"""Fused Split-Attention for ResNeSt (arXiv:2004.08955): one op, forward and backward."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING


def _command_starts() -> bool:
    """Whether the program ``resnest-fused`` or ``python -m resnest_fused.training`` is starting.

    Importing torch takes seconds, and ``resnest-fused --help`` does not need it. So these programs
    import the rest of this file when they run a command. In every other program ``import
    resnest_fused`` registers the ops, and warns if the kernels are missing.
    """
    if sys.argv[:1] == ["-m"]:  # until Python has found the module that it is to run
        return "resnest_fused.training" in sys.orig_argv
    program = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    return Path(program).name == "resnest-fused" and "resnest_fused.cli" not in sys.modules


if TYPE_CHECKING or not _command_starts():
    from resnest_fused import models
    from resnest_fused.backends import BackendStatus, backends, use_backend
    from resnest_fused.functional import attend, split_attention
    from resnest_fused.fusing import (
        FuseEntry,
        FuseReport,
        VerifyReport,
        fuse,
        register,
        unfuse,
        verify,
    )
    from resnest_fused.modules import FusedSplitAttention, FusedSplitAttentionConv2d
    from resnest_fused.reference import BatchNormArgs, SplitAttention, SplitAttentionConv2d

__all__ = [
    "BackendStatus",
    "BatchNormArgs",
    "FuseEntry",
    "FuseReport",
    "FusedSplitAttention",
    "FusedSplitAttentionConv2d",
    "SplitAttention",
    "SplitAttentionConv2d",
    "VerifyReport",
    "attend",
    "backends",
    "fuse",
    "models",
    "register",
    "split_attention",
    "unfuse",
    "use_backend",
    "verify",
]
__version__ = "0.1.0"
