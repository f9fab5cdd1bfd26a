"""What loading costs: only that it is measured, for figures depend on the machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from models import normal, text

from onnxcompress.cli import main
from onnxcompress.errors import ModelReadError
from onnxcompress.loading import measure_load
from onnxcompress.model import save

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
