"""A model of the CUDA kernels' time, from the planner's launches and the compiled code.

It needs no GPU. :func:`predict` takes what the planner would launch on a GPU and what nvcc made of
the kernels (``sass.py``), and gives for each launch the bytes that it keeps in flight and the time
it takes. All else that it knows are the constants below, each with its source. ``predicted.py``
judges it by what was measured.

A launch takes its fixed time, and then the longest of what bounds it, where what comes close adds
up in part (``OVERLAP``):

- memory: the bytes that it must move, at the rate of a copy;
- L2: the bytes that its threads load and store;
- waiting: the waits of one block, one after the other, times the blocks that a place in a
  multiprocessor has in turn;
- instructions: those of all warps of a multiprocessor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sass
from grid import DTYPES, Case

from resnest_fused import _C
from resnest_fused.reference import default_inter_channels

WARP = 32
KB, MB = 2**10, 2**20


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU.

    Multiprocessors, clock (boost) and memory bandwidth are from NVIDIA's data sheets; sizes of a
    multiprocessor from the CUDA programming guide's table by compute capability.
    """

    name: str
    arch: str
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float
    l2_bytes: int
    threads: int  # of a multiprocessor, and so on
    blocks: int
    shared_bytes: int
    # Of a load, in cycles, without other work: github.com/markdewing/AI_kernels, latency/README.md.
    # It has no Turing and no A100, which take what it has for a V100.
    l2_cycles: int
    memory_cycles: int
    doubles_per_cycle: int  # float64 instructions of a thread: programming guide, by capability
    registers: int = 65536

    def planned(self) -> dict[str, int]:
        """As the planner takes it."""
        return {
            "multiprocessors": self.multiprocessors,
            "threads_per_block": 1024,
            "threads_per_multiprocessor": self.threads,
            "registers_per_multiprocessor": self.registers,
            "shared_per_block": 48 * KB,
            "shared_per_multiprocessor": self.shared_bytes,
            "grid_blocks": 2**31 - 1,
        }

    def resident(self, kernel: sass.Kernel, threads: int, shared_bytes: int) -> int:
        """Blocks of a kernel that a multiprocessor holds at a time."""
        # Registers are given to a warp in units of 256, shared memory to a block in units of 128.
        of_warp = -(-kernel.registers * WARP // 256) * 256
        shared = -(-(shared_bytes + kernel.shared_bytes) // 128) * 128
        return min(
            self.threads // threads,
            self.blocks,
            self.registers // of_warp // (threads // WARP),
            self.shared_bytes // shared if shared else self.blocks,
        )


# An A100 of 80 GB and an H100 as SXM.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", "sm_75", 40, 1.590e9, 320e9, 4 * MB, 1024, 16, 64 * KB, 221, 460, 2),
        Gpu("A100", "sm_80", 108, 1.410e9, 2039e9, 40 * MB, 2048, 32, 164 * KB, 221, 460, 32),
        Gpu("L4", "sm_89", 58, 2.040e9, 300e9, 48 * MB, 1536, 24, 100 * KB, 296, 636, 2),
        Gpu("H100", "sm_90", 132, 1.980e9, 3350e9, 50 * MB, 2048, 32, 228 * KB, 281, 690, 64),
        Gpu("H200", "sm_90", 132, 1.980e9, 4800e9, 50 * MB, 2048, 32, 228 * KB, 281, 690, 64),
        Gpu("B200", "sm_100", 148, 1.965e9, 8000e9, 126 * MB, 2048, 32, 228 * KB, 295, 860, 64),
    )
}


@dataclass(frozen=True)
class Constants:
    """What is the same for all GPUs.

    Where it says fitted: to the ops that stream maps and the evaluations at 64@56 and 128@28 under
    ``results/h100``, by least squares of log(predicted / measured), whose root mean is 0.11.
    """

    # Of the memory's bandwidth in a copy. An H100 was measured: 3,025 of 3,350 GB/s.
    copy_share: float = 0.9
    # Bytes that a multiprocessor takes from L2 in a cycle, when all do: RRZE's gpu-benches reads
    # 9.7 TB/s on an H200.
    l2_bytes_per_cycle: float = 37.0
    # Instructions of a warp that a multiprocessor's four schedulers issue in a cycle, at most.
    issued_per_cycle: float = 4.0
    # Fitted: what a launch takes in a graph beside its kernel's work, in seconds.
    launch_s: float = 2.5e-6
    # Fitted: how many times as long as alone a load from memory takes while all others load.
    under_load: float = 1.6
    # Fitted: the exponent p of (a^p + b^p + ...)^(1/p).
    overlap: float = 2.6
    # Fitted: cycles of barriers, with what is read from shared memory behind them.
    barrier_cycles: float = 100.0


CONSTANTS = Constants()


