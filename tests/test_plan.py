"""The launch planner of the CUDA kernels, for real GPUs' properties and every published model:
limits kept, every element covered once, workspace as it should be."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from build_files import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from resnest_fused import _C, models
from resnest_fused.reference import SplitAttentionConv2d, default_inter_channels

LIMITS = _C.plan_limits()
WARP = 32
KB, MB = 2**10, 2**20


def device(
    architecture: int,
    multiprocessors: int,
    threads: int,
    shared: int,
    optin: int = 48 * KB,
    cluster: int = 1,
) -> dict[str, int]:
    return {
        "multiprocessors": multiprocessors,
        "threads_per_block": 1024,
        "threads_per_multiprocessor": threads,
        "registers_per_multiprocessor": 65536,
        "shared_per_block": 48 * KB,
        "shared_per_block_optin": optin,
        "shared_per_multiprocessor": shared,
        "grid_blocks": 2**31 - 1,
        "cluster_blocks": cluster,
        "architecture": architecture,
        "driver": 13000,
    }


DEVICES = {
    "T4": device(75, 40, 1024, 64 * KB, 64 * KB),
    "A100": device(80, 108, 2048, 164 * KB, 163 * KB),
    "H100": device(90, 132, 2048, 228 * KB, 227 * KB, 8),
    "H200": device(90, 132, 2048, 228 * KB, 227 * KB, 8),
    "B200": device(100, 148, 2048, 228 * KB, 227 * KB, 8),
    "RTX 5090": device(120, 170, 1536, 100 * KB, 99 * KB, 8),
    "tiny": {**device(75, 1, 64, 16 * KB), "threads_per_block": 64, "grid_blocks": 3},
}
H200 = DEVICES["H200"]


class Shape(NamedTuple):
    """What of a split attention does not depend on the call."""

    radix: int
    cardinality: int
    channels: int
    pixels: int
    inter: int

    @property
    def features(self) -> int:
        return self.radix * self.channels


def shape(radix: int, cardinality: int, channels: int, pixels: int) -> Shape:
    return Shape(
        radix, cardinality, channels, pixels, default_inter_channels(channels, radix, reduction=4)
    )


# Models by their resolution. Radix 2, cardinality 1, and in strided blocks the pooling behind the
# attention, which so works at the resolution of the stage before.
RESOLUTIONS = {
    **dict.fromkeys(("resnest14", "resnest26", "resnest50"), 224),
    "resnest101": 256,
    "resnest200": 320,
    "resnest269": 416,
}
# The fast variants of ResNeSt-50 by radix, cardinality, width; they pool before the attention.
FAST = {
    "1s1x64d": (1, 1, 64),
    "2s1x64d": (2, 1, 64),
    "4s1x64d": (4, 1, 64),
    "1s2x40d": (1, 2, 40),
    "2s2x40d": (2, 2, 40),
    "4s2x40d": (4, 2, 40),
    "1s4x24d": (1, 4, 24),
}


def shapes_at(resolution: int) -> set[Shape]:
    shapes = set()
    for stage in range(4):
        own = resolution // (4 << stage)
        for size in {own, own if stage == 0 else 2 * own}:
            shapes.add(shape(2, 1, 64 << stage, size * size))
    return shapes


def fast_shapes(radix: int, cardinality: int, width: int) -> set[Shape]:
    return {
        shape(radix, cardinality, (width << stage) * cardinality, (56 >> stage) ** 2)
        for stage in range(4)
    }


FAMILY = sorted(
    set().union(*map(shapes_at, RESOLUTIONS.values()), *(fast_shapes(*v) for v in FAST.values()))
)


class Mode(NamedTuple):
    """What a call does: its pass and whose statistics the norms have."""

    name: str  # of the pass
    relu: bool = False
    bn0: bool = False
    batch_stats: bool = False
    bn1_batch_stats: bool = False


PROLOGUES = ((False, False), (True, False), (True, True))
MODES = [
    *(Mode("eval", *prologue) for prologue in PROLOGUES),
    *(Mode("train", *prologue, bn1_batch_stats=True) for prologue in PROLOGUES),
    Mode("train", True, True, True, True),
    Mode("train"),
    *(Mode("backward", *prologue, bn1_batch_stats=True) for prologue in PROLOGUES),
    Mode("backward", True, True, True, True),
]
EVAL = MODES[0]


class Call(NamedTuple):
    shape: Shape
    mode: Mode
    batch: int
    element_size: int
    channels_last: bool
    aligned: bool = True

    def workload(self) -> dict[str, Any]:
        mode = self.mode
        return {
            "pass": mode.name,
            "batch": self.batch,
            **self.shape._asdict(),
            "element_size": self.element_size,
            "channels_last": self.channels_last,
            "aligned": self.aligned,
            "relu": mode.relu,
            "bn0": mode.bn0,
            "batch_stats": mode.batch_stats,
            "bn1_batch_stats": mode.bn1_batch_stats,
        }

    @property
    def acc_size(self) -> int:
        return 8 if self.element_size == 8 else 4

    @property
    def x_of_sample(self) -> int:
        return self.shape.features * self.shape.pixels * self.element_size


def plan(gpu: dict[str, int], call: Call) -> dict[str, Any]:
    return _C.plan(gpu, call.workload())


# --- what holds for every plan


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def check_tiling(
    tiling: dict[str, int], gpu: dict[str, int], call: Call, channels: int, pixels: int
) -> None:
    """Every channel and pixel belongs to exactly one block and none of the blocks is empty."""
    threads, lanes, vector = tiling["threads"], tiling["lanes"], tiling["vector"]
    assert threads % WARP == 0
    assert threads <= min(gpu["threads_per_block"], LIMITS["map_threads"])
    assert 1 <= lanes <= threads
    assert vector in (1, 4 if call.channels_last else 16 // call.element_size)
    if vector > 1:
        # Every sample, and in NHWC every pixel, starts at a multiple of 16 bytes.
        assert call.aligned and call.element_size < 8
        row = channels if call.channels_last else channels * pixels
        assert row * call.element_size % 16 == 0
    chunks, chunk = tiling["chunks"], tiling["chunk_pixels"]
    assert (chunks - 1) * chunk < pixels <= chunks * chunk
    assert (tiling["slab"] > 0) == (vector > 1 and not call.channels_last)
    in_lines = vector > 1 and call.channels_last and gpu["architecture"] >= 80
    assert (tiling["copies_at"] > 0) == (tiling["slab"] > 0 or in_lines)
    assert tiling["copies_at"] % 16 == 0
    if call.channels_last:
        assert lanes <= WARP  # so that threads of a warp are side by side, and rows are left
        of_block = lanes * vector
        if vector > 1:
            assert of_block * call.element_size % 16 == 0
    else:
        assert lanes & (lanes - 1) == 0  # what `sum_over_lanes` needs
        of_block = threads // lanes
        # A chunk of several channels would not lie together.
        assert chunks == 1 or of_block == 1
        if vector > 1:
            # Wherever it begins, a slab has room for whole vectors around the block's elements.
            elements = (of_block - 1) * pixels + chunk
            assert tiling["slab"] % vector == 0
            assert tiling["slab"] >= elements + 2 * (vector - 1) - (elements - 2) % vector
    assert (tiling["channel_blocks"] - 1) * of_block < channels
    assert channels <= tiling["channel_blocks"] * of_block


def tiles(rows: int, columns: int, groups: int) -> int:
    return ceil_div(rows, LIMITS["tile_rows"]) * ceil_div(columns, LIMITS["tile_columns"]) * groups


def expected_stages(call: Call, result: dict[str, Any]) -> list[int]:
    """The items of each stage of phase 2."""
    (radix, cardinality, channels, _, inter), mode, batch = call.shape, call.mode, call.batch
    outputs, inputs = channels // cardinality, inter // cardinality
    columns, features = LIMITS["columns"], radix * channels
    of_sums = ceil_div(batch * channels, result["tiling"]["threads"])
    hidden, attention = (tiles(batch, size, cardinality) for size in (inputs, outputs))
    norm = ceil_div(inter, columns)
    if mode.name != "backward":
        gap = of_sums if result["tiling"]["chunks"] > 1 else 0
        return [gap, hidden, norm if mode.bn1_batch_stats else 0, attention]
    weights = [tiles(radix * outputs, inputs, cardinality), tiles(inputs, outputs, cardinality)]
    biases = ceil_div(features, columns)
    return [of_sums, hidden, norm, attention, *weights, biases, biases if mode.bn0 else 0]


def expected_launches(call: Call, result: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The name and the blocks of each launch."""
    mode, batch = call.mode, call.batch
    if kept := result.get("on_chip"):
        yield "on_chip", ceil_div(batch, kept["samples"]) * kept["cluster"]
        return
    of_sample, of_recombine = (
        result[name]["channel_blocks"] * result[name]["chunks"]
        for name in ("tiling", "recombine_tiling")
    )
    stages = sum(expected_stages(call, result))
    if mode.batch_stats and mode.name == "train":
        tiling = result["statistics_tiling"]
        samples = 1 if call.channels_last else batch
        yield "statistics", tiling["channel_blocks"] * tiling["chunks"] * samples
        yield "combine", ceil_div(call.shape.features, LIMITS["columns"])
    suffix = "_backward" if mode.name == "backward" else ""
    yield f"pool{suffix}", batch * of_sample
    yield f"attention{suffix}", stages
    yield f"recombine{suffix}", batch * of_recombine


