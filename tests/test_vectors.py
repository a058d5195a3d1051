"""The CPU's vectors, function by function, under each instruction set of this machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cuda_on_host.build import COMPILER, CSRC

from resnest_fused.backends import native

BYTES = {"baseline": 16, "avx2": 32, "avx512": 64}
BEST = str(native.build_info()["cpu_capability"])
SETS = list(BYTES)[: list(BYTES).index(BEST) + 1]
TARGETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# Whether a * b + c is rounded once.
FUSES = {"baseline": platform.machine() == "aarch64", "avx2": True, "avx512": True}
FLOATS = (np.float32, np.float64)
DTYPES = ("float32", "float64", "float16", "bfloat16")
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-39, 3e38, -3e38, 1.0, -1.0]

Array = npt.NDArray[np.generic]
Run = Callable[..., bytes]


@pytest.fixture(scope="module", params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(instruction_set: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    program = tmp_path_factory.mktemp("vectors") / instruction_set
    source = Path(__file__).with_name("vectors.cpp")
    # As the build has them, or the compiler may fuse what is not to be fused.
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wno-psabi", f"-I{CSRC}"]
    flags += [f"-DRF_SET={instruction_set}", f"-DRF_REGISTER_BYTES={BYTES[instruction_set]}"]
    flags += TARGETS[instruction_set]
    subprocess.run([*COMPILER, *flags, str(source), "-o", str(program)], check=True)

    def run(function: str, of: npt.ArrayLike, *options: str) -> bytes:
        return subprocess.run(
            [program, function, *options],
            input=np.ascontiguousarray(of).tobytes(),
            capture_output=True,
            check=True,
        ).stdout

    return run


def assert_same(found: Array, expected: Array) -> None:
    """Equal to the bit, the signs of zeros included, except in which NaN is which."""
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found[found == 0]), np.signbit(expected[found == 0]))


def all_patterns() -> npt.NDArray[np.uint16]:
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return torch.tensor(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def test_a_vector_fills_a_register(run: Run, instruction_set: str) -> None:
    assert np.frombuffer(run("width", []), np.int64) == BYTES[instruction_set]


@pytest.mark.parametrize("function", ["widen", "load_one"])
def test_each_16_bit_number_is_widened(run: Run, function: str) -> None:
    bits = all_patterns()
    half = np.frombuffer(run(f"{function} float16", bits), np.float32)
    assert_same(half, bits.view(np.float16).astype(np.float32))
    bfloat16 = np.frombuffer(run(f"{function} bfloat16", bits), np.float32)
    assert_same(bfloat16, from_bfloat16(bits))


def test_float16_keeps_its_subnormal_numbers_where_float32_s_are_flushed(run: Run) -> None:
    """After ``torch.set_flush_denormal(True)``, whatever the instruction set."""
    bits = all_patterns()
    half = np.frombuffer(run("widen float16", bits, "flush"), np.float32)
    assert_same(half, bits.view(np.float16).astype(np.float32))


def ties(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """These numbers, those in the middle between neighbours, and the next ones on both sides."""
    finite = np.unique(values[np.isfinite(values)])
    middle = (finite[:-1].astype(np.float64) + finite[1:]) / 2
    exact = middle.astype(np.float32)
    beside = [np.nextafter(exact, np.float32(to)) for to in (-np.inf, np.inf)]
    return np.concatenate([values, exact, *beside])


def test_narrowing_rounds_to_nearest_and_ties_to_even(run: Run) -> None:
    bits = all_patterns()
    rng = np.random.default_rng()
    anything = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    beyond = np.float32([65519.9, 65520, 65520.1, -65520, *SPECIAL])

    for name, numbers in (
        ("float16", bits.view(np.float16).astype(np.float32)),
        ("bfloat16", from_bfloat16(bits)),
    ):
        values = np.concatenate([ties(numbers), anything.view(np.float32), beyond])
        values = np.concatenate([values, np.zeros(-len(values) % 16, np.float32)])
        found = np.frombuffer(run(f"narrow {name}", values), np.uint16)
        if name == "float16":
            with np.errstate(over="ignore"):
                assert_same(found.view(np.float16), values.astype(np.float16))
        else:
            assert_same(from_bfloat16(found), from_bfloat16(to_bfloat16(values)))


def rounded(exact: Fraction, dtype: type[np.floating]) -> np.floating:
    """The nearest number of the dtype."""
    near = dtype(float(exact))
    around = [near, np.nextafter(near, dtype(-np.inf)), np.nextafter(near, dtype(np.inf))]
    return min(around, key=lambda value: abs(Fraction(float(value)) - exact))


@pytest.mark.parametrize("dtype", FLOATS)
def test_multiply_add_rounds_once_where_the_machine_does(
    run: Run, instruction_set: str, dtype: type[np.floating]
) -> None:
    a, b, c = np.random.default_rng().standard_normal((3, 1024)).astype(dtype)
    c = np.where(np.arange(1024) % 2, -a * b, c)  # what is left are the product's last digits
    found = np.frombuffer(run(f"fma {dtype.__name__}", [a, b, c]), dtype)
    if FUSES[instruction_set]:
        exact = [
            Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            for x, y, z in zip(a, b, c, strict=True)
        ]
        expected = np.array([rounded(value, dtype) for value in exact])
    else:
        expected = a * b + c
    np.testing.assert_array_equal(found, expected)

    grid = np.array([(x, y, z) for x in SPECIAL for y in SPECIAL for z in SPECIAL], dtype).T
    found = np.frombuffer(run(f"fma {dtype.__name__}", grid), dtype)
    with np.errstate(all="ignore"):
        x, y, z = grid.astype(np.longdouble) if FUSES[instruction_set] else grid
        expected = (x * y + z).astype(dtype)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_larger_one_is_the_second_where_either_is_nan(
    run: Run, dtype: type[np.floating]
) -> None:
    a, b, _ = grid = np.array([(x, y, 0) for x in SPECIAL for y in SPECIAL], dtype).T
    found = np.frombuffer(run(f"larger {dtype.__name__}", grid), dtype)
    assert_same(found, np.where(a > b, a, b))


@pytest.mark.parametrize("dtype", FLOATS)
def test_relu_passes_nan(run: Run, dtype: type[np.floating]) -> None:
    grid = np.array([(x, y, 0) for x in SPECIAL for y in SPECIAL], dtype).T
    a, n = grid[0], grid[1]
    found = np.frombuffer(run(f"relu {dtype.__name__}", grid), dtype)
    assert_same(found, np.where(a <= 0, dtype(0), a))
    found = np.frombuffer(run(f"relu_backward {dtype.__name__}", grid), dtype)
    assert_same(found, np.where(n <= 0, dtype(0), a))


@pytest.mark.parametrize("dtype", FLOATS)
def test_exponential_of_what_is_not_positive(run: Run, dtype: type[np.floating]) -> None:
    drawn = -np.random.default_rng().exponential(20, 4096 - 16)
    special = [0, -0.0, -np.inf, np.nan, -1e-45, -86.99999, -87, -87.5, -103, -1e30, *[-1] * 6]
    x = np.array([*drawn, *special], dtype)
    found = np.frombuffer(run(f"exp_nonpositive {dtype.__name__}", [x, x, x]), dtype)
    with np.errstate(under="ignore"):
        exact = np.exp(x.astype(np.longdouble))
    flushed = x < -87 if dtype is np.float32 else np.zeros_like(x, bool)
    assert np.all(found[flushed] == 0)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
    kept = ~flushed & ~np.isnan(x)
    error = np.abs(found[kept] - exact[kept]) / np.spacing(exact[kept].astype(dtype))
    # The polynomial is off by less than 1 ulp, and four roundings of half an ulp follow at most.
    assert error.max() < 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_broadcast_keeps_the_bits(run: Run, instruction_set: str, dtype: type[np.floating]) -> None:
    lanes = BYTES[instruction_set] // dtype().itemsize
    values = np.array(SPECIAL, dtype)
    rows = np.zeros((len(values), lanes), dtype)
    rows[:, 0] = values
    found = np.frombuffer(run(f"broadcast {dtype.__name__}", [rows, rows, rows]), dtype)
    assert_same(found, np.repeat(values, lanes))


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_over_lanes(run: Run, instruction_set: str, dtype: type[np.floating]) -> None:
    lanes = BYTES[instruction_set] // dtype().itemsize
    # Integers, whose sums are exact in any order.
    rows = np.random.default_rng().integers(-1000, 1000, (50, 8, lanes)).astype(dtype)
    rows[7, 3, -1], rows[9, 0, 0] = np.nan, np.inf
    sums = rows.sum(-1, dtype=np.float64)
    several = [sums[:, :count] for count in (1, 2, 4, 8)]
    found = np.frombuffer(run(f"sum_lanes {dtype.__name__}", rows), np.float64)
    assert_same(found.reshape(50, -1), np.concatenate([sums, *several], axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_vector(run: Run, instruction_set: str, dtype: str) -> None:
    stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    accumulator = np.float64 if dtype == "float64" else np.float32
    lanes = BYTES[instruction_set] // accumulator().itemsize
    numbers = np.random.default_rng().integers(1, 100, 2 * lanes)
    elements = numbers.astype(np.float32)
    elements = to_bfloat16(elements) if dtype == "bfloat16" else elements.astype(stored)
    first, second = elements.reshape(2, lanes)
    at = np.arange(lanes)
    zero = np.zeros_like(first)
    expected = []
    for n in range(1, lanes + 1):
        # The rest of a row that ends at the n-th element of the second vector.
        ends = elements[n : n + lanes]
        expected += [
            np.where(at < n, first, zero),
            np.where(at >= lanes - n, ends, zero),
            np.where(at >= lanes - n, first, zero),
            np.where(at < n, first, zero),
            np.where(at < n, first, second),
        ]
    found = np.frombuffer(run(f"parts {dtype}", elements), stored)
    np.testing.assert_array_equal(found.reshape(-1, lanes), [*expected, first])