class Map(NamedTuple):
    """What a kernel that streams a map moves beside x, which all of them read."""

    reads_dout: bool = False
    writes_out: bool = False
    writes_x: bool = False


MAPS = {
    "statistics": Map(),
    "pool": Map(),
    "recombine": Map(writes_out=True),
    "pool_backward": Map(reads_dout=True),
    "recombine_backward": Map(reads_dout=True, writes_x=True),
}
PRODUCTS = ("hidden", "attention", "hidden_gradient", "gradients")
COLUMNS = ("combine", "batch_norm", "batch_norm_backward", "prologue_backward")
ELEMENTS = ("prepare", "pool_finish", "pool_backward_finish")


# Waits for L2 one after the other outside of loops, as the source has them. Counted from the code
# they would be several times as many: each dtype of a parameter has a branch of its own.
CHAINS = {
    "prepare": 4,
    "pool_finish": 0,
    "pool_backward_finish": 4,
    "hidden": 4,
    "attention": 2,
    "hidden_gradient": 0,
    "gradients": 0,
    "combine": 3,
    "batch_norm": 3,
    "batch_norm_backward": 4,
    "prologue_backward": 2,
    "statistics": 1,
    "pool": 1,
    "recombine": 1,
    "pool_backward": 1,
    "recombine_backward": 1,
}
# Instructions of a thread behind a product's loop, on the one way that it takes: the sums of eight
# warps, bias and norm. And branches for a parameter's dtype, of which a thread takes one.
BEHIND_A_PRODUCT = 300
DTYPES_OF_PARAMETERS = 4


class Bounds(NamedTuple):
    """Seconds that each resource would take alone."""

    memory: float
    l2: float
    waiting: float
    instructions: float


class Prediction(NamedTuple):
    """Of one launch.

    Attributes:
        name: of the launch.
        blocks: of its grid.
        resident: blocks that a multiprocessor can hold at a time.
        in_flight: bytes of maps that it loads at a time, in the mean over all multiprocessors; 0
            for a kernel that streams no map.
        share: bytes of the maps that a multiprocessor loads in all. More cannot be in flight.
        bounds: what bounds its time.
        seconds: its time.
    """

    name: str
    blocks: int
    resident: int
    in_flight: float
    share: float
    bounds: Bounds
    seconds: float


class Work(NamedTuple):
    """Of one launch: what a block does, and what all of them move."""

    waiting: float  # cycles of the waits of a block, one after the other
    issued: float  # instructions of a warp
    doubles: float  # of them in float64
    in_flight: float = 0.0  # bytes of a block's loads of maps
    memory_bytes: float = 0.0
    l2_bytes: float = 0.0
    loaded_bytes: float = 0.0  # of maps


def predict(
    gpu: Gpu,
    kernels: Mapping[str, sass.Kernel],
    workload: Mapping[str, Any],
    constants: Constants = CONSTANTS,
) -> list[Prediction]:
    """The launches of a call, in their order.

    Args:
        gpu: where it would run.
        kernels: of the GPU's architecture, by name, as ``sass.read`` gives them.
        workload: as the planner takes it.
        constants: those of the model.

    Raises:
        KeyError: a launch's kernel is not among the kernels.
        ValueError: the model does not know a launch.
    """
    plan = _C.plan(gpu.planned(), dict(workload))
    predictions = []
    for launch in plan["launches"]:
        name = launch["name"]
        if name not in CHAINS:
            raise ValueError(f"the model does not know the launch {name!r}")
        kernel = kernels[instance(name, workload, plan[_TILINGS.get(name, "tiling")])]
        at = _Launch(gpu, kernel, workload, plan, launch, constants)
        predictions.append(_predict_launch(at))
    return predictions


class _Launch(NamedTuple):
    """A launch with all that its time depends on."""

    gpu: Gpu
    kernel: sass.Kernel
    workload: Mapping[str, Any]
    plan: Mapping[str, Any]
    launch: Mapping[str, Any]
    constants: Constants