MAPS = ("statistics", "pool", "recombine", "pool_backward", "recombine_backward")


def tiling_of(name: str, result: dict[str, Any]) -> dict[str, int]:
    own = {"statistics": "statistics", "recombine": "recombine", "recombine_backward": "recombine"}
    return result[f"{own[name]}_tiling" if name in own else "tiling"]


def shared_bytes(name: str, call: Call, result: dict[str, Any]) -> int:
    """What a kernel needs."""
    tiling = tiling_of(name, result)
    threads, acc = tiling["threads"], call.acc_size

    def of_map(sums: int) -> int:
        each = threads * tiling["vector"] if call.channels_last else ceil_div(threads, WARP)
        return each * sums * acc

    product = threads // WARP * LIMITS["tile_rows"] * LIMITS["tile_columns"] * acc
    columns = threads // WARP * LIMITS["columns"] * 8
    width = tiling["lanes"] * tiling["vector"] if call.channels_last else threads // tiling["lanes"]
    radix = 1 if name == "statistics" else call.shape.radix
    held = 3 * min(radix * width, 512 if tiling["vector"] > 1 else WARP) * acc * call.mode.relu
    if tiling["slab"] and name in MAPS:
        # Behind what a pool needs, and a barrier, come slabs for the splits and for dout.
        assert tiling["copies_at"] >= max(of_map(4), held)
        slabs = radix + name.endswith("backward")
        return tiling["copies_at"] + 16 + slabs * tiling["slab"] * call.element_size
    lines = 0
    if tiling["copies_at"] and name in MAPS:
        # Behind bn0's parameters, which are there at the same time; the sums come later.
        assert tiling["copies_at"] >= held
        lines = tiling["copies_at"] + LIMITS["map_threads"] * LIMITS["line_bytes"]
    match name:
        case "statistics":
            return max(of_map(1), lines)
        case "combine":
            return columns
        case "pool":
            return max(of_map(1), held, lines)
        case "pool_backward":
            return max(of_map(4 if call.mode.relu else 1), held, lines)
        case "recombine":  # with a radix that is not compiled it loads splits as it needs them
            return lines if call.shape.radix in (1, 2, 4) else 0
        case "recombine_backward":
            return lines
        case "attention" | "attention_backward":
            return max(product, 2 * columns)
        case _:
            return 0


