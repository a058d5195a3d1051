"""The runtime for CUDA kernels on the CPU: right kernels pass, each kind of mistake is found."""

from __future__ import annotations

import ctypes
import re
import subprocess

import numpy as np
import pytest
import torch
from cuda_on_host import toys
from cuda_on_host.build import HERE, KINDS, Source, build, run_python
from torch import Tensor


def library(kind: str) -> str:
    return str(build({kind: [Source(HERE / "toy.cu")]})[kind])


@pytest.fixture
def plain() -> toys.Toys:
    return toys.Toys(library("plain"))


def run_toy(kind: str, name: str) -> subprocess.CompletedProcess[str]:
    return run_python(kind, str(HERE / "toys.py"), library(kind), name)


def _long_with_sanitizer(*cases: tuple[str, ...]) -> list[object]:
    return [pytest.param(*c, marks=[pytest.mark.long] if c[0] != "plain" else []) for c in cases]


@pytest.mark.parametrize("kind", _long_with_sanitizer(*((kind,) for kind in KINDS)))
def test_right_kernels(kind: str) -> None:
    result = run_toy(kind, "right")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("kind", "name", "report"),
    _long_with_sanitizer(
        ("plain", "no_barrier", "expected {128.0}, got"),
        ("thread", "no_barrier", "ThreadSanitizer: data race .*sum_blocks"),
        ("thread", "no_acquire", "ThreadSanitizer: data race .*relay"),
        ("thread", "shuffle_as_barrier", "ThreadSanitizer: data race .*share_in_warp"),
        ("thread", "blocks_at_one_place", "ThreadSanitizer: data race .*one_place"),
        ("address", "beyond_shared", "AddressSanitizer: heap-buffer-overflow .*read_shared"),
        ("address", "beyond_global", "AddressSanitizer: heap-buffer-overflow .*read_shared"),
        ("address", "misaligned", "runtime error: reference binding to misaligned .*float4"),
    ),
)
def test_wrong_kernels(kind: str, name: str, report: str) -> None:
    result = run_toy(kind, name)
    assert result.returncode != 0
    summary = result.stderr.replace("\n", " ")
    assert re.search(report, summary), result.stderr


def floats_from(values: Tensor) -> Tensor:
    """The float32 numbers between which the rounding to those 16-bit ``values`` is decided."""
    numbers = values[values.isfinite()].double().sort().values
    middles = ((numbers[1:] + numbers[:-1]) / 2).numpy().astype(np.float32)
    largest = np.float32(numbers[-1]) + (np.float32(numbers[-1]) - middles[-1])
    decisive = np.concatenate([middles, [largest, -largest], values.float().numpy()])
    decisive = decisive.astype(np.float32)
    decisive = decisive[~np.isnan(decisive)]
    around = [np.nextafter(decisive, np.float32(to)) for to in (-np.inf, np.inf)]
    found = torch.from_numpy(np.concatenate([decisive, *around, np.float32([np.nan])]))
    return torch.nn.functional.pad(found, (0, -found.numel() % 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions(dtype: torch.dtype, plain: toys.Toys) -> None:
    """All 65,536 numbers, and the rounding wherever it changes."""

    def same(found: Tensor, expected: Tensor) -> bool:
        bits = torch.int32 if found.dtype == torch.float32 else torch.int16
        equal = found.view(bits) == expected.view(bits)
        return bool((equal | (found.isnan() & expected.isnan())).all())

    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    of_half, of_bfloat16 = torch.empty(2, 2**16)
    said = plain("widen", 2**16 // 64, pointer(values), pointer(of_half), pointer(of_bfloat16))
    assert said == toys.OK
    assert same(of_half if dtype == torch.float16 else of_bfloat16, values.float())

    numbers = floats_from(values)
    half = torch.empty_like(numbers, dtype=torch.float16)
    bfloat16 = torch.empty_like(numbers, dtype=torch.bfloat16)
    said = plain(
        "convert", numbers.numel() // 64, pointer(numbers), pointer(half), pointer(bfloat16)
    )
    assert said == toys.OK
    assert same(half if dtype == torch.float16 else bfloat16, numbers.to(dtype))
