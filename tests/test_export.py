"""torch.export, AOTInductor and ONNX give eager's numbers, with our op or standard ones."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import resnest_fused as rf

BATCH = torch.export.Dim("batch", min=1, max=64)
BATCHES = (1, 2, 5)


def _eval(module: nn.Module) -> nn.Module:
    """The module in eval mode, its norms with parameters and statistics that matter."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.eval()


def _block() -> nn.Module:
    options = {"padding": 1, "radix": 2, "cardinality": 2}
    return _eval(rf.FusedSplitAttentionConv2d(4, 8, 3, **options)).double()


def _group_norm(features: int) -> nn.Module:
    return nn.GroupNorm(4, features)


def _inputs() -> list[Tensor]:
    return [torch.randn(batch, 4, 9, 7, dtype=torch.float64) for batch in BATCHES]


def _export(module: nn.Module, backend: str, strict: bool = False) -> torch.export.ExportedProgram:
    """The module's program for any batch; backend "reference" asks for standard ops."""
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    with torch.no_grad(), rf.use_backend(backend):
        return torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},), strict=strict)


def _our_ops(program: torch.export.ExportedProgram) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if "resnest_fused" in name]


# Arguments: the program's file, those of its inputs and outputs, the packages to import.
_ELSEWHERE = """
import importlib, sys, torch
program, inputs, outputs, *packages = sys.argv[1:]
for package in packages:
    importlib.import_module(package)
if program.endswith("aoti.pt2"):
    run = torch._inductor.aoti_load_package(program)
else:
    run = torch.export.load(program).module()
torch.save([run(x) for x in torch.load(inputs)], outputs)
assert ("resnest_fused" in sys.modules) == ("resnest_fused" in packages)
"""


def _run_elsewhere(program: Path, inputs: list[Tensor], *packages: str) -> list[Tensor]:
    """What the saved program gives in another process, which imports these packages only."""
    files = [program, program.with_suffix(".in"), program.with_suffix(".out")]
    torch.save(inputs, files[1])
    run = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, *map(str, files), *packages],
        cwd=program.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(run.stderr)
    return torch.load(files[2])


def _assert_same(outs: list[Tensor], module: nn.Module, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        for out, x in zip(outs, inputs, strict=True):
            torch.testing.assert_close(out, module(x))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("strict", [False, True])
def test_a_program_with_the_op(strict: bool, tmp_path: Path) -> None:
    module, inputs = _block(), _inputs()
    program = _export(module, "auto", strict)
    assert _our_ops(program) == ["resnest_fused.split_attention.default"]
    torch.export.save(program, tmp_path / "program.pt2")
    outs = _run_elsewhere(tmp_path / "program.pt2", inputs, "resnest_fused")
    _assert_same(outs, module, inputs)


def test_a_program_with_another_norm() -> None:
    """The modules between the two phases are in the program as they are."""
    module, inputs = _block(), _inputs()
    module.bn1 = _group_norm(32).double()
    program = _export(module, "auto")
    assert _our_ops(program) == ["resnest_fused.pool.default", "resnest_fused.recombine.default"]
    _assert_same([program.module()(x) for x in inputs], module, inputs)


def test_a_program_of_standard_ops(tmp_path: Path) -> None:
    """It runs where the package is not imported."""
    module, inputs = _block(), _inputs()
    program = _export(module, "reference")
    assert not _our_ops(program)
    torch.export.save(program, tmp_path / "program.pt2")
    _assert_same(_run_elsewhere(tmp_path / "program.pt2", inputs), module, inputs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_folded_program(backend: str) -> None:
    """It has no norm left."""
    inputs = _inputs()
    module = _eval(rf.SplitAttentionConv2d(4, 8, 3, padding=1)).double()
    twin = copy.deepcopy(module)
    assert rf.fuse(module, fold=True)
    program = _export(module, backend)
    assert bool(_our_ops(program)) == (backend == "auto")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    _assert_same([program.module()(x) for x in inputs], twin, inputs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_program_that_trains(backend: str) -> None:
    """It updates the statistics; of standard ops, it has the gradients too."""
    module = _block().train()
    twin = copy.deepcopy(module)
    x, *others = (torch.randn(batch, 4, 9, 7, dtype=torch.float64) for batch in (4, 2, 7))
    with rf.use_backend(backend):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},))
    assert bool(_our_ops(program)) == (backend == "auto")
    exported = program.module()
    for batch in (x, *others):
        out, expected = exported(batch), twin(batch)
        torch.testing.assert_close(out, expected)
    torch.testing.assert_close(dict(exported.state_dict()), dict(twin.state_dict()))
    assert not any(buffer.requires_grad for buffer in exported.buffers())
    if backend == "reference":
        out.square().sum().backward()
        expected.square().sum().backward()
        gradients = {name: p.grad for name, p in exported.named_parameters()}
        torch.testing.assert_close(gradients, {n: p.grad for n, p in twin.named_parameters()})