def check_launches(gpu: dict[str, int], call: Call, result: dict[str, Any]) -> None:
    limit = min(48 * KB, gpu["shared_per_block"])
    resident = LIMITS["blocks_per_multiprocessor"]
    for launch in result["launches"]:
        name, threads, shared = launch["name"], launch["threads"], launch["shared_bytes"]
        if name == "on_chip":
            check_on_chip(gpu, call, result)
            continue
        # The pool opens the stages behind it, of parameters alone too.
        assert launch["blocks"] >= (0 if name.startswith("pool") else 1)
        if name.startswith("attention"):
            assert launch["stages"] == expected_stages(call, result)
        early = gpu["architecture"] >= 90 and gpu["driver"] >= 12030
        assert launch["early"] == (early and _C.tuning()["early_launches"][0] == 1)
        assert threads == result["tiling"]["threads"]  # all within their kernels' launch bounds
        assert shared == shared_bytes(name, call, result), name
        if tiling_of(name, result)["slab"] and name in MAPS:
            assert shared <= gpu["shared_per_block_optin"], name
            assert LIMITS["slab_blocks"] * (shared + KB) <= gpu["shared_per_multiprocessor"], name
        else:
            assert shared <= limit, name
            reserved = KB * (gpu["architecture"] >= 80)
            assert resident * (shared + reserved) <= gpu["shared_per_multiprocessor"], name
    assert (
        resident * result["tiling"]["threads"] * LIMITS["registers"]
        <= gpu["registers_per_multiprocessor"]
    )
    listed = [(launch["name"], launch["blocks"]) for launch in result["launches"]]
    expected = expected_launches(call, result)
    assert listed == [launch for launch in expected if launch[1] > 0 or "pool" in launch[0]]


