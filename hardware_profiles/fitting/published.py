"""Fits the few coefficients that published whole-model latencies can tell, for devices nobody here has.

    python hardware_profiles/fitting/published.py            # every fit: coefficients, errors
    python hardware_profiles/fitting/published.py cortex-m7  # one profile's
    python hardware_profiles/fitting/published.py --rows more.csv --toml  # with more rows; as [[kernel]] tables

``hardware_profiles/evidence`` holds the latencies (published.csv, with source and licence) and the fits
(fits.toml). The time of a model is a sum of terms, each a count of work times a coefficient::

    t = run + node * nodes + sum over classes of  mac[class] * macs  + element * elements + weight * weights
        + streamed * weights from memory

There are about as many rows as terms, so the coefficients also have a prior shape (how dear one kind of work
is beside another, from what the hardware does), which holds where the rows say nothing, and a least value
that the hardware cannot go below. With ``x = log(coefficient)`` and a free scale ``s`` the fit minimizes::

    sum over rows (log(predicted / published))^2 + prior_weight^2 * sum over terms (x - log(prior) - s)^2

What it is worth is told by rows it has not seen: each model left out in turn, and other boards and
runtimes, as they are (clock accounted for) and after one scalar.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from onnxcompress.hardware_profiles.fitting.nets import NETS
from onnxcompress.work import NodeWork

EVIDENCE = Path(__file__).resolve().parent.parent / "evidence"

_CLASS = {
    "conv": "conv", "conv_stem": "conv", "conv_grouped": "conv", "conv_transpose": "conv",
    "conv_pointwise": "pointwise", "conv_depthwise": "depthwise",
    "matmul": "pointwise", "matmul_dynamic": "pointwise", "matmul_rows1": "rows1",
}  # fmt: skip
"""Term that prices the multiply-accumulates of a kernel kind."""


@dataclass(frozen=True)
class Row:
    """A published latency.

    Attributes:
        group: device and runtime, "device / runtime".
        mhz: clock of the device; 0 if it is not known.
        model: name in :data:`~nets.NETS`.
        precision: as in profiles.
        nanoseconds: of one inference.
    """

    group: str
    mhz: float
    model: str
    precision: str
    nanoseconds: float


@dataclass(frozen=True)
class Fit:
    """A fit to be made.

    Attributes:
        profile: profile that holds the result.
        precision: kernels of which precision.
        mhz: clock the coefficients are to hold for; 0: that of the rows.
        rows: groups it is made from.
        held_out: groups it is checked on after one scalar each.
        ratio: where a runtime has no rows of its own: (times, over): rows are multiplied by the ratio of
            these groups at (this precision, u8s8), model by model, from u8s8 rows of ``rows``.
        prior: by term, how dear it is beside the others; the scale is free.
        least: what the hardware cannot go below, by term.
        cycles: least is in cycles of the clock, not in nanoseconds.
        cache_bytes: weights that stay on the chip; beyond, they are streamed, as ``memory`` in profiles has it.
        prior_weight: how strongly the prior holds: the relative misfit of a row that a factor of e outweighs.
    """

    profile: str
    precision: str
    mhz: float
    rows: tuple[str, ...]
    prior: Mapping[str, float]
    least: Mapping[str, float]
    held_out: tuple[str, ...] = ()
    ratio: str = ""
    cycles: bool = False
    cache_bytes: int = 0
    prior_weight: float = 0.1


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        coefficients: nanoseconds by term.
        fit_error: mean relative error on the rows of the fit.
        left_out: relative error of each model when it is left out.
        held_out: of each other group: mean relative error after one scalar, and that scalar (published over
            predicted at the same clock).
    """

    coefficients: Mapping[str, float]
    fit_error: float
    left_out: Mapping[str, float]
    held_out: Mapping[str, tuple[float, float]]


