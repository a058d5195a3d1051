"""The choice of a backend: by argument, by context, by environment, and its report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from cases import Call, Case, draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import resnest_fused as rf
from resnest_fused.backends import NAMES, choose, native
from resnest_fused.backends.triton import backend as triton
from resnest_fused.backends.triton import compat
from resnest_fused.backends.triton.compat import INTERPRETED
from resnest_fused.modules import FusedModule


def _grad_fn(call: Call, backend: str = "auto") -> str:
    """The name of what autograd recorded for out: it tells which backend ran."""
    return type(call.forward(backend, x=call.x.detach().requires_grad_()).grad_fn).__name__


@pytest.fixture
def call() -> Call:
    return draw(Case(2, 4, 3, 3, norm="running"))


def test_the_report_lists_every_backend_in_order() -> None:
    report = rf.backends()
    assert [status.name for status in report] == ["native", "triton", "reference"]
    assert all(status.reason for status in report)
    assert [status.available for status in report] == [True, INTERPRETED, True]
    assert native.build_info()["cpu_capability"] in report[0].reason


def test_auto_takes_the_kernels(call: Call) -> None:
    assert "_SplitAttention" in _grad_fn(call)
    assert _grad_fn(call, "native") == _grad_fn(call)
    assert "_SplitAttention" not in _grad_fn(call, "reference")


def test_use_backend_sets_what_auto_means(call: Call) -> None:
    fused = _grad_fn(call)
    with rf.use_backend("reference"):
        assert _grad_fn(call) != fused
        assert _grad_fn(call, "native") == fused
        with rf.use_backend("native"):
            assert _grad_fn(call) == fused
        assert _grad_fn(call) != fused
    assert _grad_fn(call) == fused


def test_use_backend_is_undone_after_an_error(call: Call) -> None:
    fused = _grad_fn(call)
    with pytest.raises(KeyError), rf.use_backend("reference"):
        raise KeyError
    assert _grad_fn(call) == fused


def test_use_backend_acts_when_it_is_called(call: Call) -> None:
    fused = _grad_fn(call)
    plain = rf.use_backend("reference")
    try:
        assert _grad_fn(call) != fused
        with rf.use_backend("native"):
            assert _grad_fn(call) == fused
        assert _grad_fn(call) != fused
    finally:
        with plain:
            assert _grad_fn(call) != fused
    assert _grad_fn(call) == fused


def test_use_backend_around_a_function(call: Call) -> None:
    fused = _grad_fn(call)

    @rf.use_backend("reference")
    def grad_fn(call: Call) -> str:
        return _grad_fn(call)

    assert _grad_fn(call) == fused
    assert [grad_fn(call) != fused for _ in range(2)] == [True, True]
    assert _grad_fn(call) == fused


@pytest.mark.parametrize("described", [rf.split_attention, rf.fuse, rf.use_backend, FusedModule])
def test_docstrings_name_every_backend(described: object) -> None:
    assert all(f'"{name}"' in (described.__doc__ or "") for name in NAMES)


@pytest.mark.parametrize("name", ["", "cuda", "Native"])
def test_unknown_names(call: Call, name: str) -> None:
    message = f"^backend: expected one of auto, native, triton, reference, got '{name}'$"
    with pytest.raises(ValueError, match=message):
        call.forward(name)
    with pytest.raises(ValueError, match=message), rf.use_backend(name):
        pass


def test_modules_take_a_backend(call: Call) -> None:
    module = rf.FusedSplitAttention(4)
    assert "_SplitAttention" in type(module(call.x).grad_fn).__name__
    module.backend = "reference"
    assert "_SplitAttention" not in type(module(call.x).grad_fn).__name__


def test_a_named_backend_that_cannot_run_says_why(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "can_run", lambda x: "it is Sunday")
    message = "^backend 'native' cannot run this call: it is Sunday$"
    with pytest.raises(RuntimeError, match=message):
        call.forward("native")
    with pytest.raises(RuntimeError, match=message), rf.use_backend("native"):
        call.forward("auto")
    # Not Triton's interpreter, which can run it.
    assert choose("triton", call.x) == "triton"
    assert choose("auto", call.x) == "reference"


def test_a_missing_extension_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(
        native, "_missing", "the compiled extension is not installed", raising=False
    )
    status = rf.backends()[0]
    assert (status.available, status.reason) == (False, "the compiled extension is not installed")
    with pytest.raises(RuntimeError, match="cannot run this call: the compiled extension"):
        choose("native", torch.empty(1))


def test_importing_the_package_does_not_import_the_compiler_and_triton(tmp_path: Path) -> None:
    """The compiler takes longer to import than all else, and Triton than all of the package."""
    code = (
        "import sys, torch, resnest_fused, resnest_fused._C; "
        "assert not {'torch._dynamo', 'triton'} & set(sys.modules); "
        "from torch.utils.flop_counter import flop_registry; "
        "assert torch.ops.resnest_fused_triton.split_attention in flop_registry; "
        "op, x = torch.ops.resnest_fused_triton.batch_statistics, torch.ones(2, 4, 3, 3); "
        "assert op(x.to('meta'))[0].shape == (4,); op(x)"
    )
    found = _python(code, tmp_path, TRITON_INTERPRET="0")
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    reason = "its kernels are for GPUs, x is on cpu"
    assert last == f"RuntimeError: resnest_fused_triton::batch_statistics cannot run: {reason}"


# CUDA


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    """A fake x on a GPU of compute capability 8.9, which no cache remembers afterwards."""
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(compat, "INTERPRETED", False)
    for backend in (native, triton):
        backend._gpu_unavailable.cache_clear()
    yield x
    for backend in (native, triton):
        backend._gpu_unavailable.cache_clear()


def _pretend(monkeypatch: pytest.MonkeyPatch, status: str, archs: str, missing: str | None) -> None:
    facts = {**native.build_info(), "cuda_status": status, "cuda_archs": archs}
    monkeypatch.setattr(native, "build_info", lambda: facts)
    monkeypatch.setattr(native, "_cuda_missing", missing)


@pytest.mark.parametrize(
    ("status", "archs", "missing", "reason"),
    [
        ("built for 8.0 9.0", "8.0 9.0", None, None),
        ("built for 7.5 9.0+PTX", "7.5 9.0+PTX", None, "built for 7.5 9.0+PTX, GPU 0 is 8.9"),
        ("not built, no nvcc", "", "the library is not there", "not built, no nvcc"),
        ("built for 8.0", "8.0", "no libx.so", "built for 8.0 but not loaded (no libx.so)"),
    ],
)
def test_cuda_kernels_run_where_loaded_and_built_for_the_gpu(
    on_gpu: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    archs: str,
    missing: str | None,
    reason: str | None,
) -> None:
    _pretend(monkeypatch, status, archs, missing)
    assert choose("auto", torch.empty(1)) == "native"
    if reason is None:
        assert choose("auto", on_gpu) == choose("native", on_gpu) == "native"
    else:
        assert choose("auto", on_gpu) == "triton"
        with pytest.raises(RuntimeError) as error:
            choose("native", on_gpu)
        assert str(error.value) == (
            f"backend 'native' cannot run this call: its CUDA kernels are {reason}"
        )
    report = rf.backends()[0]
    assert report.available
    assert native.build_info()["cpu_capability"] in report.reason
    assert f"; CUDA kernels {status}" in report.reason


def test_a_gpu_is_asked_for_its_capability_once(
    on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: asked.append(i) or (9, 0))
    _pretend(monkeypatch, "built for 9.0", "9.0", None)
    assert choose("auto", on_gpu) == choose("auto", on_gpu) == "native"
    assert asked == [0]


def test_graphs_for_a_gpu_are_traced_without_one(
    on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _pretend(monkeypatch, "built for 9.0", "9.0", None)
    assert choose("auto", on_gpu) == "native"


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("7.5 8.0+PTX", (7, 5), True),
        ("9.0 10.0", (10, 3), True),
        ("9.0+PTX 10.0", (12, 0), True),
        ("9.0", (10, 0), False),
        ("12.0+PTX", (9, 0), False),
        ("", (9, 0), False),
    ],
)
def test_gpus_that_code_runs_on(archs: str, capability: tuple[int, int], expected: bool) -> None:
    assert native._covers(archs, capability) is expected


def test_the_compiler_takes_what_is_known_of_a_gpu_as_constant() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def call(x: Tensor) -> Tensor:
        return x if native.gpu_unavailable(0) is None else x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(torch.empty(1))


@pytest.mark.skipif(not native.build_info()["cuda_archs"], reason="built without CUDA kernels")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_every_op_has_a_cuda_kernel() -> None:
    assert native._cuda_missing is None
    ops = [f"resnest_fused::{name}" for name in torch.ops.resnest_fused]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cpu = [op for op in ops if has_kernel(op, "CPU")]
    assert len(on_cpu) >= 9
    assert [op for op in on_cpu if not has_kernel(op, "CUDA")] == []


def test_a_library_that_cannot_be_loaded_leaves_the_rest(tmp_path: Path) -> None:
    """In a copy of the package, because the library is loaded on import."""
    package = Path(rf.__file__).parent
    shutil.copytree(package, tmp_path / "resnest_fused")
    # It may lie elsewhere, if the package is in a checkout.
    shutil.copy(native._C.__file__, tmp_path / "resnest_fused")
    for library in (tmp_path / "resnest_fused").glob("_cuda*.so"):
        library.unlink()
    (tmp_path / "resnest_fused" / f"_cuda{EXTENSION_SUFFIXES[0]}").write_text("no library")
    code = (
        "import torch; torch.version.cuda = '13.0'; import resnest_fused as rf; "
        "from resnest_fused.backends import native; print(rf.__file__, native._cuda_missing); "
        "rf.use_backend('native').__enter__(); rf.FusedSplitAttention(4)(torch.ones(2, 8, 2, 2))"
    )
    run = _python(code, tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout
    assert "file too short" in run.stdout


def _python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in this folder: in the checkout, the package there would hide the installed one."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )


def test_environment_sets_the_default(tmp_path: Path) -> None:
    code = (
        "import torch; from resnest_fused.backends import choose; "
        "print(choose('auto', torch.empty(1)))"
    )
    run = _python(code, tmp_path, RESNEST_FUSED_BACKEND="reference")
    assert run.stdout.strip() == "reference", run.stderr


def test_a_wrong_environment_is_named(tmp_path: Path) -> None:
    code = "import torch; from resnest_fused.backends import choose; choose('auto', torch.empty(1))"
    run = _python(code, tmp_path, RESNEST_FUSED_BACKEND="fast")
    assert (
        "RESNEST_FUSED_BACKEND: expected one of auto, native, triton, reference, got 'fast'"
        in run.stderr
    )


# Prints what a call raises for a small map, of one work item, and for a large one, of many. It also
# calls the op itself, as programs that torch.export wrote do.
RAISED = """
import sys, torch, resnest_fused as rf
torch.set_num_threads(2)
op = torch.ops.resnest_fused.batch_statistics