def check_on_chip(gpu: dict[str, int], call: Call, result: dict[str, Any]) -> None:
    """A cluster has room for its samples, and there is a cluster for every sample."""
    kept, tiling, (launch,) = result["on_chip"], result["tiling"], result["launches"]
    cluster, samples, parts, held = (kept[n] for n in ("cluster", "samples", "parts", "held"))
    assert call.mode.name == "eval" and call.shape.radix == LIMITS["on_chip_radix"]
    assert tiling["vector"] > 1
    assert cluster == gpu["cluster_blocks"] > 1
    assert launch["blocks"] % cluster == 0
    assert parts == tiling["channel_blocks"] * tiling["chunks"]
    assert held * cluster >= samples * parts
    # More samples of a cluster than one only where all clusters that can run are at work.
    at_a_time = max(LIMITS["blocks_per_multiprocessor"] * gpu["multiprocessors"] // cluster, 1)
    assert 1 <= samples <= min(LIMITS["held_samples"], ceil_div(call.batch, at_a_time))
    assert launch["shared_bytes"] == kept["bytes"] <= gpu["shared_per_block_optin"]
    assert kept["x"] + held * kept["part_bytes"] <= kept["bytes"]
    assert kept["part_bytes"] == kept["rows"] * kept["row"] * call.element_size
    # Each row begins at a multiple of 16 bytes, and all of x has room.
    assert kept["x"] % 16 == kept["row"] * call.element_size % 16 == 0
    assert parts * kept["part_bytes"] >= call.x_of_sample


def expected_workspace(call: Call, result: dict[str, Any]) -> int:
    if "on_chip" in result:
        return 0
    shape, mode, batch = call.shape, call.mode, call.batch
    features, channels, chunks = shape.features, shape.channels, result["tiling"]["chunks"]
    counts = [6 * features if mode.bn0 else 0]  # the prologue's arrays
    if mode.name == "backward":
        counts += [chunks * (4 if mode.relu else 1) * batch * features]  # partial sums
        counts += [4 * batch * features if mode.relu else 0]  # sums
        counts += 2 * [batch * features]  # of attention and of logits
        counts += 2 * [batch * shape.inter] + [batch * channels]
    else:
        evaluates = mode.name == "eval"
        if mode.batch_stats:
            rows = (1 if call.channels_last else batch) * result["statistics_tiling"]["chunks"]
            counts += [2 * rows * features]
        if chunks > 1:
            counts += [batch * chunks * channels]
        counts += [batch * channels if evaluates else 0]
        counts += [batch * shape.inter, batch * features if evaluates else 0]
    sizes = [4 * LIMITS["counters"], *(count * call.acc_size for count in counts)]
    return sum(ceil_div(size, 16) * 16 for size in sizes)


def check(gpu: dict[str, int], call: Call) -> dict[str, Any]:
    result = plan(gpu, call)
    shape, batch = call.shape, call.batch
    for tiling in ("tiling", "recombine_tiling"):
        check_tiling(result[tiling], gpu, call, shape.channels, shape.pixels)
    if call.mode.batch_stats and (batch > 0 or not call.channels_last):
        pixels = shape.pixels * (batch if call.channels_last else 1)
        check_tiling(result["statistics_tiling"], gpu, call, shape.features, pixels)
    check_launches(gpu, call, result)
    assert result["workspace_bytes"] == expected_workspace(call, result)
    return result


# --- the published models


@pytest.mark.parametrize("name", sorted(set(models.list_models()) & set(RESOLUTIONS)))
def test_family_is_that_of_the_models(name: str) -> None:
    seen = set()

    def note(module: SplitAttentionConv2d, args: Any, out: torch.Tensor) -> None:
        pixels = out.shape[2:].numel()
        fcs = (module.cardinality, module.channels, pixels, module.inter_channels)
        seen.add(Shape(module.radix, *fcs))

    with torch.device("meta"):
        model = models.create(name, fused=False).eval()
        for module in model.modules():
            if isinstance(module, SplitAttentionConv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, RESOLUTIONS[name], RESOLUTIONS[name]))
    # Where a stage has a single block, none works at the stage's own resolution.
    expected = shapes_at(RESOLUTIONS[name])
    assert seen < expected if name == "resnest14" else seen == expected


def test_family_has_every_radix_and_cardinality() -> None:
    assert {(shape.radix, shape.cardinality) for shape in FAMILY} == {
        *itertools.product((1, 2, 4), (1, 2)),
        (1, 4),
    }


@pytest.mark.parametrize("name", ["H100", "H200", "B200"])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_evaluation_is_one_launch_where_there_are_clusters(
    size: int, nhwc: bool, name: str
) -> None:
    """At nearly every shape of ResNeSt-50 and every batch; mostly two blocks a multiprocessor."""
    gpu = DEVICES[name]
    room = gpu["shared_per_multiprocessor"] // LIMITS["blocks_per_multiprocessor"] - KB
    largest = 0
    for shape, batch in itertools.product(shapes_at(224), (1, 2, 32, 256, 1000)):
        call = Call(shape, Mode("eval", True, True), batch, size, nhwc)
        result = check(gpu, call)
        # An eighth of the largest map of a sample in float32, 3 MB, has no room.
        fits = call.x_of_sample <= 1.6 * MB
        assert [launch["name"] for launch in result["launches"]] == ["on_chip"] or not fits
        if call.x_of_sample <= 0.6 * MB:
            assert result["on_chip"]["bytes"] <= room
        largest = max(largest, call.x_of_sample * fits)
    assert largest > 1.5 * MB


