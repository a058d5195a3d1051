"""The model of the CUDA kernels' time: what it reads off compiled code, its bytes and times, and
what today's kernels keep in flight.

Most tests give it kernels made up here, whose numbers are known. The long ones compile today's
kernels and hold the model against what an H100 measured.
"""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import model
import predicted
import pytest
import sass
from grid import Case
from model import GPUS, KB

from resnest_fused import _C

H100, H200 = GPUS["H100"], GPUS["H200"]
# As if it had none: with a launch of each phase in an evaluation, too.
WITHOUT_CLUSTERS = replace(H100, cluster_blocks=1)


def code(*lines: str) -> str:
    """As cuobjdump prints it: instructions 16 bytes apart."""
    return "\n".join(
        f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */" for i, line in enumerate(lines)
    )


def kernel(*lines: str, registers: int = 128, shared: int = 1024) -> sass.Kernel:
    return sass.Kernel("made_up", registers, shared, sass.instructions(code(*lines)))


# --- what is read off compiled code


@pytest.mark.parametrize(
    ("body", "waits"),
    [
        (("LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "FADD R0, R4, R8"), [32]),
        (
            ("LDG.E.128 R4, [R2.64]", "FADD R0, R0, R7", "LDG.E.64 R8, [R2.64]", "FADD R0, R0, R9"),
            [16, 8],
        ),
        # What one turn loads is used in the next.
        (("FADD R0, R0, R4", "LDG.E.U16 R4, [R2.64]"), [2]),
        # The address of the second load is what the first one loads.
        (("LDG.E R4, [R2.64]", "LDG.E R6, [R4.64]", "FADD R0, R0, R6"), [4, 4]),
        (("LDS.128 R4, [R2]", "FADD R0, R0, R4", "LDG.E R8, [R2.64]"), []),
        # A store reads all of its operands, a load with a predicate counts.
        (("@P1 LDG.E.128 R4, desc[UR8][R2.64]", "STG.E.128 desc[UR8][R10.64], R4"), [16]),
    ],
)
def test_waits_of_a_loop(body: tuple[str, ...], waits: list[int]) -> None:
    (loop,) = kernel("NOP", *body, "@!P0 BRA 0x10", "EXIT").loading or [None]
    assert loop is not None
    assert loop.waits == waits
    assert [i.name for i in loop.body] == [
        *(line.removeprefix("@P1 ").split()[0] for line in body),
        "BRA",
    ]


def test_innermost_loops_that_load() -> None:
    found = kernel(
        "LDG.E R1, [R2.64]",  # before all loops
        "IADD R3, R1, R3",
        "LDG.E.128 R4, [R2.64]",  # 0x20: the inner loop
        "FADD R0, R4, R0",
        "@P0 BRA 0x20",
        "LDG.E.64 R8, [R2.64]",  # in the outer one alone
        "FADD R0, R8, R0",
        "@P1 BRA 0x10",
        "FADD R0, R0, R0",  # 0x80: a loop without loads
        "@P2 BRA 0x80",
        "EXIT",
    )
    assert [loop.span for loop in found.loading] == [(0x20, 0x40)]
    assert [loop.span for loop in found.loops] == [(0x20, 0x40), (0x10, 0x70), (0x80, 0x90)]
    assert len(found.outside) == 8


# --- from a kernel to what a GPU holds and does


@pytest.mark.parametrize(
    ("name", "registers", "shared", "blocks"),
    [
        ("H100", 128, 0, 2),
        ("H100", 75, 0, 3),  # 80 of them are given
        ("H100", 64, 0, 4),
        ("H100", 32, 0, 8),  # of 2,048 threads
        ("H100", 32, 50 * KB, 4),
        ("T4", 32, 0, 4),
        ("T4", 128, 40 * KB, 1),
        ("L4", 32, 0, 6),
    ],
)
def test_resident_blocks(name: str, registers: int, shared: int, blocks: int) -> None:
    assert GPUS[name].resident(kernel(registers=registers, shared=0), 256, shared) == blocks


def looped(at: int, *body: str) -> tuple[str, ...]:
    """A loop whose first instruction is the one with that number."""
    return (*body, f"@P0 BRA {16 * at:#x}")


def loads(count: int, kind: str = "LDG.E") -> list[str]:
    return [f"{kind} R{8 + 4 * i}, [R2.64]" for i in range(count)]


class MadeUp(dict[str, sass.Kernel]):
    """Any kernel that streams a map: a loop of loads, all before the first use, or of copies into
    lines; in a pool with bn0 behind one that loads parameters. In NCHW it loads from shared memory,
    and then single elements. Any other one: a product's loop, and those over
    rows of each number of loads."""

    def __init__(
        self, registers: int = 128, count: int = 8, *, bn0: bool = False, lines: bool = False
    ) -> None:
        super().__init__()
        of_bn0 = looped(1, *loads(1), *loads(1, "LDG.E.U16"), "FADD R8, R8, R8") if bn0 else ()
        copies = ["LDGSTS.E.64 [R4], desc[UR4][R2.64]"] * count
        body = copies if lines else loads(count, "LDG.E.64")
        code = ["NOP", *of_bn0]
        of_maps = [*code, *looped(len(code), *body, "FADD R8, R8, R8"), "EXIT"]
        self.of_maps = kernel(*of_maps, registers=registers)
        code += looped(len(code), *loads(3, "LDS.128"), "FADD R8, R8, R8")
        code += looped(len(code), *loads(3, "LDS.U16"), "FADD R8, R8, R8")
        self.of_slabs = kernel(*code, "EXIT", registers=registers)
        # Of four by four, four of the depth.
        code = ["NOP", *looped(1, *loads(8, "LDG.E.128"), *["FFMA R8, R8, R8, R8"] * 64)]
        for rows in (8, 16, 16, 48):
            code += looped(len(code), *loads(rows), "DADD R8, R8, R8")
        self.of_phase_2 = kernel(*code, "EXIT")

    def __missing__(self, name: str) -> sass.Kernel:
        if name.startswith(("attention", "combine", "on_chip")):
            return self.of_phase_2
        return self.of_slabs if ", false, " in name.partition("true")[0] else self.of_maps


def predict(
    case: Case,
    name: str,
    gpu: model.Gpu = WITHOUT_CLUSTERS,
    made_up: predicted.Kernels | None = None,
) -> dict[str, model.Prediction]:
    kernels = MadeUp() if made_up is None else made_up
    launches = model.predict(gpu, kernels, model.workload(case, name, coupled=name != "eval"))
    return {launch.name: launch for launch in launches}


CASE = Case(64, 32, 256, True, "bf16", "channels_last", form="after conv")


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("radix", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bytes_are_the_least_of_each_pass(dtype: str, radix: int, layout: str) -> None:
    """In the units of the benchmarks' floor, of which an evaluation here reads x twice."""
    case = replace(CASE, dtype=dtype, radix=radix, layout=layout)
    unit = case.floor_bytes // case.floor_units

    def units(*passes: str) -> float:
        launches = [launch for name in passes for launch in predict(case, name).values()]
        seconds = sum(launch.bounds.memory for launch in launches)
        return seconds * H100.bytes_per_s * model.CONSTANTS.copy_share / unit

    assert units("train", "backward") == pytest.approx(case.floor_units)
    assert units("eval") == pytest.approx(2 * radix + 1)


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("batch", [1, 40, 1000])
def test_evaluation_on_chip(batch: int, layout: str) -> None:
    """It reads x once, all of a block's part at a time, and the weights once."""
    case = replace(CASE, batch=batch, layout=layout)
    workload = model.workload(case, "eval", coupled=False)
    kept = _C.plan(H100.planned(), workload)["on_chip"]
    (launch,) = predict(case, "eval", H100).values()
    assert launch.name == "on_chip"
    assert launch.resident == 2
    unit, weights = batch * 64 * 32 * 32 * 2, 2 * (64 * 32 + 128 * 32)
    memory = launch.bounds.memory * H100.bytes_per_s * model.CONSTANTS.copy_share
    assert memory == pytest.approx(3 * unit + weights)
    places = min(2 * 132, launch.blocks)
    assert launch.in_flight * 132 == pytest.approx(places * 2 * unit / launch.blocks)
    # A device's clusters at a time, each for as many samples as it holds.
    clusters = -(-batch // kept["samples"])
    assert launch.blocks == 8 * clusters
    chain = H100.memory_cycles * model.CONSTANTS.under_load + 4 * 400
    assert launch.bounds.waiting > max(clusters * 8 / 264, 1) * chain / H100.clock_hz


@pytest.mark.parametrize(("registers", "count", "kilobytes"), [(128, 8, 32), (64, 8, 64)])
def test_bytes_in_flight(registers: int, count: int, kilobytes: int) -> None:
    """Of 256 threads a block, with two resident blocks or four; each has whole turns alone."""
    pool = predict(CASE, "eval", made_up=MadeUp(registers, count))["pool"]
    assert pool.in_flight == kilobytes * KB
    assert pool.share == 2 * 256 * 64 * 32 * 32 * 2 / 132


@pytest.mark.parametrize("count", [2, 6, 8])
def test_bytes_in_flight_of_lines(count: int) -> None:
    """As many whole turns of both splits as a thread's line holds, in two blocks. A thread has
    eight positions here, and no more is in flight."""
    pool = predict(CASE, "eval", made_up=MadeUp(128, count, lines=True))["pool"]
    of_thread = min(_C.plan_limits()["line_bytes"] // (count * 8) * count * 8, 8 * 2 * 8)
    assert pool.in_flight == 2 * 256 * of_thread


def test_no_more_is_in_flight_than_there_is() -> None:
    for batch, stage in itertools.product((1, 32, 256), ((64, 56), (256, 14), (512, 7))):
        for layout in ("NCHW", "channels_last"):
            case = replace(CASE, channels=stage[0], side=stage[1], batch=batch, layout=layout)
            for name in predicted.PASSES:
                for launch in predict(case, name).values():
                    assert launch.in_flight <= launch.share * (1 + 1e-9)
                    assert (launch.in_flight > 0) == (launch.name in model.MAPS)


# From a step to the next one on an H100: five waits for L2, three barriers.
HAND_OVER = (5 * 281 + 3 * 100) / 1.98e9


def test_a_launch_takes_no_less_than_each_of_its_bounds() -> None:
    for name in predicted.PASSES:
        for launch in predict(CASE, name).values():
            least = model.CONSTANTS.launch_s + max(launch.bounds)
            most = model.CONSTANTS.launch_s + sum(launch.bounds)
            most += HAND_OVER * (len(model.STEPS.get(launch.name, [()])) - 1)
            assert least <= launch.seconds <= most


def in_stages(
    monkeypatch: pytest.MonkeyPatch, name: str, items: tuple[int, ...]
) -> model.Prediction:
    """Phase 2 with so many items by stage."""
    plan = _C.plan

    def changed(*args: dict[str, object]) -> dict[str, object]:
        planned = plan(*args)
        for launch in planned["launches"]:
            if "stages" in launch:
                launch |= {"stages": list(items), "blocks": sum(items)}
        return planned

    with monkeypatch.context() as patch:
        patch.setattr(_C, "plan", changed)
        return predict(CASE, "train" if name == "attention" else "backward")[name]


@pytest.mark.parametrize(
    ("name", "items", "steps"),
    [
        ("attention", (30, 5, 40, 70), [(0,), (1,), (2,), (3,)]),
        ("attention", (0, 5, 0, 70), [(1,), (3,)]),
        ("attention", (0, 5, 0, 900), [(1,), (3,)]),
        ("attention_backward", (9, 5, 7, 3, 4, 2, 6, 8), [(0,), (1,), (2,), (3, 4, 5, 6), (7,)]),
        ("attention_backward", (9, 5, 7, 0, 0, 600, 6, 0), [(0,), (1,), (2,), (5, 6)]),
    ],
)
def test_steps_of_a_launch_add_up(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    items: tuple[int, ...],
    steps: list[tuple[int, ...]],
) -> None:
    """A step takes what it takes alone; in it stages run side by side: in no less than the longest
    and no more than all of them."""

    def seconds(*stages: int) -> float:
        alone = tuple(count if i in stages else 0 for i, count in enumerate(items))
        return in_stages(monkeypatch, name, alone).seconds - model.CONSTANTS.launch_s

    whole = in_stages(monkeypatch, name, items).seconds - model.CONSTANTS.launch_s
    expected = sum(seconds(*step) for step in steps) + HAND_OVER * (len(steps) - 1)
    assert whole == pytest.approx(expected)
    for step in steps:
        stages = [seconds(stage) for stage in step if items[stage]]
        assert min(stages) > 0
        assert max(stages) <= seconds(*step) * (1 + 1e-9)
        assert len(stages) == 1 or seconds(*step) < sum(stages)


def test_a_stage_whose_loops_are_not_there() -> None:
    made_up = MadeUp()
    lines = looped(0, *loads(16), "DADD R8, R8, R8")
    made_up["combine_kernel<float>"] = kernel(*lines, "EXIT")
    with pytest.raises(ValueError, match="made_up has 1 loops with 16 loads, not 2"):
        predict(CASE, "train", made_up=made_up)


def test_a_pool_waits_for_the_parameters_of_bn0() -> None:
    """For four of them instead of one, and behind a barrier."""
    without, behind = (predict(CASE, "eval", made_up=MadeUp(bn0=bn0))["pool"] for bn0 in (0, 1))
    assert behind.in_flight == without.in_flight
    assert behind.bounds.memory == without.bounds.memory
    waits = (3 * H100.l2_cycles + model.CONSTANTS.barrier_cycles) / H100.clock_hz
    rounds = max(without.blocks / H100.multiprocessors / without.resident, 1)
    # And the instructions of four warps in a block of eight.
    few = rounds * 8 * 4 / model.CONSTANTS.issued_per_cycle / 2 / H100.clock_hz
    assert behind.bounds.waiting - without.bounds.waiting == pytest.approx(rounds * waits + few)


def test_what_makes_a_kernel_slower() -> None:
    """More waiting, fewer blocks, a slower memory: each its own bound, and nothing gets faster."""

    def pool(gpu: model.Gpu = WITHOUT_CLUSTERS, made_up: MadeUp | None = None) -> model.Prediction:
        return predict(CASE, "eval", gpu, made_up)["pool"]

    def slower(other: model.Prediction) -> dict[str, float]:
        assert other.seconds > pool().seconds
        pairs = zip(other.bounds, pool().bounds, strict=True)
        ratios = dict(zip(other.bounds._fields, (a / b for a, b in pairs), strict=True))
        return {name: ratio for name, ratio in ratios.items() if ratio != pytest.approx(1)}

    assert slower(pool(made_up=MadeUp(registers=255))) == {"waiting": pytest.approx(2)}
    assert set(slower(pool(made_up=MadeUp(count=2)))) == {"waiting", "instructions"}
    assert slower(pool(replace(WITHOUT_CLUSTERS, bytes_per_s=H100.bytes_per_s / 3))) == {
        "memory": pytest.approx(3)
    }
    assert set(slower(pool(replace(WITHOUT_CLUSTERS, memory_cycles=2000)))) == {"waiting"}


def test_a_launch_that_the_model_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*args: object) -> dict[str, object]:
        return {"launches": [{"name": "transpose", "blocks": 1, "threads": 32}]}

    monkeypatch.setattr(_C, "plan", plan)
    with pytest.raises(ValueError, match="does not know the launch 'transpose'"):
        predict(CASE, "eval")


def test_kernels_are_named_as_the_dispatch_names_them() -> None:
    def names(case: Case) -> set[str]:
        workload = model.workload(case, "train", coupled=True)
        plan = _C.plan(H100.planned(), workload)
        launches = [launch["name"] for launch in plan["launches"]]
        return {model.instance(name, workload, plan["tiling"]) for name in launches}

    assert names(CASE) >= {
        "pool_kernel<__nv_bfloat16, true, 2, 4, true>",
        "statistics_kernel<__nv_bfloat16, true, 4>",
        "attention_kernel<float>",
    }
    plain = replace(CASE, dtype="fp32", layout="NCHW", radix=3, form="attention")
    assert "recombine_kernel<float, false, 0, 4, false>" in names(plain)


# --- constants that were measured


def test_a_measurement_replaces_two_constants() -> None:
    measured = H100.measured({"copy_bytes_per_s": 0.5 * H100.bytes_per_s, "launch_s": 4e-6})
    assert measured.constants == replace(model.CONSTANTS, copy_share=0.5, launch_s=4e-6)
    older = H100.measured({"copy_bytes_per_s": 0.5 * H100.bytes_per_s, "launch_s": None})
    assert older.constants == replace(model.CONSTANTS, copy_share=0.5)
    call = model.workload(CASE, "train", coupled=True)
    usual, slower = (model.predict(gpu, MadeUp(), call) for gpu in (H100, older))
    for one, other in zip(usual, slower, strict=True):
        share = model.CONSTANTS.copy_share / 0.5
        assert other.bounds.memory == pytest.approx(share * one.bounds.memory)
        assert other.bounds[1:] == one.bounds[1:]
    later = model.predict(replace(H100, constants=measured.constants), MadeUp(), call)
    for one, other in zip(slower, later, strict=True):
        assert other.seconds - one.seconds == pytest.approx(4e-6 - model.CONSTANTS.launch_s)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"device": "NVIDIA H100 80GB HBM3"}', "expected copy_bytes_per_s or launch_s, got neith"),
        ('{"device": "NVIDIA H100", "launch_s": 0}', "launch_s: expected a positive number, got 0"),
        ('{"device": "NVIDIA H100", "launch_s": NaN}', "launch_s: expected a positive number, got"),
        ('{"device": "NVIDIA H100", "launch_s": "4"}', "launch_s: expected a positive number, got"),
        ('{"device": "NVIDIA H1000", "launch_s": 1}', "expected a device that is one of T4, A100,"),
        ("[]", "expected a device that is one of T4"),
        ("{", "Expecting property name"),
        (None, "No such file"),
    ],
)
def test_what_is_no_measurement(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{said}"):
        predicted.with_measured([path])


def test_the_page_names_measured_constants() -> None:
    kernels = {gpu.arch: MadeUp() for gpu in GPUS.values()}
    gpus = predicted.with_measured([predicted.RESULTS / "h100/gpu.json"])
    text = predicted.page(kernels, {}, gpus)
    check_marks(text)
    assert "Constants measured on this H100: copy_share 0.903 for 0.9.\n" in text


# --- the page


def test_the_page_marks_what_is_predicted() -> None:
    row = {
        "what": "op",
        "contender": "batch_statistics",
        "median_us": 123.4,
        "shape": "64@56x56",
        "batch": 256,
    }
    row |= {"layout": "NCHW", "dtype": "bf16", "form": "after conv", "radix": 2}
    kernels = {gpu.arch: MadeUp() for gpu in GPUS.values()}
    results = {"date": "2026-01-02", "commit": "abcdef0123", "rows": [row, {**row, "batch": 1}]}
    text = predicted.page(kernels, {"H100": results})
    check_marks(text)
    measured = [line for line in text.splitlines() if "123.4 / " in line]
    assert [line.partition(" |")[0] for line in measured] == [
        "| NCHW 64@56x56 B=1",
        "| NCHW 64@56x56 B=256",
    ]
    assert "did not keep x on chip" in text
    of_today = predicted.page(kernels, {"H100": {**results, "date": "2027-01-02"}})
    assert "123.4 / " in of_today and "2026-11-27" not in of_today
    # What was not measured has no such part.
    assert "measured" not in predicted.page(kernels, {}).partition("\n## ")[2]


def test_the_page_that_is_there_marks_what_is_predicted() -> None:
    check_marks((predicted.RESULTS / "predicted.md").read_text())


def check_marks(text: str) -> None:
    """Each heading, and the title of each table, says that it is predicted."""
    lines = text.splitlines()
    titles = [line for line in lines if line.startswith("#")]
    titles += [above for above, line in itertools.pairwise(lines) if line.startswith("|---")]
    assert len(titles) >= 7
    for title in titles:
        assert "predicted" in title.lower(), title
    assert "All numbers are predicted" in text


# --- today's kernels

# KB in flight on an H100 and an H200, whose code is the same, to the nearest: at 64@56, 128@28,
# 256@14 and 512@7 of 32 samples, then of 256. A kernel may exceed it and must not fall below.
REACHED = {
    ("statistics", "channels_last"): (84, 84, 48, 24, 84, 84, 84, 84),
    ("statistics", "NCHW"): (98, 95, 48, 24, 98, 98, 98, 98),
    ("pool", "channels_last"): (78, 78, 48, 24, 78, 78, 120, 74),
    ("pool", "NCHW"): (190, 95, 48, 24, 196, 196, 98, 98),
    ("recombine", "channels_last"): (78, 78, 48, 24, 78, 78, 120, 74),
    ("recombine", "NCHW"): (147, 74, 48, 24, 147, 147, 74, 74),
    ("pool_backward", "channels_last"): (81, 81, 71, 36, 81, 81, 84, 74),
    ("pool_backward", "NCHW"): (220, 110, 71, 36, 220, 220, 110, 110),
    ("recombine_backward", "channels_last"): (81, 81, 71, 36, 81, 81, 84, 74),
    ("recombine_backward", "NCHW"): (220, 110, 71, 36, 220, 220, 110, 110),
}
# KB that a multiprocessor needs in flight to reach a copy's speed.
WANTED = {"H100": 40, "H200": 64}
CASES = [
    replace(case, batch=batch)
    for batch, layout in itertools.product((32, 256), ("channels_last", "NCHW"))
    for case in predicted.CASES
    if case.layout == layout
]


@functools.cache
def compiled() -> predicted.Kernels:
    with tempfile.TemporaryDirectory() as folder:
        return predicted.compile_kernels("sm_90", Path(folder))


def in_flight(gpu: model.Gpu, name: str, layout: str) -> Iterator[model.Prediction]:
    passed = "backward" if "backward" in name else "train"
    for case in CASES:
        if case.layout == layout:
            yield predict(case, passed, gpu, compiled())[name]


@pytest.mark.long
@pytest.mark.cpu
@pytest.mark.parametrize(("name", "layout"), REACHED)
def test_bytes_in_flight_of_todays_kernels(name: str, layout: str) -> None:
    for launch, reached in zip(in_flight(H100, name, layout), REACHED[name, layout], strict=True):
        assert launch.in_flight / KB >= reached - 0.5


@pytest.mark.long
@pytest.mark.cpu
@pytest.mark.parametrize(("name", "layout"), REACHED)
@pytest.mark.parametrize("gpu", WANTED)
def test_enough_is_in_flight(gpu: str, name: str, layout: str) -> None:
    """As much as a copy's speed needs, or all that a multiprocessor has a share of."""
    for launch in in_flight(GPUS[gpu], name, layout):
        assert launch.in_flight >= min(WANTED[gpu] * KB, launch.share)


@pytest.mark.long
@pytest.mark.cpu
@pytest.mark.parametrize("gpu", ["H100", "H200"])
def test_the_planner_takes_the_faster_way(gpu: str) -> None:
    """Where x is kept on chip, no other launches are predicted to be faster by 10 %."""
    device, kept = GPUS[gpu], 0
    for batch, case in itertools.product((1, 2, 32, 256), predicted.CASES):
        case = replace(case, batch=batch)
        ours, others = (
            sum(launch.seconds for launch in predict(case, "eval", of, compiled()).values())
            for of in (device, replace(device, cluster_blocks=1))
        )
        kept += ours != others
        assert ours <= 1.1 * others, case
    assert kept == 4 * len(predicted.CASES)


@pytest.mark.long
@pytest.mark.cpu
def test_a_kernel_waits_for_the_launch_before_it_touches_memory() -> None:
    """From sm_90 on blocks may start early; once all have, those of the next launch of ours may."""
    memory = ("LD.", "LDG", "ST.", "STG", "ATOM", "RED", "LDGSTS", "UBLKCP")
    assert len(compiled()) >= 15
    for kernel in compiled().values():
        names = [instruction.name for instruction in kernel.body]
        first = next(i for i, name in enumerate(names) if name.startswith(memory))
        before = [name.partition(".")[0] for name in names[:first]]
        assert "ACQBULK" in before, kernel.name
        ends_a_call = kernel.name.startswith(("recombine", "on_chip", "update_running"))
        assert ("PREEXIT" in before) != ends_a_call, kernel.name


@pytest.mark.long
@pytest.mark.cpu
def test_no_map_in_nchw_is_loaded_by_single_elements() -> None:
    """It comes in bulk; float32 parameters are loaded, and in a pool bn0's of any dtype."""
    for name in model.MAPS:
        options = "false, 8" if name == "statistics" else "false, 2, 8, true"
        kernel = compiled()[f"{name}_kernel<__nv_bfloat16, {options}>"]
        assert any(i.name.startswith("UBLKCP") for i in kernel.body)
        widths = {i.width for i in kernel.body if i.loaded(sass.GLOBAL)}
        assert widths <= ({2, 4} if name.startswith("pool") else {4}), name


@pytest.mark.long
@pytest.mark.cpu
@pytest.mark.parametrize("op", predicted.OPS)
def test_no_call_is_predicted_slower_than_an_older_one_was_measured(op: str) -> None:
    """Of an H100, by more than the model's error. What was measured is older than the code."""
    judged = list(predicted.judge(H100, compiled(), predicted.measured_gpus()["H100"]))
    of_op = [one for one in judged if one.op == op]
    assert len(of_op) >= 8
    assert predicted.mean_ratio(of_op) <= 1
    assert all(one.ratio <= 1.15 for one in of_op)
