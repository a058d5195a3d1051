"""Makes the split attention of existing models fused, undoes it, and checks the results."""

from resnest_fused.fusing.recognition import register
from resnest_fused.fusing.report import FuseEntry, FuseReport
from resnest_fused.fusing.swap import fuse, unfuse
from resnest_fused.fusing.verification import VerifyReport, verify

__all__ = ["FuseEntry", "FuseReport", "VerifyReport", "fuse", "register", "unfuse", "verify"]
