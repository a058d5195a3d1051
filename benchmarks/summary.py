"""From measured times to the ratios that are reported, and to one table a setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from grid import Case

Samples = Mapping[str, Sequence[float]]

_HEADER = (
    f"{'':<10}{'median us':^44}{'fused':>7}{'speed-up over':>18}{'times':>8}",
    f"{'shape':<10}{'eager':>11}{'compile':>11}{'fused':>11}{'copy':>11}"
    f"{'iqr':>7}{'eager':>9}{'compile':>9}{'copy':>8}",
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
        "shape": case.shape,
        "batch": case.batch,
        "radix": case.radix,
        "mode": "train" if case.train else "eval",
        "dtype": case.dtype,
        "layout": case.layout,
        "median_us": median * 1e6,
        "relative_iqr": relative_iqr(samples[contender]),
        "floor": "(2R+1)+(2R+2) units of out" if case.train else "R+1 units of out",
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
    if name not in samples:
        return f"{'-':>11}"
    return f"{statistics.median(samples[name]) * 1e6:>11,.1f}"


def _format(ratios: Sequence[float | None]) -> str:
    return "".join(
        f"{'-' if value is None else f'{value:.2f}':>{width}}"
        for value, width in zip(ratios, (9, 9, 8), strict=True)
    )
