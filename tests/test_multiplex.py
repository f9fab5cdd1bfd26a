"""Bundles of models: what is shared, that nothing changes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import onnxcompress
from onnxcompress.cli import main
from onnxcompress.errors import ModelReadError, OnnxCompressError, OutputError, UsageError


def network(path: Path, *weights: np.ndarray, external: bool = False) -> Path:
    """Products with square weights, one after the other; a Constant node holds the last."""
    size = weights[0].shape[0]
    held = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    last = len(held) - 1
    nodes = [helper.make_node("Constant", [], [f"w{last}"], value=held[last])]
    nodes += [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(len(held))]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x0", 1, [1, size])],
        [helper.make_tensor_value_info(f"x{last + 1}", 1, [1, size])],
        initializer=held[:last],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=external, location=path.name + ".data", size_threshold=0)
    return path


def normal(seed: int, size: int = 64) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((size, size)) / size**0.5).astype(np.float32)


def outputs(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    size = session.get_inputs()[0].shape[1]
    return np.asarray(session.run(None, {"x0": np.ones((1, size), np.float32)})[0])


@pytest.mark.parametrize("external", [False, True])
def test_equal_weights_are_stored_once_and_every_model_runs_alone(tmp_path: Path, external: bool) -> None:
    a = network(tmp_path / "a.onnx", normal(0), normal(1), normal(1), external=external)
    b = network(tmp_path / "b.onnx", normal(2), normal(1), external=external)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    made = onnxcompress.multiplex([a, b], tmp_path / "bundle")
    assert sorted(p.name for p in made.folder.iterdir()) == ["a.onnx", "b.onnx", "weights.bin"]
    assert made.weights_bytes == 3 * normal(0).nbytes
    assert [m.shared_bytes for m in made.models] == [normal(1).nbytes] * 2
    assert [m.repeated_bytes for m in made.models] == [normal(1).nbytes, 0]
    assert all(m.equal for m in made.models)
    for path in (a, b):
        onnx.checker.check_model(str(made.folder / path.name))
        np.testing.assert_array_equal(outputs(made.folder / path.name), outputs(path))
    assert {p: p.read_bytes() for p in before} == before
    again = onnxcompress.multiplex([a, b], tmp_path / "again")
    assert [p.read_bytes() for p in again.files] == [p.read_bytes() for p in made.files]
    assert onnxcompress.multiplex([a, b], tmp_path / "bundle").weights_bytes == made.weights_bytes  # replaced


def test_near_weights_are_merged_and_taken_back_where_outputs_suffer(tmp_path: Path) -> None:
    a = network(tmp_path / "a.onnx", normal(0), normal(1), normal(2))
    noise = [normal(9), normal(8)]
    b = network(tmp_path / "b.onnx", normal(0) + 5e-3 * noise[0], normal(1) + 1e-3 * noise[1], normal(3))
    made = onnxcompress.multiplex([a, b], tmp_path / "near", near=40, min_sqnr=30)
    assert [m.tensor for m in made.models[1].merges] == ["w0", "w1"]
    assert made.models[1].merges[0].sqnr_db == pytest.approx(46, abs=0.5)
    strict = onnxcompress.multiplex([a, b], tmp_path / "strict", near=40, min_sqnr=52)
    assert [m.tensor for m in strict.models[1].merges] == ["w1"]  # the less alike one is taken back
    assert strict.models[1].taken_back == 1
    assert strict.weights_bytes == made.weights_bytes + normal(0).nbytes
    none = onnxcompress.multiplex([a, b], tmp_path / "none", near=40, min_sqnr=200)
    assert none.models[1].equal
    assert none.models[1].taken_back == 2


def test_bad_input_says_what_and_leaves_nothing(tmp_path: Path) -> None:
    a = network(tmp_path / "a.onnx", normal(0), normal(1))
    (tmp_path / "other").mkdir()
    twin = network(tmp_path / "other" / "a.onnx", normal(0), normal(1))
    lost = network(tmp_path / "lost.onnx", normal(0), normal(1), external=True)
    (tmp_path / "lost.onnx.data").unlink()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[list[Path], Path, type[OnnxCompressError], str]] = [
        ([a], tmp_path / "out", UsageError, "1 models"),
        ([a, a], tmp_path / "out", UsageError, "given twice"),
        ([a, twin], tmp_path / "out", UsageError, "same name"),
        ([a, lost], tmp_path / "out", ModelReadError, "lost.onnx.data"),
        ([a, tmp_path / "no.onnx"], tmp_path / "out", ModelReadError, "no such file"),
        ([a, network(tmp_path / "other" / "b.onnx", normal(0))], full, OutputError, "mine.txt"),
        ([a, tmp_path / "other" / "b.onnx"], tmp_path, OutputError, "is an input"),
        ([a, tmp_path / "other" / "b.onnx"], tmp_path / "no" / "out", OutputError, "no folder"),
    ]
    for models, output, kind, words in cases:
        with pytest.raises(kind, match=words):
            onnxcompress.multiplex(models, output)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "other" / "b.onnx"])


def test_the_command_prints_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = network(tmp_path / "a.onnx", normal(0), normal(1))
    b = network(tmp_path / "b.onnx", normal(1), normal(0))
    np.savez(tmp_path / "feeds.npz", x0=np.ones((2, 64), np.float32)[:, None])
    words = ["multiplex", a, b, "-o", tmp_path / "out", "--calibration", f"a={tmp_path / 'feeds.npz'}"]
    assert main([str(w) for w in (*words, "--json")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [m["equal"] for m in document["models"]] == [True, True]
    assert main([str(w) for w in words]) == 0
    assert "smaller" in capsys.readouterr().out
    assert main([str(w) for w in (*words, "--calibration", "c=x")]) == 2