def read_rows(path: Path = EVIDENCE / "published.csv") -> list[Row]:
    """Latencies, in the order of the file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(
                f"{r['device']} / {r['runtime']}", float(r["mhz"] or 0), r["model"], r["precision"],
                1e6 * float(r["milliseconds"]),
            )
            for r in csv.DictReader(file)
        ]  # fmt: skip


def read_fits(path: Path = EVIDENCE / "fits.toml") -> list[Fit]:
    """Fits, in the order of the file."""
    tables: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["fit"]
    return [_fit({k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}) for table in tables]


def _fit(values: dict[str, Any]) -> Fit:
    return Fit(**values)


def terms(nodes: Iterable[NodeWork], cache_bytes: int = 0) -> dict[str, float]:
    """How much work of each term there is."""
    counts = dict.fromkeys(("run", "node", "element", "weight", "streamed", *_CLASS.values()), 0.0)
    counts["run"] = 1
    for work in nodes:
        counts["node"] += 1
        counts["weight"] += work.weights
        if work.kind in _CLASS:
            counts[_CLASS[work.kind]] += work.macs
        counts["element"] += work.elements
    if cache_bytes:
        counts["streamed"] = counts["weight"] * min(max(counts["weight"] / cache_bytes - 1, 0), 1)
    return counts


def predicted(coefficients: Mapping[str, float], fit: Fit, model: str) -> float:
    """Nanoseconds of a model."""
    return sum(coefficients.get(term, 0.0) * count for term, count in terms(NETS[model](), fit.cache_bytes).items())


def fitted_kinds(fit: Fit) -> tuple[str, ...]:
    """Kernel kinds whose multiply-accumulates the fit has a term for."""
    return tuple(kind for kind, term in _CLASS.items() if term in fit.prior)


def lower_bounds(fit: Fit) -> dict[str, float]:
    """What the hardware cannot go below, in nanoseconds by term."""
    unit = 1e3 / fit.mhz if fit.cycles else 1.0
    return {term: unit * least for term, least in fit.least.items()}


def solve(fit: Fit, rows: Iterable[Row]) -> dict[str, float]:
    """Coefficients, in nanoseconds by term."""
    rows = list(rows)
    names = list(fit.prior)
    prior = np.log([fit.prior[n] for n in names])
    bounds_below = lower_bounds(fit)
    least = np.log([bounds_below.get(n, 1e-9) for n in names])
    work = [terms(NETS[r.model](), fit.cache_bytes) for r in rows]
    counts = np.array([[w[n] for n in names] for w in work])
    published = np.log([r.nanoseconds * _clock(fit, r) for r in rows])

    def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
        coefficients, scale = x[:-1], x[-1]
        return np.concatenate(
            [np.log(counts @ np.exp(coefficients)) - published, fit.prior_weight * (coefficients - prior - scale)]
        )

    scale = float(np.median(published - np.log(counts @ np.exp(prior))))
    start = np.append(np.maximum(prior + scale, least + 1e-6), scale)
    bounds = (np.append(least, -np.inf), np.full(len(start), np.inf))
    found = least_squares(residuals, start, bounds=bounds, xtol=1e-12, ftol=1e-12)
    return dict(zip(names, np.exp(found.x[:-1]).tolist(), strict=True))


def _clock(fit: Fit, row: Row) -> float:
    """What turns time at the clock of a row into time at the clock of the fit."""
    return row.mhz / fit.mhz if fit.mhz and row.mhz else 1.0


def wanted(fit: Fit, rows: Iterable[Row]) -> list[Row]:
    """Rows a fit is made from."""
    rows = list(rows)
    if not fit.ratio:
        return [r for r in rows if r.group in fit.rows and r.precision == fit.precision]
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.group == fit.ratio:
            times.setdefault(row.model, {})[row.precision] = row.nanoseconds
    return [
        replace(row, precision=fit.precision, nanoseconds=row.nanoseconds * over[fit.precision] / over["u8s8"])
        for row in rows
        if row.group in fit.rows and row.precision == "u8s8" and fit.precision in (over := times.get(row.model, {}))
    ]


def run(fit: Fit, rows: list[Row]) -> Result:
    """Makes a fit and checks it on what it has not seen."""
    used = wanted(fit, rows)
    coefficients = solve(fit, used)
    left_out = {}
    for model in dict.fromkeys(r.model for r in used):
        without = solve(fit, [r for r in used if r.model != model])
        errors = [_error(without, fit, r) for r in used if r.model == model]
        left_out[model] = statistics.fmean(errors)
    held_out = {}
    for group in fit.held_out:
        others = [r for r in rows if r.group == group and r.precision == fit.precision]
        ratios = [predicted(coefficients, fit, r.model) / (r.nanoseconds * _clock(fit, r)) for r in others]
        scalar = math.exp(statistics.fmean(math.log(r) for r in ratios))
        held_out[group] = (statistics.fmean(abs(r / scalar - 1) for r in ratios), 1 / scalar)
    errors = [_error(coefficients, fit, r) for r in used]
    return Result(coefficients, statistics.fmean(map(abs, errors)), left_out, held_out)


def _error(coefficients: Mapping[str, float], fit: Fit, row: Row) -> float:
    return predicted(coefficients, fit, row.model) / (row.nanoseconds * _clock(fit, row)) - 1


def kernels(fit: Fit, coefficients: Mapping[str, float]) -> list[dict[str, str | float]]:
    """Kernel tables of a profile, three digits a number, for the kinds that multiply and accumulate.

    What a node costs is in every kernel, not in ``overhead``, for it differs between precisions.
    """
    common = {
        "ns_per_element": coefficients.get("element", 0.0),
        "ns_per_weight": coefficients.get("weight", 0.0),
        "ns_fixed": coefficients.get("node", 0.0),
    }
    tables: list[dict[str, str | float]] = []
    for kind, term in _CLASS.items():
        price = {"ns_per_mac": coefficients.get(term, coefficients["pointwise"]), **common}
        rounded = {name: float(f"{value:.3g}") for name, value in price.items() if value}
        tables.append({"kind": kind, "precision": fit.precision, **rounded})
    return tables


def _show(fit: Fit, rows: list[Row]) -> None:
    used = wanted(fit, rows)
    result = run(fit, rows)
    print(f"\n{fit.profile}, {fit.precision}: {len(used)} rows, fit error {result.fit_error:.1%}")
    for term, value in result.coefficients.items():
        cycles = f" = {value * fit.mhz / 1e3:.3g} cycles" if fit.cycles else ""
        print(f"  {term:10} {value:10.4g} ns{cycles}")
    left = statistics.fmean(map(abs, result.left_out.values()))
    print(f"  left out, mean {left:.1%}: " + ", ".join(f"{m} {e:+.0%}" for m, e in result.left_out.items()))
    for group, (error, scalar) in result.held_out.items():
        print(f"  held out: {group}: times {scalar:.2f}, then {error:.1%}")
    for row in used:
        published = row.nanoseconds * _clock(fit, row) / 1e6
        value = predicted(result.coefficients, fit, row.model) / 1e6
        print(f"    {row.model:24} published {published:9.3f} ms, fitted {value:9.3f} ms")


def main() -> None:
    """Prints every fit, or those of the profiles named."""
    parser = argparse.ArgumentParser(description="Fits coefficients to published latencies.")
    parser.add_argument("profiles", nargs="*", help="only these")
    parser.add_argument("--rows", type=Path, action="append", default=[], help="more latencies, as in published.csv")
    parser.add_argument("--toml", action="store_true", help="print [[kernel]] tables")
    given = parser.parse_args()
    rows = [row for path in (EVIDENCE / "published.csv", *given.rows) for row in read_rows(path)]
    for fit in read_fits():
        if given.profiles and fit.profile not in given.profiles:
            continue
        if not wanted(fit, rows):
            print(f"\n{fit.profile}, {fit.precision}: no rows of {', '.join(fit.rows)}")
        elif given.toml:
            for table in kernels(fit, solve(fit, wanted(fit, rows))):
                lines = (f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v:.10g}" for k, v in table.items())
                print("\n[[kernel]]", *lines, sep="\n")
        else:
            _show(fit, rows)


if __name__ == "__main__":
    main()