@pytest.mark.long
@pytest.mark.timeout(900)  # half a minute of g++, and more on a machine that others use
def test_aot_inductor_with_the_op(tmp_path: Path) -> None:
    module, inputs = _block(), _inputs()
    program = _export(module, "auto")
    package = str(tmp_path / "aoti.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    _assert_same(_run_elsewhere(Path(package), inputs, "resnest_fused"), module, inputs)
    with pytest.raises(RuntimeError, match="resnest_fused::split_attention"):
        _run_elsewhere(Path(package), inputs)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_aot_inductor_of_standard_ops(tmp_path: Path) -> None:
    module, inputs = _block(), _inputs()
    program = _export(module, "reference")
    package = str(tmp_path / "aoti.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    _assert_same(_run_elsewhere(Path(package), inputs), module, inputs)


def _network() -> nn.Module:
    model = rf.models.ResNeSt((1, 1, 0, 0), stem_width=8, num_classes=10, fused=False)
    assert len(rf.fuse(model)) == 2
    return model


def _folded() -> nn.Module:
    module = _eval(rf.SplitAttentionConv2d(4, 8, 3, padding=1))
    assert rf.fuse(module, fold=True)
    return module


# Modules with their input's channels, height and width.
ONNX_MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "radix 1": (lambda: rf.FusedSplitAttention(8, radix=1), (8, 9, 7)),
    "radix 2": (lambda: rf.FusedSplitAttention(8, radix=2), (16, 9, 7)),
    "radix 4": (lambda: rf.FusedSplitAttention(8, radix=4), (32, 9, 7)),
    "cardinality 2": (lambda: rf.FusedSplitAttention(8, cardinality=2), (16, 9, 7)),
    "no bn1": (lambda: rf.FusedSplitAttention(8, norm_layer=None), (16, 9, 7)),
    "bn0": (lambda: rf.FusedSplitAttentionConv2d(4, 8, 3, padding=1), (4, 9, 7)),
    "another norm": (lambda: rf.FusedSplitAttention(8, norm_layer=_group_norm), (16, 9, 7)),
    "network": (_network, (3, 64, 64)),
    "folded": (_folded, (4, 9, 7)),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("make", "shape"), ONNX_MODULES.values(), ids=ONNX_MODULES)
def test_onnx(make: Callable[[], nn.Module], shape: tuple[int, int, int], tmp_path: Path) -> None:
    """The exporter takes standard ops unasked, for any batch, height and width."""
    module = _eval(make())
    path = str(tmp_path / "model.onnx")
    dynamic = torch.export.Dim.DYNAMIC
    example = torch.randn(3, *shape)
    program = torch.onnx.export(
        module,
        (example,),
        path,
        input_names=["x"],
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        dynamo=True,
        verbose=False,
    )
    assert {node.domain for node in program.model.graph} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    exact = copy.deepcopy(module).double()
    channels, height, width = shape
    for batch in BATCHES:
        x = torch.randn(batch, channels, height + batch, width - batch)
        (found,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad(), rf.use_backend("reference"):
            truth = exact(x.double())
            bound = (_perturbed(exact, x[0, 0].numel())(x.double()) - truth).abs().max()
        assert found.shape == truth.shape
        assert (torch.from_numpy(found) - truth).abs().max() <= bound


def _perturbed(module: nn.Module, pixels: int) -> nn.Module:
    """A copy whose parameters differ by as much as rounding in float32 amounts to.

    A sum of n rounded terms, in any order, is the exact sum of slightly different terms. They
    differ by n roundings at most. The longest sums are over the pixels, or over a filter.
    """
    twin = copy.deepcopy(module)
    terms = max(pixels, *(parameter[0].numel() for parameter in twin.parameters()))
    for parameter in twin.parameters():
        sign = torch.randint_like(parameter, 2) * 2 - 1
        parameter.data *= 1 + terms * torch.finfo(torch.float32).eps / 2 * sign
    return twin


@pytest.mark.parametrize("program", [True, False])
def test_onnx_cannot_carry_the_op(program: bool) -> None:
    """If it is asked for explicitly, the exporter refuses it by name."""
    module = _block()
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64)
    with (
        rf.use_backend("native"),
        pytest.raises(torch.onnx.OnnxExporterError, match=r"resnest_fused\.split_attention"),
    ):
        if program:
            torch.onnx.export(_export(module, "native"), dynamo=True, verbose=False)
        else:
            torch.onnx.export(module, (x,), dynamo=True, verbose=False)
