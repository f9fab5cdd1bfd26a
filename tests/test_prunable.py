"""``onnxcompress groups``: what can be pruned, under the names that keep-lists take, and why the rest cannot."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from models import normal, proto_of, text

import onnxcompress
from onnxcompress.cli import main
from onnxcompress.errors import DataError
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from onnxcompress.passes.prune_channels import PruneChannels
from onnxcompress.prunable import GroupFound, groups

BODY = """g (float[n,3,8,8] x) => (float[n,2,4,4] y) {
  a = Conv (x, w, b)  s = BatchNormalization (a, scale, shift, mean, var)  r = Relu (s)
  c = Conv (r, v)  y = Conv (c, u)
}"""
ONES = abs(normal(5, 8)) + 1
WEIGHTS = {
    "w": normal(1, 8, 3, 3, 3), "b": normal(2, 8), "v": normal(3, 4, 8, 3, 3), "u": normal(4, 2, 4, 1, 1),
    "scale": ONES, "shift": ONES, "mean": ONES, "var": ONES,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = text(BODY, WEIGHTS)
    for node in model.graph:
        node.name = f"/{node.outputs[0].name}"
    onnx.save(proto_of(model), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_groups_are_those_after_the_lossless_rewrites(saved: Path) -> None:
    first, second, last = groups(saved)
    assert first == GroupFound("/a", "channels", 8, 8, first.weights, ("/c",), (), 3, "")
    assert "w" in first.weights and not {"scale", "mean"} & set(first.weights), "folded"
    assert (second.name, second.size, second.readers) == ("/c", 4, ("/y",))
    assert (last.name, last.free) == ("/y", 0) and last.pinned.startswith("it is an output of the model (y[1])")


@pytest.mark.parametrize("name", ["resnet_bn", "bert", "gpt_gqa", "bilstm", "c2f_detector"])
def test_names_are_those_the_pass_takes(name: str, tmp_path: Path) -> None:
    onnx.save(FAMILIES[name](), tmp_path / "m.onnx")
    found = groups(tmp_path / "m.onnx")
    keep = {g.name: list(range(0, g.size, 2)) for g in found if g.free == g.size}
    (tmp_path / "keep.json").write_text(json.dumps(keep), encoding="utf-8")
    done = onnxcompress.optimize(
        tmp_path / "m.onnx",
        profile="host-x86-vnni",
        calibration=[*family_feeds(name, 3)],
        passes=[PruneChannels(keep=str(tmp_path / "keep.json"), recover=False)],
        budget=onnxcompress.Budget(min_sqnr_db=-1000),
        timing=False,
    )
    cut = {s.key: s.decision for s in done.report.sites if s.pass_name == "prune_channels" and s.decision != "keep"}
    assert cut == {g.name: f"{(g.size + 1) // 2} of {g.size} {g.unit}" for g in found if g.name in keep}


def test_what_it_prints(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", str(saved)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "3 groups, 2 of them can shrink" in captured.out
    for word in ("/a", "channels", "Have to stay", "it is an output of the model"):
        assert word in captured.out
    assert main(["groups", str(saved), "-v"]) == 0


def test_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", str(saved), "--json", "--shape", "x=2x3x8x8"]) == 0
    first, _, last = json.loads(capsys.readouterr().out)
    assert (first["name"], first["size"], first["free"], first["readers"]) == ("/a", 8, 8, ["/c"])
    assert last["free"] == 0 and last["pinned"]


def test_errors(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", str(saved), "--shape", "z=1"]) == 4
    assert main(["groups", str(saved.with_name("none.onnx"))]) == 3
    assert main(["groups", str(saved), "--calibration", "none.npz"]) == 4
    assert "error: " in capsys.readouterr().err
    with pytest.raises(DataError):
        groups(saved, shapes={"x": (1, 3)})
