"""A real plug-in package, installed with pip, is found and run through the same entry point as ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = Path(__file__).parent / "plugin_package"

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
two_layers (float[2, 8] x) => (float[2, 4] y) {
    h = MatMul (x, w1)
    r = Relu (h)
    y = MatMul (r, w2)
}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in installed in it; needs no network."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PACKAGE, folder / "source")  # building leaves files behind
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", *install, str(source)], check=True, capture_output=True)
    return folder / "site"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(MODEL)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (8, 16)), ("w2", (16, 4))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    np.savez(tmp_path / "feeds.npz", x=rng.normal(size=(2, 8)).astype(np.float32))
    return path


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnxcompress", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_is_listed_with_its_options(site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, "passes", "list", "--json")
    assert done.returncode == 0, done.stderr
    found = {p["name"]: p for p in json.loads(done.stdout)}
    assert found["round_weights"]["options"] == [{"name": "bits", "type": "int", "default": 8}]
    assert "quantize" in found


def test_it_rewrites_a_model(site: Path, tmp_path: Path, model: Path) -> None:
    arguments = ["optimize", "model.onnx", "--profile", "host-x86-vnni", "--calibration", "feeds.npz", "-o", "out.onnx"]
    done = run(site, tmp_path, *arguments, "--pass", "round_weights{bits=6}", "--json")
    assert done.returncode == 0, done.stderr
    (mine,) = [p for p in json.loads(done.stdout)["report"]["passes"] if p["name"] == "round_weights"]
    assert mine["options"] == {"bits": 6} and mine["outcome"] == "applied" and mine["changed"] == 2

    before, after = (
        [onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer] for p in (model, tmp_path / "out.onnx")
    )
    by_shape = {a.shape: a for a in after}
    for old in before:
        new = by_shape[old.shape]
        assert not np.array_equal(old, new)
        assert np.abs(new / old - 1).max() <= 2.0**-6  # half a unit of a 6-bit mantissa of at least 1/2


def test_a_wrong_option_is_named(site: Path, tmp_path: Path, model: Path) -> None:
    arguments = ["optimize", "model.onnx", "--profile", "host-x86-vnni", "-o", "out.onnx", "--json"]
    done = run(site, tmp_path, *arguments, "--pass", "round_weights{bit=6}")
    assert done.returncode == 6
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "PassOptionError" and "'bits'" in error["hint"]
    assert not (tmp_path / "out.onnx").exists()


def test_the_readme_shows_this_very_pass() -> None:
    code = (PACKAGE / "round_weights.py").read_text(encoding="utf-8")
    shown = code[code.index("from dataclasses") :].strip()
    assert f"```python\n{shown}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")
