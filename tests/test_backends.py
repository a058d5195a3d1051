"""The choice of a backend: by argument, by context, by environment, and its report."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import Call, Case, draw

import resnest_fused as rf
from resnest_fused.backends import choose, native


def _grad_fn(call: Call, backend: str = "auto") -> str:
    """The name of what autograd recorded for out: it tells which backend ran."""
    return type(call.forward(backend, x=call.x.detach().requires_grad_()).grad_fn).__name__


@pytest.fixture
def call() -> Call:
    return draw(Case(2, 4, 3, 3, norm="running"))


def test_the_report_lists_every_backend_in_order() -> None:
    report = rf.backends()
    assert [status.name for status in report] == ["native", "reference"]
    assert all(status.available and status.reason for status in report)
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


@pytest.mark.parametrize("name", ["", "cuda", "Native"])
def test_unknown_names(call: Call, name: str) -> None:
    message = f"^backend: expected one of auto, native, reference, got '{name}'$"
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


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_environment_sets_the_default() -> None:
    code = (
        "import torch; from resnest_fused.backends import choose; "
        "print(choose('auto', torch.empty(1)))"
    )
    run = _python(code, RESNEST_FUSED_BACKEND="reference", PYTHONPATH=os.pathsep.join(sys.path))
    assert run.stdout.strip() == "reference", run.stderr


def test_a_wrong_environment_is_named() -> None:
    options: dict[str, Any] = {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import torch; from resnest_fused.backends import choose; choose('auto', torch.empty(1))"
    run = _python(code, RESNEST_FUSED_BACKEND="fast", **options)
    assert (
        "RESNEST_FUSED_BACKEND: expected one of auto, native, reference, got 'fast'" in run.stderr
    )
