"""What loading costs: only that it is measured, for figures depend on the machine."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from models import normal, text
from rich.console import Console

import onnxcompress
from onnxcompress import registry, render
from onnxcompress.cli import main
from onnxcompress.errors import ModelReadError
from onnxcompress.loading import measure_load
from onnxcompress.model import save
from onnxcompress.pipeline import Result
from onnxcompress.profile import Device

BODY = "net (float[N, 512] x) => (float[N, 512] y) { y = MatMul (x, w) }"


def test_time_and_memory_are_measured(tmp_path: Path) -> None:
    model = text(BODY, {"w": normal(0, 512, 512)})
    save(model, tmp_path / "m.onnx")
    load = measure_load(tmp_path / "m.onnx", model, rounds=3)
    assert min(load.ms) > 0
    assert load.rounds == 3
    if sys.platform == "linux":
        assert load.resident_bytes is not None
        assert load.peak_bytes is not None
        assert min(load.resident_bytes) > 0
        assert min(load.peak_bytes) > 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelReadError, match=r"no\.onnx"):
        measure_load(tmp_path / "no.onnx", tmp_path / "no.onnx")


def test_compare_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(text(BODY, {"w": normal(0, 512, 512)}), tmp_path / "m.onnx")
    assert main(["compare", str(tmp_path / "m.onnx"), str(tmp_path / "m.onnx"), "--load"]) == 0
    assert "load" in capsys.readouterr().out


def test_slow_ones_are_timed_less_often_but_once() -> None:
    model = text(BODY, {"w": normal(0, 512, 512)})
    assert measure_load(model, model, rounds=50, seconds=0).rounds == 1


# --- in the report -----------------------------------------------------------------------------


def optimized(spec: str, output: Path | None = None, *, timing: bool = True) -> Result:
    model = text(BODY, {"w": normal(0, 512, 512)})
    feeds = [{"x": normal(seed, 4, 512)} for seed in range(4)]
    budget = onnxcompress.Budget(min_sqnr_db=5)
    passes = [registry.parse(spec)]
    return onnxcompress.optimize(
        model, calibration=feeds, passes=passes, budget=budget, timing=timing, output=output, profile="host-x86-vnni"
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is of every profile's kind, and nothing measures slower on it."""
    monkeypatch.setattr(Device, "is_here", lambda self: True)
    monkeypatch.setattr("onnxcompress.job._SLOWER", 0.0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("written", [False, True])
def test_what_is_unpacked_at_load_has_its_load_reported(tmp_path: Path, written: bool) -> None:
    report = optimized("share_weights{bits=4}", tmp_path / "m.onnx" if written else None).report
    load = report.totals.load
    assert load is not None and min(load.ms) > 0 and load.rounds >= 1
    shown = io.StringIO()
    Console(file=shown, width=200).print(render.report(report))
    assert "  load  " in shown.getvalue()
    assert ("memory after load" in shown.getvalue()) is (load.resident_bytes is not None)
    assert json.loads(report.to_json())["totals"]["load"]["ms"] == list(load.ms)


@pytest.mark.usefixtures("here")
def test_other_passes_have_none() -> None:
    report = optimized("quantize{modes=weights}").report
    assert any(s.decision != "keep" for s in report.sites)
    assert report.totals.load is None


@pytest.mark.usefixtures("here")
def test_without_timing_there_is_none() -> None:
    report = optimized("share_weights{bits=4}", timing=False).report
    assert any(s.decision != "keep" for s in report.sites)
    assert report.totals.load is None