def _predict_launch(at: _Launch) -> Prediction:
    gpu, kernel, _, _, launch, constants = at
    name, blocks, threads = launch["name"], launch["blocks"], launch["threads"]
    works = {
        **dict.fromkeys(MAPS, _map_work),
        **dict.fromkeys(PRODUCTS, _product_work),
        **dict.fromkeys(COLUMNS, _column_work),
        **dict.fromkeys(ELEMENTS, _element_work),
    }
    work = works[name](at)
    warps = threads / WARP
    resident = gpu.resident(kernel, threads, launch["shared_bytes"])
    of_one = blocks / gpu.multiprocessors  # blocks of a multiprocessor in all
    rounds = max(of_one / resident, 1.0)
    issued = warps * work.issued / constants.issued_per_cycle
    issued += warps * WARP * work.doubles / gpu.doubles_per_cycle
    bounds = Bounds(
        memory=work.memory_bytes / (gpu.bytes_per_s * constants.copy_share),
        l2=work.l2_bytes
        / (constants.l2_bytes_per_cycle * min(of_one, 1.0) * gpu.multiprocessors * gpu.clock_hz),
        waiting=rounds * (work.waiting + issued) / gpu.clock_hz,
        instructions=max(of_one, 1.0) * issued / gpu.clock_hz,
    )
    p = constants.overlap
    seconds = constants.launch_s + sum(bound**p for bound in bounds) ** (1 / p)
    return Prediction(
        name,
        blocks,
        resident,
        min(resident, of_one) * work.in_flight,
        work.loaded_bytes / gpu.multiprocessors,
        bounds,
        seconds,
    )


_TILINGS = {
    "statistics": "statistics_tiling",
    "recombine": "recombine_tiling",
    "recombine_backward": "recombine_tiling",
}


def instance(name: str, workload: Mapping[str, Any], tiling: Mapping[str, int]) -> str:
    """The kernel of a launch, as dispatch.h picks it; of 16-bit maps that with bfloat16."""
    size = workload["element_size"]
    if name not in MAPS:
        return f"{name}_kernel<{'double' if size == 8 else 'float'}>"
    element = {2: "__nv_bfloat16", 4: "float", 8: "double"}[size]
    vector, radix = tiling["vector"], workload["radix"]
    compiled = radix if vector > 1 and radix in (1, 2, 4) else 0
    nhwc, relu = (str(workload[flag]).lower() for flag in ("channels_last", "relu"))
    of_map = [element, nhwc, vector]
    if name != "statistics":
        of_map = [element, nhwc, compiled, vector, relu]
    return f"{name}_kernel<{', '.join(map(str, of_map))}>"


def _loop_with_most_loads(kernel: sass.Kernel) -> sass.Loop:
    return max(kernel.loading, key=lambda loop: sum(i.width for i in loop.loads))


def _doubles(body: Sequence[sass.Instruction]) -> int:
    return sum(i.name.startswith(("DADD", "DMUL", "DFMA")) for i in body)


def _barriers(kernel: sass.Kernel) -> int:
    return sum(i.name.startswith("BAR") for i in kernel.body)


def _map_work(at: _Launch) -> Work:
    gpu, kernel, workload, plan, launch, constants = at
    name = launch["name"]
    of, tiling = MAPS[name], plan[_TILINGS.get(name, "tiling")]
    nhwc, radix = workload["channels_last"], workload["radix"]
    unit = math.prod(workload[field] for field in ("batch", "channels", "pixels", "element_size"))
    x = radix * unit
    # In NHWC a backward takes a split at a time, as their coefficients fill the registers. So it
    # reads dout once for each.
    passes = radix if nhwc and of.reads_dout else 1
    splits = 1 if name == "statistics" else radix // passes
    dout = passes * unit * of.reads_dout
    written = (radix * of.writes_x + of.writes_out) * unit
    loop = _loop_with_most_loads(kernel)
    together = len(loop.loads) // (splits + of.reads_dout)  # positions of a turn
    walk = _walk(workload, tiling, together)
    singles = [other for other in kernel.loading if other.span != loop.span][:1]
    in_flight = (x + dout) * walk.in_vectors / launch["blocks"] / passes / max(walk.turns, 1)
    cycles = walk.turns * len(loop.waits) * gpu.memory_cycles * constants.under_load
    cycles += (walk.single_turns + CHAINS[name]) * gpu.l2_cycles
    cycles += (_barriers(kernel) > 0) * constants.barrier_cycles
    # Code for a position is jumped over where a warp has none.
    issued = len(kernel.outside) + walk.positions / together * len(loop.body)
    issued += walk.single_turns * sum(len(single.body) for single in singles)
    return Work(
        waiting=passes * cycles,
        issued=passes * issued,
        doubles=passes * _doubles(kernel.outside),
        in_flight=in_flight,
        memory_bytes=x + unit * of.reads_dout + written,
        l2_bytes=x + dout + written,
        loaded_bytes=x + dout,
    )


class _Walk(NamedTuple):
    """How a thread goes over its share of a map, in the mean over threads."""

    positions: float  # of vectors
    turns: float  # over them
    single_turns: float  # over single elements
    in_vectors: float  # the part of the map that is loaded in vectors