def test_evaluation_on_devices_that_nobody_has() -> None:
    """With shared memory beyond all bounds, and a batch whose clusters cannot be counted."""
    call = Call(shape(2, 1, 64, 224 * 224), Mode("eval"), 1, 2, False)
    check({**H200, "shared_per_block_optin": 2**31 - 1}, call)
    tiny = call._replace(shape=Shape(2, 1, 8, 1, 32), batch=2**30 + 8)
    assert "on_chip" not in check(H200, tiny)


@pytest.mark.parametrize(
    "change",
    [
        {"aligned": False},
        {"element_size": 8},
        {"mode": Mode("train", True, True)},
        {"batch": 0},
        {"shape": shape(1, 1, 64, 3136)},
        {"shape": shape(4, 1, 64, 3136)},
        {"shape": shape(2, 1, 64, 512 * 512)},  # of 64 MB a sample
    ],
    ids=str,
)
def test_evaluation_has_a_launch_a_phase_elsewhere(change: dict[str, Any]) -> None:
    call = Call(shape(2, 1, 64, 3136), Mode("eval", True, True), 32, 2, False)
    assert "on_chip" in check(H200, call)
    assert "on_chip" not in check(H200, call._replace(**change))
    assert "on_chip" not in check({**H200, "cluster_blocks": 1}, call)


# Bytes of workspace by those of x, at most. A half-precision map of 7 x 7 has 98 bytes a channel,
# each of its sums 4; of a single sample the parameters count, too.
WORKSPACE = {"eval": 0.35, "train": 0.36, "backward": 0.72}
WORKSPACE_OF_LARGE_MAPS = {"eval": 0.04, "train": 0.16, "backward": 0.12}  # from 28 x 28 on


@pytest.mark.parametrize("name", DEVICES)
def test_family(name: str) -> None:
    """Every shape in every mode; which batches each has goes around through 1 to 512."""
    gpu = DEVICES[name]
    ends, between = itertools.cycle((1, 512, 512, 1)), itertools.cycle(range(2, 512))
    tilings: dict[Any, Any] = {}
    for shape, mode, size, nhwc in itertools.product(FAMILY, MODES, (2, 4, 8), (False, True)):
        for batch in (next(ends), next(between)):
            call = Call(shape, mode, batch, size, nhwc)
            result = check(gpu, call)
            bound = (WORKSPACE_OF_LARGE_MAPS if shape.pixels >= 784 else WORKSPACE)[mode.name]
            assert result["workspace_bytes"] <= bound * batch * call.x_of_sample, call
            if not (mode.batch_stats or mode.bn1_batch_stats):
                # The order of a sample's sums: one for all batches, and for all passes too.
                order = result["tiling"]
                assert tilings.setdefault((shape, size, nhwc), order) == order


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize(
    "shape", [shape(2, 1, 64, 3136), shape(2, 1, 512, 49), shape(4, 2, 320, 196)]
)
def test_every_batch_is_summed_in_one_order(shape: Shape, nhwc: bool) -> None:
    calls = [Call(shape, EVAL, batch, 2, nhwc) for batch in range(1, 513)]
    assert len({tuple(check(H200, call)["tiling"].values()) for call in calls}) == 1


# --- which elements each thread has


