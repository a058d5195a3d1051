"""From measured times to the ratios that are reported, and to the tables at the end of a run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from grid import Case
from network import Result, Workload

Samples = Mapping[str, Sequence[float]]

_HEADER = (
    f"{'':<10}{'median us':^44}{'fused':>7}{'speed-up over':>18}{'times':>8}",
    f"{'shape':<10}{'eager':>11}{'compile':>11}{'fused':>11}{'copy':>11}"
    f"{'iqr':>7}{'eager':>9}{'compile':>9}{'copy':>8}",
)
_NETWORK_HEADER = (
    f"{'':<17}{'median ms':^27}{'fused':>7}{'speed-up over eager':>21}"
    f"{'saved for backward, MB':>26}",
    f"{'':<17}{'eager':>9}{'fused':>9}{'folded':>9}"
    f"{'iqr':>7}{'fused':>12}{'folded':>9}{'eager':>10}{'fused':>8}{'less':>8}",
)


def relative_iqr(times: Sequence[float]) -> float:
    """Spread of ``times``: the distance of their quartiles over their median."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle


def ratio(samples: Samples, numerator: str, denominator: str) -> float | None:
    """The ratio of two contenders' medians, or None if one was not measured."""
    if numerator not in samples or denominator not in samples:
        return None
    return statistics.median(samples[numerator]) / statistics.median(samples[denominator])


def extra_info(case: Case, samples: Samples, contender: str) -> dict[str, object]:
    """What a benchmark's JSON entry says beside its times.

    ``gb_per_s`` counts the floor's bytes, not those that the contender really moves.
    """
    median = statistics.median(samples[contender])
    info: dict[str, object] = {
        "form": case.form,
        "shape": case.shape,
        "batch": case.batch,
        "radix": case.radix,
        "mode": "train" if case.train else "eval",
        "dtype": case.dtype,
        "layout": case.layout,
        "median_us": median * 1e6,
        "relative_iqr": relative_iqr(samples[contender]),
        "floor": f"{case.floor} units of out",
        "floor_bytes": case.floor_bytes,
        "gb_per_s": case.floor_bytes / median / 1e9,
        "times_copy_floor": ratio(samples, contender, "copy"),
    }
    for other in ("eager", "compile"):
        speedup = ratio(samples, other, contender)
        if speedup is not None:
            info[f"speedup_over_{other}"] = speedup
    return info


def table(results: Mapping[Case, Samples]) -> list[str]:
    """The lines of the summary: a block for each setting, its geometric means last."""
    by_setting: dict[str, list[tuple[str, Samples]]] = {}
    for case, samples in results.items():
        by_setting.setdefault(case.setting, []).append((case.shape, samples))
    lines = []
    for setting, rows in by_setting.items():
        width = len(_HEADER[-1])
        lines += [f" {setting} ".center(width, "-"), *_HEADER]
        ratios = [_ratios(samples) for _, samples in rows]
        for (shape, samples), row in zip(rows, ratios, strict=True):
            lines.append(
                f"{shape:<10}"
                + "".join(_time(samples, name) for name in ("eager", "compile", "fused", "copy"))
                + f"{relative_iqr(samples['fused']):>7.0%}"
                + _format(row)
            )
        means = [_geometric_mean(column) for column in zip(*ratios, strict=True)]
        lines += [f"{'geometric mean':<61}" + _format(means), ""]
    return lines


def _ratios(samples: Samples) -> tuple[float | None, ...]:
    return (
        ratio(samples, "eager", "fused"),
        ratio(samples, "compile", "fused"),
        ratio(samples, "fused", "copy"),
    )


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


def _time(samples: Samples, name: str) -> str:
    time = statistics.median(samples[name]) * 1e6 if name in samples else None
    return _cell(time, 11, ",.1f")


def _format(ratios: Sequence[float | None]) -> str:
    return "".join(
        _cell(value, width, ".2f") for value, width in zip(ratios, (9, 9, 8), strict=True)
    )


def _cell(value: float | None, width: int, form: str) -> str:
    """``value`` to the right of ``width`` columns, or a dash where nothing was measured."""
    return f"{'-' if value is None else format(value, form):>{width}}"


def network_info(workload: Workload, result: Result, contender: str) -> dict[str, object]:
    """What the JSON entry of a whole network's benchmark says beside its times."""
    samples = result.samples
    info: dict[str, object] = {
        "batch": workload.batch,
        "mode": "train" if workload.train else "eval",
        "median_ms": statistics.median(samples[contender]) * 1e3,
        "relative_iqr": relative_iqr(samples[contender]),
        "speedup_over_eager": ratio(samples, "eager", contender),
    }
    if contender in result.saved:
        info["saved_for_backward_bytes"] = result.saved[contender]
    return info


def network_table(results: Mapping[Workload, Result]) -> list[str]:
    """The lines of the whole network's summary: one for each workload."""
    lines = [*_NETWORK_HEADER]
    for workload, (samples, saved) in results.items():
        medians = [
            statistics.median(samples[name]) * 1e3 if name in samples else None
            for name in ("eager", "fused", "folded")
        ]
        ratios = [ratio(samples, "eager", name) for name in ("fused", "folded")]
        line = f"{workload!s:<17}"
        line += "".join(_cell(value, 9, ",.1f") for value in medians)
        line += f"{relative_iqr(samples['fused']):>7.0%}"
        line += _cell(ratios[0], 12, ".2f") + _cell(ratios[1], 9, ".2f")
        if saved:
            eager, fused = saved["eager"], saved["fused"]
            line += f"{eager / 1e6:>10.0f}{fused / 1e6:>8.0f}{1 - fused / eager:>8.1%}"
        else:
            line += f"{'-':>10}{'-':>8}{'-':>8}"
        lines.append(line)
    return [*lines, ""]
