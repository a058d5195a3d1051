"""From the results of gpu.py to what was to be reached, and a table short enough for one screen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Results = Mapping[str, Any]
# Maps of fewer bytes than these stay in the cache in part.
LARGE_BYTES = 100e6
# What the ops of that backend are called by, beside the native ones.
TRITON = "triton "


class Target(NamedTuple):
    """What is to be reached.

    Attributes:
        name: in words.
        wanted: the bound.
        values: what was reached, one number a case.
        reached: the number among them that decides.
        at_most: the bound is an upper one.
    """

    name: str
    wanted: float
    values: Callable[[Results], list[float]]
    reached: Callable[[list[float]], float]
    at_most: bool = False

    def line(self, results: Results) -> str:
        values = self.values(results)
        wanted = f"{'<' if self.at_most else '>='} {self.wanted:g}"
        if not values:
            return f"{self.name:<58}{wanted:>8}{'not measured':>26}"
        reached = self.reached(values)
        passed = reached < self.wanted if self.at_most else reached >= self.wanted
        span = f"({min(values):.2f} to {max(values):.2f})"
        verdict = "pass" if passed else "MISS"
        return f"{self.name:<58}{wanted:>8}{reached:>8.2f}{span:>18}  {verdict}"


def _rows(results: Results, what: str, contender: str, **facts: object) -> list[Row]:
    return [
        row
        for row in results["rows"]
        if row["what"] == what
        and row["contender"] == contender
        and all(row[name] == value for name, value in facts.items())
    ]


def _of_copy(what: str, contender: str) -> Callable[[Results], list[float]]:
    def values(results: Results) -> list[float]:
        rows = _rows(results, what, contender)
        return [row["of_copy"] for row in rows if row["floor_bytes"] >= LARGE_BYTES]

    return values


def _speedups(what: str, over: str, **facts: object) -> Callable[[Results], list[float]]:
    def values(results: Results) -> list[float]:
        slow = {row["case"]: row["median_us"] for row in _rows(results, what, over, **facts)}
        fused = _rows(results, what, "fused", **facts)
        return [slow[row["case"]] / row["median_us"] for row in fused if row["case"] in slow]

    return values


def _triton_over_native(results: Results) -> list[float]:
    rows = [row for row in results["rows"] if row["what"] == "op"]
    native = {(row["case"], TRITON + row["contender"]): row["median_us"] for row in rows}
    return [
        row["median_us"] / native[row["case"], row["contender"]]
        for row in rows
        if row["contender"].startswith(TRITON)
    ]


def _single_samples(results: Results) -> list[float]:
    rows = _rows(results, "eval", "fused", batch=1, dtype="bf16")
    return [row["median_us"] for row in rows if row["how"] == "graph"]


def _large(values: Callable[..., Callable[[Results], list[float]]], train: bool) -> Any:
    return lambda results: values("network", "eager", train=train)(
        {"rows": [row for row in results["rows"] if row.get("batch", 0) >= 64]}
    )


_mean = statistics.geometric_mean
AFTER = {"form": "after conv", "dtype": "bf16"}
TARGETS = (
    Target("eval above 100 MB, of copy bandwidth, worst", 0.85, _of_copy("eval", "fused"), min),
    Target(
        "backward above 100 MB, of copy bandwidth, worst", 0.85, _of_copy("op", "backward"), min
    ),
    Target(
        "eval over torch.compile, mean", 1.4, _speedups("compile", "compile", train=False), _mean
    ),
    Target(
        "train step after conv over torch.compile, mean",
        1.5,
        _speedups("compile", "compile", train=True, form="after conv"),
        _mean,
    ),
    Target("eval after conv over eager, mean", 4, _speedups("eval", "eager", **AFTER), _mean),
    Target(
        "train step after conv over eager, mean", 4, _speedups("train", "eager", **AFTER), _mean
    ),
    Target("eval of one sample in bf16, graph replay, us, worst", 8, _single_samples, max, True),
    Target("Triton's ops over the native ones, worst", 1.25, _triton_over_native, max, True),
    Target("ResNeSt-50 inference, B >= 64, over eager, worst", 1.15, _large(_speedups, False), min),
    Target("ResNeSt-50 train step, B >= 64, over eager, worst", 1.15, _large(_speedups, True), min),
)


def lines(results: Results) -> list[str]:
    """The table: targets, then the rows that matter most; the JSON has them all."""
    rate = results["copy_bytes_per_s"] / 1e9
    rows = results["rows"]
    return [
        f"=== {results['device']}, driver {results['driver']}, CUDA {results['cuda']}, "
        f"torch {results['torch']}",
        f"{results['date']}, commit {results['commit'][:12]}, copy {rate:,.0f} GB/s read and "
        f"written; {results['settings']}",
        f"{'target':<58}{'wanted':>8}{'reached':>8}",
        *(target.line(results) for target in TARGETS),
        *_table("eval, us", [row for row in rows if _is_shown(row, "eval")]),
        *_table("train step, us", [row for row in rows if _is_shown(row, "train")]),
        *_table("train step under autocast, us", [row for row in rows if _is_shown(row, "amp")]),
        *_table("calls without a graph, us", [row for row in rows if row["what"] == "calls"]),
        *_table("beside torch.compile, us", [row for row in rows if row["what"] == "compile"]),
        *_ops([row for row in rows if row["what"] == "op" and row["form"] == "after conv"]),
        *_triton_ops([row for row in rows if row["what"] == "op"]),
        *_table("whole network, us", [row for row in rows if row["what"] == "network"]),
        *_images([row for row in rows if row["what"] == "network"]),
        *_list("FAILED", [f"{label}: {why}" for label, why in results["failed"].items()], 6),
        *_list("skipped, as the time was over", results["skipped"], 3),
    ]


def _is_shown(row: Row, what: str) -> bool:
    """All after a convolution in bf16 and channels_last, at the smallest and the largest batch."""
    return (
        row["what"] == what
        and all(row[name] == value for name, value in AFTER.items())
        and row["layout"] == "channels_last"
        and row["radix"] == 2
        and row["batch"] != 32
    )


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    """A line for each case: what each contender took, and the fused one's ratios."""
    if not rows:
        return [f"{title}: not measured"]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    others = [name for name in names if name in ("eager", "compile")]
    header = f"{title:<58}" + "".join(f"{name:>11}" for name in names) + f"{'p20-p80':>9}"
    header += "".join(f"{'x ' + name:>10}" for name in others) + f"{'of copy':>9}"
    found = [header]
    for case, cells in _by_case(rows).items():
        fused = cells["fused"]
        spread = (fused["p80_us"] - fused["p20_us"]) / fused["median_us"]
        line = f"{case:<51}{fused['how']:>7}"
        line += "".join(_number(cells.get(name), "median_us", 11, ",.1f") for name in names)
        line += f"{spread:>9.0%}"
        for name in others:
            ratio = cells[name]["median_us"] / fused["median_us"] if name in cells else None
            line += f"{'-' if ratio is None else f'{ratio:.2f}':>10}"
        found.append(line + _number(fused, "of_copy", 9, ".0%"))
    return found


