"""PEP 517 backend: setuptools, compiling against the torch of the environment installed into.

pip builds in isolation, where that torch is hidden, and would otherwise download a second one of
several gigabytes, maybe of another release. So this backend asks the target interpreter for its
torch and lends it to the build; where there is none, or too old a one, the build requires its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

from setuptools import build_meta

OLDEST_TORCH = (2, 10)  # the same as in pyproject.toml's dependencies

ASK_FOR_TORCH = """
import importlib.metadata, importlib.util, json, sys
found = importlib.util.find_spec("torch") is not None
version = importlib.metadata.version("torch") if found else None
print(json.dumps({"version": version, "path": [entry for entry in sys.path if entry]}))
"""


class TargetTorch(NamedTuple):
    """The torch of the target interpreter, and the sys.path on which it is found."""

    version: str
    path: list[str]


def is_recent_enough(version: str) -> bool:
    """Whether a torch of this version, such as "2.13.0+cpu", has the ABI that is compiled for."""
    release = re.match(r"(\d+)\.(\d+)", version)
    return release is not None and tuple(map(int, release.groups())) >= OLDEST_TORCH


def find_target_torch() -> TargetTorch | None:
    """The target interpreter's torch if the package can be built against it, else None."""
    # With these two pip shows the interpreter the build environment in place of its own.
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", ASK_FOR_TORCH]
    answer = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True)
    target = TargetTorch(**json.loads(answer.stdout))
    return target if target.version is not None and is_recent_enough(target.version) else None


def lend_target_torch() -> None:
    """Makes the target's torch importable here, behind all that the build environment has."""
    if importlib.util.find_spec("torch") is None and (target := find_target_torch()) is not None:
        sys.path.extend(entry for entry in target.path if entry not in sys.path)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    if os.environ.get("RESNEST_FUSED_SKIP_NATIVE") == "1" or find_target_torch() is not None:
        return []
    return ["torch>={}.{}".format(*OLDEST_TORCH)]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    lend_target_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Any = None
) -> str:
    lend_target_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    lend_target_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    lend_target_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    # Sources are only packed: that must need neither torch nor a compiler.
    os.environ["RESNEST_FUSED_SKIP_NATIVE"] = "1"
    return build_meta.build_sdist(sdist_directory, config_settings)