def covered(
    tiling: dict[str, int], samples: int, channels: int, pixels: int, nhwc: bool
) -> np.ndarray:
    """How often (sample, channel, pixel) is visited, by what tiling.h says of `Tiling`
    and map.cuh of vectors: those of NCHW start at multiples of their size in memory."""
    count = np.zeros((samples, channels, pixels), np.int64)
    threads, lanes, vector = tiling["threads"], tiling["lanes"], tiling["vector"]
    per_sample = tiling["channel_blocks"] * tiling["chunks"]
    for block, thread in itertools.product(range(samples * per_sample), range(threads)):
        sample, in_sample = divmod(block, per_sample)
        chunk, channel_block = divmod(in_sample, tiling["channel_blocks"])
        row, lane = divmod(thread, lanes)
        rows = threads // lanes
        if nhwc:
            channel = (channel_block * lanes + lane) * vector
            if channel >= channels or row >= rows:
                continue
            first = chunk * tiling["chunk_pixels"]
            last = min(first + tiling["chunk_pixels"], pixels)
            assert channel + vector <= channels and channel % vector == 0
            count[sample, channel : channel + vector, first + row : last : rows] += 1
        else:
            channel = channel_block * rows + row
            if channel >= channels:
                continue
            begin = chunk * tiling["chunk_pixels"]
            end = min(begin + tiling["chunk_pixels"], pixels)
            head = min(begin + -(channel * pixels + begin) % vector, end)
            vectors = (end - head) // vector
            tail = head + vectors * vector
            for index in range(lane, vectors, lanes):
                first = head + index * vector
                assert ((sample * channels + channel) * pixels + first) % vector == 0
                count[sample, channel, first : first + vector] += 1
            singles = [*range(begin, head), *range(tail, end)]
            count[sample, channel, singles[lane::lanes]] += 1
    return count


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(
    ("channels", "pixels"),
    [
        *[(1, 1), (1, 65), (3, 8), (8, 1), (8, 7), (16, 49), (24, 13), (72, 4), (5, 196), (40, 20)],
        (8, 9001),  # in chunks
    ],
)
def test_every_element_is_covered_once(channels: int, pixels: int, size: int, nhwc: bool) -> None:
    for gpu, aligned in itertools.product((H200, DEVICES["tiny"]), (False, True)):
        mode = Mode("train", True, True, True, True)
        call = Call(Shape(2, 1, channels, pixels, 32), mode, 2, size, nhwc, aligned)
        result = check(gpu, call)
        assert (covered(result["tiling"], 2, channels, pixels, nhwc) == 1).all()
        # The statistics take all features as one split, in NHWC all samples as one.
        samples, pixels_of = (1, 2 * pixels) if nhwc else (2, pixels)
        statistics = covered(result["statistics_tiling"], samples, 2 * channels, pixels_of, nhwc)
        assert (statistics == 1).all()


def test_vectors_have_heads_and_tails() -> None:
    """The test above meets channels that start between two vectors, and vectors wherever there may
    be any."""
    for channels, pixels, nhwc, size, vector in [
        (8, 7, False, 2, 8),
        (16, 49, False, 2, 8),
        (16, 49, True, 2, 4),
        (24, 49, True, 4, 4),
        (12, 49, True, 2, 1),
        (24, 13, False, 4, 4),
        (5, 196, False, 4, 4),
        (5, 196, False, 2, 1),
        (5, 196, True, 4, 1),
        (16, 49, False, 8, 1),
    ]:
        call = Call(Shape(2, 1, channels, pixels, 32), EVAL, 2, size, nhwc)
        assert check(H200, call)["tiling"]["vector"] == vector
        assert check(H200, call._replace(aligned=False))["tiling"]["vector"] == 1


def test_large_maps_have_chunks_in_both_layouts() -> None:
    """In NCHW those of a photograph of 800 x 1333 pixels, and those of many splits."""
    large = shape(2, 1, 64, 200 * 334)
    for of, size in [(large, 2), (large, 4), (shape(16, 1, 64, 3136), 2)]:
        result = check(H200, Call(of, Mode("backward", True, True), 2, size, False))
        assert result["tiling"]["chunks"] > 1
        assert result["tiling"]["vector"] > 1
    # Of a thousand splits no slab has room.
    result = check(H200, Call(shape(1000, 1, 8, 3136), Mode("backward", True, True), 1, 2, False))
    assert result["tiling"]["vector"] == result["tiling"]["chunks"] == 1


def test_statistics_occupy_the_device() -> None:
    """In NHWC, where a few samples of a few channels would be a few blocks."""
    call = Call(shape(2, 1, 64, 3136), Mode("train", True, True, True, True), 32, 2, True)
    [launch] = [a for a in check(H200, call)["launches"] if a["name"] == "statistics"]
    assert launch["blocks"] >= H200["multiprocessors"]


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("shape", [shape(2, 1, 64, 3136), shape(2, 1, 512, 49)])
@pytest.mark.parametrize(("name", "of_eval"), [("A100", 3), ("H200", 1)])
def test_launches_are_few(name: str, of_eval: int, shape: Shape, batch: int, nhwc: bool) -> None:
    """With all that comes behind a convolution: evaluation, and a training step."""

    def count(passed: str, *, batch_stats: bool) -> int:
        mode = Mode(passed, True, True, batch_stats, batch_stats)
        return len(check(DEVICES[name], Call(shape, mode, batch, 2, nhwc))["launches"])

    assert count("eval", batch_stats=False) == of_eval
    assert count("train", batch_stats=True) + count("backward", batch_stats=True) == 8


# --- far from the models