def module(backend):
    module = rf.FusedSplitAttention(32).eval()
    module.backend = backend
    return module

for backend in "auto", "native", "reference":
    for x in torch.ones(2, 64, 2, 2), torch.ones(8, 64, 56, 56):
        for call in module(backend), torch.no_grad()(module(backend)), op:
            try:
                call(x)
            except Exception as error:
                print(backend, type(error).__name__, error)
status = rf.backends()[0]
print("report", status.available, status.reason)
"""


def test_a_wrong_cpu_capability_is_one_error(tmp_path: Path) -> None:
    """The reference never replaces the kernels silently: it runs only if asked for."""
    run = _python(RAISED, tmp_path, RESNEST_FUSED_CPU_CAPABILITY="AVX2")
    assert run.returncode == 0, run.stderr
    reason = "RESNEST_FUSED_CPU_CAPABILITY: expected baseline, avx2 or avx512, got 'AVX2'"
    of_op = f"RuntimeError {reason}"
    expected = [
        f"{backend} {error}"
        for backend in ("auto", "native")
        for _ in ("small", "large")
        for error in (f"ValueError {reason}", f"ValueError {reason}", of_op)
    ]
    expected += [f"reference {of_op}"] * 2
    assert run.stdout.splitlines() == [*expected, f"report False {reason}"]


def test_empty_variables_are_unset_and_the_machine_s_best_is_the_limit(tmp_path: Path) -> None:
    names = ("BACKEND", "CPU_CAPABILITY", "AUTOTUNE")
    unset = _python(RAISED, tmp_path, **{f"RESNEST_FUSED_{name}": "" for name in names})
    known = re.fullmatch(r"report True C\+\+ kernels for cpu, (\w+), .*\n", unset.stdout)
    assert known, unset.stdout + unset.stderr
    run = _python(RAISED, tmp_path, RESNEST_FUSED_CPU_CAPABILITY="avx512")
    if known[1] == "avx512":
        assert run.stdout == unset.stdout
    else:
        reason = (
            f"RESNEST_FUSED_CPU_CAPABILITY: expected at most {known[1]}, the best of this machine, "
            "got 'avx512'"
        )
        assert run.stdout.splitlines()[0] == f"auto ValueError {reason}", run.stderr
        assert run.stdout.splitlines()[-1] == f"report False {reason}"


# Triton


@pytest.mark.parametrize(
    ("kind", "capability", "reason"),
    [
        ("cuda", (8, 0), None),
        ("cuda", (7, 0), "its kernels are for GPUs from 7.5 on, GPU 0 is 7.0"),
        ("xpu", None, None),
        ("cpu", None, "its kernels are for GPUs, x is on cpu"),
    ],
)
def test_triton_runs_on_gpus(
    on_gpu: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    capability: tuple[int, int] | None,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert triton.gpu_unavailable(kind, 0) == reason


def test_a_wrong_autotune_is_named(on_gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "not built, no nvcc", "", "the library is not there")
    monkeypatch.setenv("RESNEST_FUSED_AUTOTUNE", "yes")
    reason = "RESNEST_FUSED_AUTOTUNE: expected 0 or 1, got 'yes'"
    for backend in ("triton", "auto"):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            choose(backend, on_gpu)
    assert not rf.backends()[1].available and rf.backends()[1].reason == reason
    assert choose("auto", torch.empty(1)) == "native", "it is read for Triton alone"
    for unset in ("", "0"):
        monkeypatch.setenv("RESNEST_FUSED_AUTOTUNE", unset)
        assert choose("auto", on_gpu) == "triton"
