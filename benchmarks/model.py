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

A launch in stages takes so for each of its steps, one after the other: stages that wait for the
same one are a step, and their blocks run side by side. Between steps comes the hand-over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sass
from grid import DTYPES, Case

from resnest_fused import _C
from resnest_fused.reference import default_inter_channels

WARP = 32
KB, MB = 2**10, 2**20


@dataclass(frozen=True)
class Constants:
    """What is taken to be the same for all GPUs, where nothing was measured.

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
    # Of a load from shared memory: 29 on an H100, 30 on an A100 (Luo et al., 2024).
    shared_cycles: float = 30.0


CONSTANTS = Constants()


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
    cluster_blocks: int = 1  # of the largest cluster; 1 before sm_90
    constants: Constants = CONSTANTS

    def measured(self, results: Mapping[str, Any]) -> Gpu:
        """With what ``gpu.py`` measured on this GPU in place of constants.

        ``copy_bytes_per_s`` gives ``copy_share``, and ``launch_s``, which older results do not
        have, ``launch_s``. The others were fitted together with those and stay: only a new fit
        could tell what they become.

        Raises:
            ValueError: the results have none of both, or one that is no positive number.
        """
        found = {}
        for name, unit in (("copy_bytes_per_s", self.bytes_per_s), ("launch_s", 1.0)):
            value = results.get(name)
            if value is not None:
                if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise ValueError(f"{name}: expected a positive number, got {value!r}")
                found[name] = value / unit
        if not found:
            raise ValueError("expected copy_bytes_per_s or launch_s, got neither")
        if "copy_bytes_per_s" in found:
            found["copy_share"] = found.pop("copy_bytes_per_s")
        return replace(self, constants=replace(self.constants, **found))

    def planned(self) -> dict[str, int]:
        """As the planner takes it."""
        return {
            "multiprocessors": self.multiprocessors,
            "threads_per_block": 1024,
            "threads_per_multiprocessor": self.threads,
            "registers_per_multiprocessor": self.registers,
            "shared_per_block": 48 * KB,
            "shared_per_block_optin": self.shared_bytes - self.reserved_bytes,
            "shared_per_multiprocessor": self.shared_bytes,
            "grid_blocks": 2**31 - 1,
            "cluster_blocks": self.cluster_blocks,
            "architecture": int(self.arch[3:]),
            "driver": 13000,
        }

    @property
    def reserved_bytes(self) -> int:
        """Of shared memory, that CUDA keeps for each block: programming guide, from sm_80 on."""
        return 0 if self.arch == "sm_75" else KB

    def resident(self, kernel: sass.Kernel, threads: int, shared_bytes: int) -> int:
        """Blocks of a kernel that a multiprocessor holds at a time."""
        # Registers are given to a warp in units of 256, shared memory to a block in units of 128.
        of_warp = -(-kernel.registers * WARP // 256) * 256
        # What a kernel is compiled with has CUDA's own part in it from sm_80 on.
        shared = -(-(shared_bytes + max(kernel.shared_bytes, self.reserved_bytes)) // 128) * 128
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
        Gpu(
            "H100",
            "sm_90",
            132,
            1.980e9,
            3350e9,
            50 * MB,
            2048,
            32,
            228 * KB,
            281,
            690,
            64,
            cluster_blocks=8,
        ),
        Gpu(
            "H200",
            "sm_90",
            132,
            1.980e9,
            4800e9,
            50 * MB,
            2048,
            32,
            228 * KB,
            281,
            690,
            64,
            cluster_blocks=8,
        ),
        Gpu(
            "B200",
            "sm_100",
            148,
            1.965e9,
            8000e9,
            126 * MB,
            2048,
            32,
            228 * KB,
            295,
            860,
            64,
            cluster_blocks=8,
        ),
    )
}


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
# The evaluation in one launch, whose clusters keep x.
ON_CHIP = "on_chip"
# Its barriers of a cluster: behind the start, the pool, and each FC. A barrier takes, in cycles, at
# least the way to another multiprocessor and back: 180 each on an H100 (Luo et al., 2024).
CLUSTER_BARRIERS = 4
CLUSTER_BARRIER_CYCLES = 400
# Of the launches in stages: these by step, in the planner's order.
STEPS = {
    "attention": (("gap",), ("hidden",), ("batch_norm",), ("softmax",)),
    "attention_backward": (
        ("logits",),
        ("hidden_gradient",),
        ("batch_norm_backward",),
        ("gap_gradient", "fc2_weight", "fc1_weight", "fc2_bias"),
        ("prologue_backward",),
    ),
}
PRODUCTS = ("hidden", "softmax", "hidden_gradient", "gap_gradient", "fc2_weight", "fc1_weight")
ELEMENTS = ("gap", "logits")


class Pass(NamedTuple):
    """Over the rows of a column."""

    loads: int  # of a thread for each row
    sums: int  # in float64, over all rows


COLUMNS = {
    "combine": (Pass(2, 1), Pass(2, 1)),
    "batch_norm": (Pass(2, 1), Pass(2, 1), Pass(1, 0)),
    "batch_norm_backward": (Pass(2, 2), Pass(2, 1)),
    "fc2_bias": (Pass(1, 1),),
    "prologue_backward": (Pass(6, 2),),
}
ROWS_TOGETHER = 8  # loaded in a turn: norm.cuh's kRowsTogether


# Waits for L2 one after the other outside of loops, as the source has them. Counted from the code
# they would be several times as many: each dtype of a parameter has a branch of its own.
CHAINS = {
    "gap": 0,
    "hidden": 4,
    "softmax": 2,
    "logits": 4,
    "hidden_gradient": 0,
    "gap_gradient": 0,
    "fc2_weight": 0,
    "fc1_weight": 0,
    "fc2_bias": 0,
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
# And for the four parameters of bn0, in the blocks of a pool.
CHAIN_OF_BN0 = 4
# The hand-over from a step to the next one, as stages.cuh has it. Waits for L2, one after another:
# the last block's for its results to be written, and for its count; the next one's for its ticket,
# for the poll that sees the count, and for the load that acquires it. The first has one barrier,
# the second two.
HAND_OVER_WAITS = 5
HAND_OVER_BARRIERS = 3
# Instructions of a thread of a stage outside of its loops, on the one way that it takes: for a
# product the sums of eight warps, bias and norm. And branches for a parameter's dtype, of which a
# thread takes one.
OUTSIDE_OF_LOOPS = 300
DTYPES_OF_PARAMETERS = 4
# Of a thread that copies a vector between memory and a slab.
OF_A_COPY = 12
# Of a thread of a product (FFMA), in one of the depth.
SUMS_OF_THREAD = 16


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
        bounds: what bounds its time; of a launch in stages the sums over its steps.
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
    """Of one launch or of one of its stages: what a block does, and what all of them move."""

    blocks: int
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
) -> list[Prediction]:
    """The launches of a call, in their order.

    Args:
        gpu: where it would run.
        kernels: of the GPU's architecture, by name, as ``sass.read`` gives them.
        workload: as the planner takes it.

    Raises:
        KeyError: a launch's kernel is not among the kernels.
        ValueError: the model does not know a launch.
    """
    plan = _C.plan(gpu.planned(), dict(workload))
    predictions = []
    for launch in plan["launches"]:
        name = launch["name"]
        if not (name in MAPS or name in COLUMNS or name in STEPS or name == ON_CHIP):
            raise ValueError(f"the model does not know the launch {name!r}")

        def of(name: str, launch: Mapping[str, Any]) -> _Launch:
            kernel = kernels[instance(name, workload, plan[_TILINGS.get(name, "tiling")])]
            return _Launch(gpu, kernel, workload, plan, {**launch, "name": name}, gpu.constants)

        if name == ON_CHIP:
            tiling = plan["tiling"]
            blocks = workload["batch"] * tiling["channel_blocks"] * tiling["chunks"]
            streams = [
                of(name, {**launch, "blocks": blocks})._replace(
                    plan={**plan, "recombine_tiling": tiling}
                )
                for name in ("pool", "recombine")
            ]
            steps = [[_on_chip_work(of(name, launch), streams)]]
        else:
            steps = _steps(of(name, launch))
        predictions.append(_predict_launch(of(name, launch), steps))
    return predictions


class _Launch(NamedTuple):
    """A launch with all that its time depends on."""

    gpu: Gpu
    kernel: sass.Kernel
    workload: Mapping[str, Any]
    plan: Mapping[str, Any]
    launch: Mapping[str, Any]
    constants: Constants


def _predict_launch(at: _Launch, steps: Sequence[Sequence[Work]]) -> Prediction:
    gpu, kernel, _, _, launch, constants = at
    resident = gpu.resident(kernel, launch["threads"], launch["shared_bytes"])
    of_steps = [_bounds(at, resident, works) for works in steps]
    hand_over = HAND_OVER_WAITS * gpu.l2_cycles + HAND_OVER_BARRIERS * constants.barrier_cycles
    p = constants.overlap
    seconds = constants.launch_s + (len(steps) - 1) * hand_over / gpu.clock_hz
    seconds += sum(sum(bound**p for bound in bounds) ** (1 / p) for bounds in of_steps)
    of_maps = steps[0][0]  # where it streams one
    return Prediction(
        launch["name"],
        launch["blocks"],
        resident,
        min(resident, launch["blocks"] / gpu.multiprocessors) * of_maps.in_flight,
        of_maps.loaded_bytes / gpu.multiprocessors,
        Bounds(*map(sum, zip(*of_steps, strict=True))),
        seconds,
    )


def _steps(at: _Launch) -> list[list[Work]]:
    """What a launch does side by side, and then one after the other."""
    name, blocks = at.launch["name"], at.launch["blocks"]
    if name in MAPS:
        return [[_map_work(at)]]
    if name in COLUMNS:
        return [[_column_work(at, name, blocks)]]
    works = {
        **dict.fromkeys(PRODUCTS, _product_work),
        **dict.fromkeys(COLUMNS, _column_work),
        **dict.fromkeys(ELEMENTS, _element_work),
    }
    stages = [stage for step in STEPS[name] for stage in step]
    items = dict(zip(stages, at.launch["stages"], strict=True))
    steps = [
        [works[stage](at, stage, items[stage]) for stage in step if items[stage]]
        for step in STEPS[name]
    ]
    return [step for step in steps if step]


def _bounds(at: _Launch, resident: int, works: Sequence[Work]) -> Bounds:
    """Of blocks that run side by side."""
    gpu, constants = at.gpu, at.constants
    warps = at.launch["threads"] / WARP
    issued = [
        warps * work.issued / constants.issued_per_cycle
        + warps * WARP * work.doubles / gpu.doubles_per_cycle
        for work in works
    ]

    def in_turn(cycles: Sequence[float], places: int) -> float:
        """Of blocks that have so many places in a multiprocessor."""
        pairs = zip(works, cycles, strict=True)
        of_one = sum(work.blocks * each for work, each in pairs) / gpu.multiprocessors
        return max(of_one / places, *cycles) / gpu.clock_hz

    return Bounds(
        memory=sum(work.memory_bytes for work in works) / (gpu.bytes_per_s * constants.copy_share),
        l2=in_turn(
            [work.l2_bytes / work.blocks / constants.l2_bytes_per_cycle for work in works], 1
        ),
        waiting=in_turn(
            [work.waiting + cycles for work, cycles in zip(works, issued, strict=True)], resident
        ),
        instructions=in_turn(issued, 1),
    )


_TILINGS = {
    "statistics": "statistics_tiling",
    "recombine": "recombine_tiling",
    "recombine_backward": "recombine_tiling",
}


def instance(name: str, workload: Mapping[str, Any], tiling: Mapping[str, int]) -> str:
    """The kernel of a launch, as dispatch.h picks it; of 16-bit maps that with bfloat16."""
    size = workload["element_size"]
    if name not in MAPS and name != ON_CHIP:
        return f"{name}_kernel<{'double' if size == 8 else 'float'}>"
    element = {2: "__nv_bfloat16", 4: "float", 8: "double"}[size]
    vector, radix = tiling["vector"], workload["radix"]
    compiled = radix if vector > 1 and radix in (1, 2, 4) else 0
    nhwc, relu = (str(workload[flag]).lower() for flag in ("channels_last", "relu"))
    of_map = [element, nhwc, vector]
    if name == ON_CHIP:
        of_map = [element, nhwc, vector, relu]
    elif name != "statistics":
        of_map = [element, nhwc, compiled, vector, relu]
    return f"{name}_kernel<{', '.join(map(str, of_map))}>"


def _bytes(loop: sass.Loop) -> int:
    """That a thread loads in a turn."""
    return sum(i.width for i in loop.loads)


def _loops_with(kernel: sass.Kernel, loads: int, count: int) -> list[sass.Loop]:
    """The loops with about so many loads in a turn that are not a product's; the longest of equals.

    About, as a compiler may make one loop with and one without an array that may be null, or join
    them, with half as many loads or half as many again.
    """

    def away(loop: sass.Loop) -> int:
        return abs(len(loop.loads) - loads)

    found = [loop for loop in kernel.loading if away(loop) <= loads // 2 and not _fused(loop)]
    if len(found) < count:
        raise ValueError(f"{kernel.name} has {len(found)} loops with {loads} loads, not {count}")
    return sorted(found, key=lambda loop: (away(loop), -len(loop.body)))[:count]


def _fused(loop: sass.Loop) -> int:
    return sum(i.name.startswith("FFMA") for i in loop.body)


def _doubles(body: Sequence[sass.Instruction]) -> int:
    return sum(i.name.startswith(("DADD", "DMUL", "DFMA")) for i in body)


def _barriers(kernel: sass.Kernel) -> int:
    return sum(i.name.startswith("BAR") for i in kernel.body)


def _map_work(at: _Launch) -> Work:
    gpu, kernel, workload, plan, launch, constants = at
    name = launch["name"]
    of, tiling = MAPS[name], plan[_TILINGS.get(name, "tiling")]
    if tiling["slab"]:
        return _slab_work(at)
    nhwc, radix = workload["channels_last"], workload["radix"]
    unit = math.prod(workload[field] for field in ("batch", "channels", "pixels", "element_size"))
    x = radix * unit
    # Splits that a backward holds in NHWC: two at most, with the parameters of a prologue; all of
    # another radix that is compiled. For each time it reads dout again.
    at_once = min(radix, 2) if workload["relu"] else radix
    passes = radix // (at_once if radix in (1, 2, 4) else 1) if nhwc and of.reads_dout else 1
    splits = 1 if name == "statistics" else radix // passes
    dout = passes * unit * of.reads_dout
    written = (radix * of.writes_x + of.writes_out) * unit
    maps = splits + of.reads_dout
    lines = [loop for loop in sass.innermost(kernel.loops) if _asks(loop)]
    # Loads of a map have one width, those of bn0's parameters one for each dtype.
    streaming = [loop for loop in kernel.loading if len({i.width for i in loop.loads}) == 1]
    of_bn0 = [loop for loop in kernel.loading if loop not in streaming]
    issued = float(len(kernel.outside))
    if lines:
        # Where a vector comes, the next one is asked for, so many positions ahead.
        (loop,) = lines
        together = _asks(loop) // maps
        vector = tiling["vector"] * workload["element_size"]
        stages = _C.plan_limits()["line_bytes"] // (vector * maps * together)
        ahead = stages * together
        waits = 1
        issued -= len(loop.body)
    else:
        loop = max(streaming, key=_bytes)
        ahead = together = len(loop.loads) // maps  # positions of a turn
        waits = len(loop.waits)
    walk = _walk(workload, tiling, ahead)
    turns = max(walk.positions / ahead, 1) if lines else walk.turns
    in_flight = (x + dout) / launch["blocks"] / passes / max(turns, 1)
    cycles = turns * waits * gpu.memory_cycles * constants.under_load
    cycles += (_barriers(kernel) > 0) * constants.barrier_cycles
    # Code for a position is jumped over where a warp has none.
    issued += walk.positions / together * len(loop.body)
    if of_bn0:
        lanes, threads = tiling["lanes"], launch["threads"]
        features = splits * (lanes * tiling["vector"] if nhwc else threads // lanes)
        cycles += _cycles_of_bn0(gpu, features, threads) + constants.barrier_cycles
        issued += _issued_for_bn0(of_bn0, features, threads)
    else:
        cycles += CHAINS[name] * gpu.l2_cycles
    return Work(
        launch["blocks"],
        waiting=passes * cycles,
        issued=passes * issued,
        doubles=passes * _doubles(kernel.outside),
        in_flight=in_flight,
        memory_bytes=x + unit * of.reads_dout + written,
        l2_bytes=x + dout + written,
        loaded_bytes=x + dout,
    )


def _cycles_of_bn0(gpu: Gpu, features: int, threads: int) -> float:
    """A thread of the block takes the parameters of a feature."""
    return math.ceil(features / threads) * CHAIN_OF_BN0 * gpu.l2_cycles


def _issued_for_bn0(loops: Sequence[sass.Loop], features: int, threads: int) -> float:
    """By a warp, in the mean over all of the block."""
    warps = math.ceil(features / WARP) / (threads / WARP)
    return warps * sum(len(loop.body) for loop in loops)


def _slab_work(at: _Launch) -> Work:
    """Of blocks that bring their part of a map into shared memory, and work on it there.

    All of a block's part is in flight at a time, so it waits for memory once, and meanwhile for
    parameters.
    """
    gpu, kernel, workload, plan, launch, constants = at
    name, threads = launch["name"], launch["threads"]
    of, tiling = MAPS[name], plan[_TILINGS.get(name, "tiling")]
    vector, radix = tiling["vector"], workload["radix"]
    unit = math.prod(workload[field] for field in ("batch", "channels", "pixels", "element_size"))
    read, written = (radix + of.reads_dout) * unit, (radix * of.writes_x + of.writes_out) * unit
    inner = sass.innermost(kernel.loops)
    # The loop over vectors, then that over single elements.
    loop = max(
        (loop for loop in inner if not _stores(loop)),
        key=lambda loop: sum(i.width == 16 for i in loop.shared_loads),
    )
    singles = [other for other in inner if other.span[0] > loop.span[1]][:1]
    splits = 1 if name == "statistics" else radix
    together = max(len(loop.shared_loads) // (splits + of.reads_dout), 1)
    walk = _walk(workload, tiling, together)
    vectors = tiling["slab"] / vector / threads  # of a thread, in each slab
    # Before sm_80 a slab comes through registers, and the next one after it.
    through = [other for other in kernel.loading if len({i.width for i in other.loads}) == 1]
    of_bn0 = [other for other in kernel.loading if other not in through]
    of_parameters = CHAINS[name] * gpu.l2_cycles
    features = splits * threads // tiling["lanes"]
    if of_bn0:
        of_parameters = _cycles_of_bn0(gpu, features, threads)
    waits = sum(len(other.waits) * math.ceil(vectors / len(other.loads)) for other in through)
    cycles = max(waits, 1) * gpu.memory_cycles * constants.under_load
    cycles = max(cycles, of_parameters)
    cycles += (walk.turns + walk.single_turns) * constants.shared_cycles
    cycles += (2 + (written > 0)) * constants.barrier_cycles
    issued = len(kernel.body) - sum(len(other.body) for other in inner)
    issued += walk.positions / together * len(loop.body)
    issued += walk.single_turns * sum(len(single.body) for single in singles)
    issued += _issued_for_bn0(of_bn0, features, threads)
    # The slabs that come by copies of all threads, and those that leave.
    by_threads = through or any(i.name.startswith("LDGSTS") for i in kernel.body)
    issued += vectors * OF_A_COPY * (splits + of.reads_dout) * bool(by_threads)
    issued += vectors * OF_A_COPY * (of.writes_out + splits * of.writes_x)
    return Work(
        launch["blocks"],
        waiting=cycles,
        issued=issued,
        doubles=0,
        in_flight=read / launch["blocks"] / max(len(through), 1),
        memory_bytes=read + written,
        l2_bytes=read + written,
        loaded_bytes=read,
    )


def _asks(loop: sass.Loop) -> int:
    """Copies into shared memory of a thread in a turn."""
    return sum(i.name.startswith("LDGSTS") for i in loop.body)


def _stores(loop: sass.Loop) -> bool:
    return any(i.name.startswith("STG") for i in loop.body)


def _on_chip_work(at: _Launch, streams: Sequence[_Launch]) -> Work:
    """Of the blocks of clusters, whose code for maps is that of the kernels that stream them.

    A block's whole part of x is in flight at a time, so it waits for memory once.
    """
    gpu, kernel, workload, plan, launch, constants = at
    kept, blocks, warps = plan["on_chip"], launch["blocks"], launch["threads"] // WARP
    radix, channels, inter, groups, size = (
        workload[field] for field in ("radix", "channels", "inter", "cardinality", "element_size")
    )
    out = math.prod(workload[field] for field in ("batch", "channels", "pixels", "element_size"))
    weights = (inter * channels + radix * channels * inter) // groups * size
    works = [_map_work(stream) for stream in streams]
    issued = sum(
        work.issued * stream.launch["blocks"] for work, stream in zip(works, streams, strict=True)
    )
    # Most code is for dtypes that a call has not: of the start, the pool's sums and both FCs on the
    # one way that a thread takes.
    issued = issued / blocks + 4 * OUTSIDE_OF_LOOPS
    cycles = gpu.memory_cycles * constants.under_load
    cycles += CLUSTER_BARRIERS * CLUSTER_BARRIER_CYCLES
    # Of 16 bytes at a time, in the order of the loops the longest one.
    loop = max((loop for loop in kernel.loading if _fused(loop) >= WARP), key=_bytes)
    for outputs, depth in ((inter, channels // groups), (radix * channels, inter // groups)):
        rounds = math.ceil(math.ceil(outputs / kept["cluster"]) / WARP)
        turns = rounds * math.ceil(depth * size / warps / _bytes(loop))
        cycles += turns * len(loop.waits) * gpu.l2_cycles + 2 * constants.barrier_cycles
        issued += turns * len(loop.body)
    x = radix * out
    return Work(
        blocks,
        waiting=cycles,
        issued=issued,
        doubles=0,
        in_flight=x / blocks,
        memory_bytes=x + out + weights,
        l2_bytes=x + out + weights * blocks / kept["cluster"],
        loaded_bytes=x,
    )


class _Walk(NamedTuple):
    """How a thread goes over its share of a map, in the mean over threads."""

    positions: float  # of vectors
    turns: float  # over them
    single_turns: float  # over single elements, which slabs alone have


def _walk(workload: Mapping[str, Any], tiling: Mapping[str, int], together: int) -> _Walk:
    if workload["channels_last"]:
        rows = tiling["threads"] // tiling["lanes"]
        turns = math.ceil(math.ceil(tiling["chunk_pixels"] / rows) / together)
        return _Walk(tiling["chunk_pixels"] / rows, turns, 0.0)
    # The row of a channel starts at any element of a vector.
    pixels, vector, lanes = tiling["chunk_pixels"], tiling["vector"], tiling["lanes"]
    starts = [channel * pixels % vector for channel in range(vector)]
    vectors = [(pixels - -start % vector) // vector for start in starts]
    turns_of = [math.ceil(math.ceil(count / lanes) / together) for count in vectors]
    single_turns = [math.ceil((pixels - count * vector) / lanes) for count in vectors]
    return _Walk(
        sum(vectors) / lanes / vector,
        sum(turns_of) / vector,
        sum(single_turns) / vector,
    )


def _product_work(at: _Launch, stage: str, blocks: int) -> Work:
    gpu, kernel, workload, _, launch, constants = at
    radix, channels, inter, batch, groups = (
        workload[field] for field in ("radix", "channels", "inter", "batch", "cardinality")
    )
    limits = _C.plan_limits()
    of_weights = stage in ("fc2_weight", "fc1_weight")
    depth = {
        "hidden": channels // groups,
        "softmax": inter // groups,
        "hidden_gradient": radix * channels // groups,
        "gap_gradient": inter // groups,
        "fc2_weight": batch,
        "fc1_weight": batch,
    }[stage]
    products = radix if stage == "softmax" else 1  # of a block, one after the other
    loop = max((loop for loop in kernel.loading if _fused(loop) >= SUMS_OF_THREAD), key=_bytes)
    turns = math.ceil(depth / (launch["threads"] // WARP * _fused(loop) / SUMS_OF_THREAD))
    chain = CHAINS[stage] * gpu.l2_cycles
    cycles = turns * len(loop.waits) * gpu.l2_cycles + constants.barrier_cycles + chain
    weight_size = 4 if of_weights else workload["element_size"]
    operands = limits["tile_rows"] * 4 + limits["tile_columns"] * weight_size
    return Work(
        blocks,
        waiting=products * cycles,
        issued=products * (turns * len(loop.body) + OUTSIDE_OF_LOOPS),
        doubles=0,
        l2_bytes=products * blocks * depth * operands,
    )


def _column_work(at: _Launch, name: str, blocks: int) -> Work:
    gpu, kernel, workload, plan, launch, constants = at
    rows = workload["batch"]
    if name == "combine":
        rows = plan["statistics_tiling"]["chunks"] * (1 if workload["channels_last"] else rows)
    columns, threads = _C.plan_limits()["columns"], launch["threads"]
    turns = math.ceil(rows / (ROWS_TOGETHER * threads // columns))
    # Of one sum: over the rows of a warp, then over the warps.
    adds = math.log2(WARP // columns) + threads // WARP
    passes = COLUMNS[name]
    cycles, issued = CHAINS[name] * gpu.l2_cycles, float(OUTSIDE_OF_LOOPS)
    doubles, loaded = adds * sum(one.sums for one in passes), 0.0
    for loads in dict.fromkeys(one.loads for one in passes):
        count = sum(one.loads == loads for one in passes)
        for loop in _loops_with(kernel, ROWS_TOGETHER * loads, count):
            cycles += turns * len(loop.waits) * gpu.l2_cycles + constants.barrier_cycles
            issued += turns * len(loop.body)
            doubles += turns * _doubles(loop.body)
            loaded += turns * _bytes(loop) * threads
    return Work(blocks, cycles, issued, doubles, l2_bytes=blocks * loaded)


def _element_work(at: _Launch, stage: str, blocks: int) -> Work:
    gpu, _, workload, plan, launch, _ = at
    chunks, radix = plan["tiling"]["chunks"], workload["radix"]
    # Splits, each with sums of so many kinds, and so many chunks loaded in a turn: pool_sums.cuh.
    splits, kinds, together = {
        ("gap", True): (1, 1, 8),
        ("gap", False): (1, 1, 8),
        ("logits", True): (radix, 4, 4),
        ("logits", False): (radix, 1, 8),
    }[stage, workload["relu"]]
    turns = splits * math.ceil(chunks / together)
    return Work(
        blocks,
        waiting=(CHAINS[stage] + turns) * gpu.l2_cycles,
        issued=OUTSIDE_OF_LOOPS,
        doubles=0,
        l2_bytes=blocks * launch["threads"] * splits * kinds * chunks * 4,
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
