"""Records as text: what a person reads is short, complete and never wrong about a number."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest

from onnxcompress import render, tables
from onnxcompress.report import (
    Attempt,
    Budget,
    Comparison,
    Latency,
    OutputDifference,
    PassReport,
    Report,
    SiteReport,
    Totals,
)


def kept(op: str, key: str, reason: str) -> SiteReport:
    return SiteReport("quantize", key, op, "keep", reason)


REPORT = Report(
    input="folder/model.onnx",
    profile="some-board",
    calibration="8 samples",
    budget=Budget(min_sqnr_db=25.0, max_drop=0.01),
    seed=0,
    outcome="2 sites rewritten",
    totals=Totals(
        (4_000_000, 1_000_000),
        (3_600_000, 900_000),
        (10.0, 4.0),
        Latency(12.0, 6.0, 2.0, 40, 1),
        Comparison((OutputDifference("scores", 31.4, 0.01, 0.2), OutputDifference("labels", None, 0.0, 1.0)), 3),
        0.90,
        0.891,
    ),
    passes=(PassReport("quantize", {}, 2, "applied", ""), PassReport("fold", {}, 0, "nothing to do", "")),
    sites=(
        SiteReport("quantize", "conv_[1]", "Conv", "static", "", 2.0, 1_500_000, -40.0),
        SiteReport("quantize", "conv_2", "Conv", "static", "", 1.0, 500_000, -35.0),
        kept("Div", "d1", "no int8 kernel for Div"),
        kept("Tanh", "t1", "no int8 kernel for Tanh"),
        kept("Mul", "m1", "'a' has 2 readers and would cost 0.1 ms"),
        kept("Mul", "m2", "'b' has 2 readers and would cost 0.35 ms"),
    ),
    attempts=(Attempt("quantize", 2, 4.0, 31.4, 0.891, None, "accepted"),),
    notes=("2 local functions were inlined",),
    warnings=("data was made up",),
)


@pytest.fixture(autouse=True)
def no_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def text(report: Report, **options: bool) -> str:
    buffer = io.StringIO()
    tables.show(render.report(report, **options), buffer)  # type: ignore[arg-type]
    return buffer.getvalue()


def test_the_totals_come_first() -> None:
    lines = text(REPORT).splitlines()
    start = lines.index("Totals")
    shown = "\n".join(lines[start : start + 9])
    for part in ("4 MB", "1 MB", "4.00x smaller", "2.50x faster on some-board", "2.00x faster (40 rounds"):
        assert part in shown
    for part in ("31.4 dB", "SQNR of scores, at least 25 dB asked for, 3 held-out samples", "-1.00% (-1.00% allowed)"):
        assert part in shown


def test_sites_with_the_same_fate_are_one_row() -> None:
    shown = text(REPORT)
    assert "Changed: 2 sites" in shown and "Left alone: 4 sites" in shown
    assert "2 x  Conv" in shown and "3.00 ms" in shown and "2 MB" in shown and "-35.0 dB" in shown
    assert "2 x  Div 1, Tanh 1  quantize  no int8 kernel for it" in shown
    assert "... has 2 readers and would cost 0.1..0.35 ms" in shown
    assert "conv_[1]" not in shown and "fold" not in shown


def test_verbose_lists_every_site_with_its_name_as_it_is() -> None:
    shown = text(REPORT, verbose=True)
    for name in ("conv_[1]", "conv_2", "d1", "m2", "'b' has 2 readers and would cost 0.35 ms", "nothing to do"):
        assert name in shown


def test_nothing_is_left_out_of_a_group() -> None:
    groups = render.collapse(REPORT.sites)
    assert sum(g.count for g in groups) == len(REPORT.sites)
    assert math.isclose(sum(g.gain_ms for g in groups), sum(s.gain_ms for s in REPORT.sites))


def test_the_last_pass_comes_first() -> None:
    sites = [kept("Conv", "a", "too small"), replace(kept("Conv", "b", "shared"), pass_name="fold")]
    assert [g.pass_name for g in render.collapse(sites, ["fold", "quantize"])] == ["quantize", "fold"]
    assert [g.pass_name for g in render.collapse(sites, ["quantize", "fold"])] == ["fold", "quantize"]


def test_reasons_that_say_different_things_stay_apart() -> None:
    sites = [kept("Conv", "a", "it is too small"), kept("Conv", "b", "it is too large")]
    assert [g.count for g in render.collapse(sites)] == [1, 1]


def test_notes_and_warnings_are_there() -> None:
    shown = text(REPORT)
    assert "2 local functions were inlined" in shown and "data was made up" in shown


def test_an_equal_result_is_called_so() -> None:
    totals = replace(
        REPORT.totals,
        file_bytes=(100, 100),
        predicted_ms=(1.0, 1.25),
        latency=Latency(1.0, 1.0, 0.999, 10, 1),
        comparison=Comparison((OutputDifference("y", math.inf, 0.0, 1.0),), 1),
    )
    shown = text(replace(REPORT, totals=totals))
    assert (
        "the same (10 rounds" in shown and "1.25x slower" in shown and "exact" in shown and "1 held-out sample" in shown
    )


def test_lines_have_no_trailing_blanks_and_no_colour_when_piped() -> None:
    shown = text(REPORT)
    assert not [line for line in shown.splitlines() if line != line.rstrip()]
    assert "\x1b" not in shown


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Odd:
    path: Path
    colour: Colour
    values: tuple[float, ...]
    count: np.int64


def test_json_is_strict() -> None:
    document = json.loads(tables.as_json(Odd(Path("a"), Colour.RED, (math.inf, -math.inf, 1.5), np.int64(3))))
    assert document == {"path": "a", "colour": "red", "values": ["inf", "-inf", 1.5], "count": 3}
    assert json.loads(tables.as_json(REPORT)) == json.loads(REPORT.to_json())


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (999_700, "1 MB"), (4_745_517, "4.75 MB"), (-2_500_000, "-2.5 MB")],
)
def test_sizes(value: int, shown: str) -> None:
    assert tables.size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.000 ms"),
        (0.0042, "4.2 us"),
        (0.5, "0.500 ms"),
        (1.234, "1.23 ms"),
        (34.56, "34.6 ms"),
        (1234.5, "1234 ms"),
    ],
)
def test_milliseconds(value: float, shown: str) -> None:
    assert tables.milliseconds(value) == shown
