"""Other packages' own tests over fused models; run with ``-m sources --sources=FOLDER``.

The folder has the packages' sources, which hold the tests; CONTRIBUTING.md says how to get them.
Each suite runs twice, in processes of its own. What passes unfused must pass fused, but for
torch.jit.script, which raises on fused modules. Weights are not downloaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.sources, pytest.mark.timeout(3600)]

# The folder's name, what of its tests has a split attention or an ancestor, how many fused modules
# these make at least.
SUITES = {
    "official": ("ResNeSt", ["tests/test_torch.py", "tests/test_radix_major.py"], 2000),
    "timm": (
        "timm-*",
        [
            "tests/test_models.py",
            "-k",
            "(resnest14d or regnety_002 or skresnet18 or seresnet18) and not pretrained",
        ],
        300,
    ),
    "segmentation-models": (
        "segmentation_models*",
        ["tests/encoders/test_timm_ported_encoders.py", "-k", "Resnest or SkNet or RegNet"],
        30,
    ),
    "segmentation-models with a ResNeSt": (
        "segmentation_models*",
        ["tests/models", "-k", "not logits and not DPT and not Segformer"],
        100,
    ),
}


def outcomes(source: Path, arguments: list[str], fused: bool, file: Path) -> dict[str, bool]:
    """Whether each test passed; those that were skipped are left out."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "FUSED_BUILDERS": str(int(fused)),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fused_builders", f"--junitxml={file}"]
    command += ["-p", "no:cacheprovider", *arguments]
    ran = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr  # 1: some of its tests failed
    count = re.search(r"^fused modules: (\d+)$", ran.stdout, re.MULTILINE)
    assert count is not None
    results = {
        f"{case.get('classname')}.{case.get('name')}": not len(case)
        for case in ElementTree.parse(file).iter("testcase")
        if case.find("skipped") is None
    }
    return results | {"fused modules": int(count[1])}


@pytest.mark.parametrize(("folder", "arguments", "least"), SUITES.values(), ids=SUITES)
def test_what_passes_unfused_passes_fused(request, tmp_path, folder, arguments, least):
    sources = request.config.getoption("--sources")
    if sources is None:
        pytest.fail("--sources: expected the folder with the packages' sources")
    (source,) = Path(sources).glob(folder)
    plain, fused = (
        outcomes(source.resolve(), arguments, fused, tmp_path / f"{fused}.xml")
        for fused in (False, True)
    )
    assert plain.pop("fused modules") == 0 and fused.pop("fused modules") >= least
    passing = {name for name, passed in plain.items() if passed}
    print(f"{len(passing)} of {len(plain)} tests pass unfused")
    failing = {name for name in passing if not fused[name]}
    assert passing and not [n for n in failing if not re.search("torch_?script", n)], failing