@st.composite
def calls(draw: st.DrawFn, largest: int) -> Call:
    cardinality = draw(st.integers(1, 6))
    count = st.integers(0, largest.bit_length() - 1).flatmap(lambda n: st.integers(1, 2**n))
    shape = Shape(
        draw(st.sampled_from((1, 2, 2, 3, 4, 5))),
        cardinality,
        cardinality * draw(count),
        draw(count),
        cardinality * draw(st.integers(1, 600)),
    )
    batch = draw(st.one_of(st.just(0), count))
    aligned, nhwc = draw(st.booleans()), draw(st.booleans())
    return Call(
        shape, draw(st.sampled_from(MODES)), batch, draw(st.sampled_from((2, 4, 8))), nhwc, aligned
    )


gpus = st.one_of(
    st.sampled_from(list(DEVICES.values())),
    st.fixed_dictionaries(
        {
            "multiprocessors": st.integers(1, 300),
            "threads_per_block": st.integers(32, 1024),
            "threads_per_multiprocessor": st.just(2048),
            "registers_per_multiprocessor": st.just(65536),
            "shared_per_block": st.just(48 * KB),
            "shared_per_block_optin": st.sampled_from([48 * KB, 99 * KB, 227 * KB]),
            "shared_per_multiprocessor": st.sampled_from([100 * KB, 228 * KB]),
            "cluster_blocks": st.sampled_from([1, 2, 8]),
            "architecture": st.sampled_from([75, 80, 90]),
            "driver": st.sampled_from([12000, 13000]),
            "grid_blocks": st.integers(1, 2**31 - 1),
        }
    ),
)


@settings(max_examples=200, deadline=None)
@given(gpu=gpus, call=calls(2**13))
def test_any_call(gpu: dict[str, int], call: Call) -> None:
    check(gpu, call)


@settings(max_examples=150, deadline=None)
@given(gpu=gpus, call=calls(2**31 - 1))
def test_no_call_is_too_large(gpu: dict[str, int], call: Call) -> None:
    """It has a plan in the kernels' integers or is refused."""
    try:
        result = check(gpu, call)
    except ValueError as error:
        reasons = ("too many elements", "2^50 elements", "from 1 to")
        assert any(reason in str(error) for reason in reasons)
        return
    for tiling in (result["tiling"], result.get("statistics_tiling", result["tiling"])):
        assert max(tiling.values()) <= LIMITS["most_pixels"] < 2**31
        assert call.shape.channels <= LIMITS["most_channels"]
    for launch in result["launches"]:
        if launch["name"] in ("pool", "recombine", "statistics", "pool_backward"):
            assert launch["blocks"] <= LIMITS["most_blocks"] < 2**31


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nhwc", [False, True])
def test_empty_batch(mode: Mode, nhwc: bool) -> None:
    """What is left are the launches over parameters, and the pool that opens their stages."""
    result = check(H200, Call(shape(2, 1, 64, 3136), mode, 0, 2, nhwc))
    assert {launch["name"] for launch in result["launches"]} <= {
        *("combine", "pool", "attention", "pool_backward", "attention_backward"),
    }


MOST = LIMITS["most_pixels"]


@pytest.mark.parametrize(
    ("change", "nhwc", "fits"),
    [
        ({"pixels": MOST}, False, True),
        ({"pixels": MOST + 1}, False, False),
        ({"pixels": MOST}, True, True),
        ({"pixels": MOST + 1}, True, False),
        ({"pixels": 2**31 - 1}, True, False),
        ({"channels": MOST}, False, True),
        ({"channels": MOST + 1}, False, False),
        ({"channels": MOST + 1}, True, False),
    ],
)
def test_largest_sample(change: dict[str, int], nhwc: bool, fits: bool) -> None:
    call = Call(Shape(1, 1, 1, 1, 32)._replace(**change), EVAL, 1, 2, nhwc)
    if fits:
        check(H200, call)
    else:
        with pytest.raises(ValueError, match="x: too many elements"):
            plan(H200, call)


def test_largest_batch() -> None:
    """Blocks are counted in 31 bits, and statistics' pixels in 30."""
    call = Call(Shape(2, 1, 128, 1, 32), Mode("train"), 2**30 - 1, 2, False)
    result = check(H200, call)
    assert result["launches"][0]["blocks"] == 2 * call.batch
    with pytest.raises(ValueError, match="x: too many elements"):
        plan(H200, call._replace(batch=2**30))
    with_statistics = call._replace(
        mode=Mode("train", True, True, True), batch=2**25, shape=Shape(2, 1, 8, 32, 32)
    )
    with_statistics = with_statistics._replace(channels_last=True)
    check(H200, with_statistics)
    with pytest.raises(ValueError, match="x: too many elements"):
        plan(H200, with_statistics._replace(batch=2**25 + 1))


# --- what is refused