def _images(rows: Sequence[Row]) -> list[str]:
    """A line for each network and contender: its images a second, and the memory of a call."""
    if not rows:
        return []
    found = [f"{'whole network':<58}{'images/s':>11}{'peak MB':>11}"]
    for row in rows:
        peak = row["peak_bytes"]
        memory = "-" if peak is None else f"{peak / 1e6:,.0f}"
        found.append(
            f"{row['case'] + ', ' + row['contender']:<58}{row['images_per_s']:>11,.0f}{memory:>11}"
        )
    return found


def _number(row: Row | None, name: str, width: int, form: str) -> str:
    value = None if row is None else row[name]
    return f"{'-' if value is None else format(value, form):>{width}}"


def _ops(rows: Sequence[Row]) -> list[str]:
    """A line for each case: the part of copy bandwidth that each op reaches at its floor bytes.

    What the two products and the launches between take is the difference of the whole and its two
    passes over the map.
    """
    if not rows:
        return ["single ops: not measured"]
    names = _op_names(rows)
    found = [f"{'single ops, of copy bandwidth':<58}{_op_header(names)}{'MLP, us':>9}"]
    for case, cells in _by_case(rows).items():
        between = cells["eval"]["median_us"]
        between -= cells["pool"]["median_us"] + cells["recombine"]["median_us"]
        line = f"{case:<51}{cells['pool']['how']:>7}"
        line += "".join(_number(cells.get(name), "of_copy", 10, ".0%") for name in names)
        found.append(line + f"{between:>9.1f}")
    return found


def _triton_ops(rows: Sequence[Row]) -> list[str]:
    """A line for each case: how long Triton's ops take, relative to the native ones."""
    if not any(row["contender"].startswith(TRITON) for row in rows):
        return []
    names = _op_names(rows)
    found = [f"{'single ops, Triton over native':<58}{_op_header(names)}"]
    for case, cells in _by_case(rows).items():
        line = f"{case:<51}{cells['pool']['how']:>7}"
        for name in names:
            triton = cells.get(TRITON + name)
            ratio = triton["median_us"] / cells[name]["median_us"] if triton else None
            line += f"{'-' if ratio is None else f'{ratio:.2f}':>10}"
        found.append(line)
    return found


def _by_case(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["contender"]] = row
    return by_case


def _op_names(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(row["contender"] for row in rows)
    return [name for name in names if not name.startswith(TRITON)]


def _op_header(names: Sequence[str]) -> str:
    short = {"recombine_backward": "recomb_bw", "pool_backward": "pool_bw"}
    short |= {"batch_statistics": "stats"}
    return "".join(f"{short.get(name, name):>10}" for name in names)


def _list(title: str, items: Iterable[str], most: int) -> list[str]:
    items = list(items)
    if not items:
        return []
    rest = [f"  and {len(items) - most} more, in the JSON"] if len(items) > most else []
    return [f"{title}: {len(items)}", *(f"  {item[:150]}" for item in items[:most]), *rest]