def _walk(workload: Mapping[str, Any], tiling: Mapping[str, int], together: int) -> _Walk:
    if workload["channels_last"]:
        rows = tiling["threads"] // tiling["lanes"]
        turns = math.ceil(math.ceil(tiling["chunk_pixels"] / rows) / together)
        return _Walk(tiling["chunk_pixels"] / rows, turns, 0.0, 1.0)
    # The row of a channel starts at any element of a vector.
    pixels, vector, lanes = workload["pixels"], tiling["vector"], tiling["lanes"]
    starts = [channel * pixels % vector for channel in range(vector)]
    vectors = [(pixels - -start % vector) // vector for start in starts]
    turns_of = [math.ceil(math.ceil(count / lanes) / together) for count in vectors]
    single_turns = [math.ceil((pixels - count * vector) / lanes) for count in vectors]
    return _Walk(
        sum(vectors) / lanes / vector,
        sum(turns_of) / vector,
        sum(single_turns) / vector,
        sum(vectors) / pixels,
    )


def _product_work(at: _Launch) -> Work:
    gpu, kernel, workload, _, launch, constants = at
    name = launch["name"]
    radix, channels, inter, batch = (
        workload[field] for field in ("radix", "channels", "inter", "batch")
    )
    limits = _C.plan_limits()
    depth = {
        "hidden": channels,
        "attention": inter,
        "hidden_gradient": radix * channels,
        "gradients": max(batch, inter),
    }[name] // (workload["cardinality"] if name != "gradients" else 1)
    products = radix if name == "attention" else 1  # of a block, one after the other
    loop = _loop_with_most_loads(kernel)
    fused = sum(i.name.startswith("FFMA") for i in loop.body)
    sums = limits["tile_rows"] * limits["tile_columns"] // WARP  # of a thread
    turns = math.ceil(depth / (launch["threads"] // WARP * fused / sums))
    barrier = constants.barrier_cycles
    chain = CHAINS[name] * gpu.l2_cycles
    cycles = products * (turns * len(loop.waits) * gpu.l2_cycles + barrier + chain)
    operands = limits["tile_rows"] * 4 + limits["tile_columns"] * workload["element_size"]
    return Work(
        waiting=cycles,
        issued=products * (turns * len(loop.body) + BEHIND_A_PRODUCT),
        doubles=0,
        l2_bytes=products * launch["blocks"] * depth * operands,
    )


def _column_work(at: _Launch) -> Work:
    gpu, kernel, workload, plan, launch, constants = at
    rows = workload["batch"]
    if launch["name"] == "combine":
        rows = plan["statistics_tiling"]["chunks"] * (1 if workload["channels_last"] else rows)
    lanes = launch["threads"] // _C.plan_limits()["columns"]
    cycles, issued = CHAINS[launch["name"]] * gpu.l2_cycles, len(kernel.outside)
    doubles = _doubles(kernel.outside)
    loaded = 0.0
    for loop in kernel.loading:
        # Eight rows at a time: norm.cuh's kRowsTogether.
        turns = math.ceil(rows / (8 * lanes))
        cycles += turns * len(loop.waits) * gpu.l2_cycles + constants.barrier_cycles
        issued += turns * len(loop.body)
        doubles += turns * _doubles(loop.body)
        loaded += turns * sum(i.width for i in loop.loads) * launch["threads"]
    return Work(cycles, issued, doubles, l2_bytes=launch["blocks"] * loaded)


def _element_work(at: _Launch) -> Work:
    gpu, kernel, workload, plan, launch, _ = at
    name, chunks = launch["name"], plan["tiling"]["chunks"]
    kinds = {"prepare": 0, "pool_finish": 1, "pool_backward_finish": 4 if workload["relu"] else 1}
    turns = 0
    if kinds[name]:
        loop = _loop_with_most_loads(kernel)
        turns = math.ceil(chunks * kinds[name] / len(loop.loads))
        turns *= workload["radix"] if name == "pool_backward_finish" else 1
    bytes_of_thread = chunks * kinds[name] * 4
    return Work(
        waiting=(CHAINS[name] + turns) * gpu.l2_cycles,
        issued=len(kernel.outside) / DTYPES_OF_PARAMETERS,
        doubles=0,
        l2_bytes=launch["blocks"] * launch["threads"] * bytes_of_thread,
    )


def workload(case: Case, name: str, *, coupled: bool) -> dict[str, Any]:
    """A pass of a case as the planner takes it.

    Args:
        case: the case.
        name: of the pass: eval, train or backward.
        coupled: with the batch's statistics in both norms.
    """
    after = case.form == "after conv"
    return {
        "pass": name,
        "batch": case.batch,
        "radix": case.radix,
        "cardinality": 1,
        "channels": case.channels,
        "inter": default_inter_channels(case.channels, case.radix, reduction=4),
        "pixels": case.side**2,
        "element_size": DTYPES[case.dtype].itemsize,
        "channels_last": case.layout == "channels_last",
        "aligned": True,
        "relu": after,
        "bn0": after,
        "batch_stats": after and coupled,
        "bn1_batch_stats": coupled,
    }