WORKLOAD = Call(shape(2, 1, 64, 3136), EVAL, 4, 2, False).workload()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pass": "forward"}, "pass: expected eval, train or backward, got 'forward'"),
        ({"pass": 1}, "pass: expected a string, got 1"),
        ({"batch": -1}, "batch: expected an integer from 0 to 2147483647, got -1"),
        ({"batch": 2**31}, "batch: expected an integer from 0 to 2147483647, got 2147483648"),
        ({"batch": 2**70}, "batch: expected an integer"),
        ({"batch": 1.0}, r"batch: expected an integer .*, got 1\.0"),
        ({"batch": True}, "batch: expected an integer .*, got True"),
        ({"batch": None}, "batch: expected an integer .*, got None"),
        ({"radix": 0}, "radix: expected an integer from 1"),
        ({"cardinality": 0}, "cardinality: expected an integer from 1"),
        ({"channels": 0}, "channels: expected an integer from 1"),
        ({"inter": 0}, "inter: expected an integer from 1"),
        ({"pixels": 0}, "pixels: expected an integer from 1"),
        ({"element_size": 3}, "element_size: expected 2, 4 or 8, got 3"),
        ({"element_size": 16}, "element_size: expected an integer from 2 to 8, got 16"),
        ({"cardinality": 3, "inter": 33}, "channels: expected a multiple of cardinality, got 64"),
        ({"cardinality": 64}, "inter: expected a multiple of cardinality, got 32"),
        ({"channels_last": 1}, "channels_last: expected True or False, got 1"),
        ({"aligned": "yes"}, "aligned: expected True or False, got 'yes'"),
        ({"bn0": True}, "relu: expected True behind bn0, got False"),
        ({"pass": "train", "batch_stats": True}, "batch_stats: expected False without bn0"),
        (
            {"relu": True, "bn0": True, "batch_stats": True},
            "batch_stats: expected False in evaluation, got True",
        ),
        ({"bn1_batch_stats": True}, "bn1_batch_stats: expected False in evaluation, got True"),
        ({"batch": 2**31 - 1, "pixels": 2**20}, r"batch: expected at most 2\^50 elements"),
        ({"batch": 2**31 - 1, "inter": 2**20}, r"batch: expected at most 2\^50 elements"),
        ({"widht": 7}, "unknown field 'widht'"),
        ({7: 7}, "unknown field 7"),
    ],
)
def test_workload_is_refused(change: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^workload: {message}"):
        _C.plan(H200, {**WORKLOAD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiprocessors": 0}, "multiprocessors: expected an integer from 1"),
        ({"threads_per_block": 31}, "threads_per_block: expected an integer from 32"),
        ({"grid_blocks": 0}, "grid_blocks: expected an integer from 1"),
        ({"name": "H200"}, "unknown field 'name'"),
    ],
)
def test_device_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^device: {message}"):
        _C.plan({**H200, **change}, WORKLOAD)


@pytest.mark.parametrize("field", WORKLOAD)
def test_workload_lacks_a_field(field: str) -> None:
    without = {name: value for name, value in WORKLOAD.items() if name != field}
    with pytest.raises(ValueError, match=f"^workload: missing field {field}$"):
        _C.plan(H200, without)


@pytest.mark.parametrize("field", H200)
def test_device_lacks_a_field(field: str) -> None:
    without = {name: value for name, value in H200.items() if name != field}
    with pytest.raises(ValueError, match=f"^device: missing field {field}$"):
        _C.plan(without, WORKLOAD)


def test_largest_sample_of_an_empty_batch() -> None:
    with pytest.raises(ValueError, match="at most 2\\^50 elements"):
        plan(H200, Call(Shape(2, 1, 2**30, 2**30, 32), EVAL, 0, 8, False))


# --- what is compiled with it


def included_by(name: str) -> set[str]:
    """A file of csrc/ with all of ours that it includes."""
    if name == "ops_generated.h":  # from the table, when the package is built
        return {name}
    text = (ROOT / "csrc" / name).read_text()
    ours = re.findall(r'^#include "(.+)"', text, re.MULTILINE)
    return {name}.union(*map(included_by, ours))


def test_a_cost_recompiles_no_kernel() -> None:
    names = [path.relative_to(ROOT / "csrc").as_posix() for path in ROOT.glob("csrc/cuda/*.cu")]
    files = [included_by(name) for name in names]
    assert not any("cuda/tuning.h" in of_one for of_one in files)
    with_kernels = [of_one for of_one in files if "cuda/dispatch.h" in of_one]
    assert with_kernels
    for of_one in with_kernels:
        assert "cuda/tiling.h" in of_one and "cuda/planner.h" not in of_one
    assert "cuda/tuning.h" in included_by("cuda/planner.cpp")
