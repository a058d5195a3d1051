"""The package can be imported anew and its modules reloaded, as autoreload does in a notebook.

PyTorch keeps ops for the whole process, and models made before keep their classes. They must go on
running, with the code that was imported last.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import resnest_fused as rf
from resnest_fused.backends import native


def test_what_was_made_before_goes_on_and_what_is_edited_runs(tmp_path: Path) -> None:
    shutil.copytree(Path(rf.__file__).parent, tmp_path / "resnest_fused")
    # It may lie elsewhere, if the package is in a checkout.
    shutil.copy(native._C.__file__, tmp_path / "resnest_fused")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        # Bytecode has its source's time in whole seconds, so an edit can be missed.
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_INTERPRET": "1",
    }
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("renewal.py"))],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
