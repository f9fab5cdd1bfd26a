"""Every generated family: valid, runnable for several shapes, reproducible, neither vanishing nor exploding."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcompress.errors import ZooError
from onnxcompress.models_zoo import families_cnn as cnn
from onnxcompress.models_zoo import families_dense as dense
from onnxcompress.models_zoo import families_transformers as transformers
from onnxcompress.models_zoo.building import IR_VERSION, OPSET, centred, normal
from onnxcompress.models_zoo.families import FAMILIES, family_feeds
from onnxcompress.models_zoo.feeds import Feed

# Sizes other than the default for families whose inputs have an open axis.
OTHER_SIZES = {
    "resnet": 40,
    "resnet_bn": 40,
    "densenet": 40,
    "mobilenet_v3": 48,
    "shufflenet_v2": 48,
    "grouped": 40,
    "shared_biases": 40,
    "unet": 20,
    "gpt_gqa": 5,
    "bert": 5,
    "bilstm": 7,
    "wavenet1d": 11,
}
FIXED = ["vgg", "vit"]
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU"}


def run(model: onnx.ModelProto, feed: Feed, *, optimized: bool = False) -> dict[str, np.ndarray]:
    """What onnxruntime makes of the graph, as written or as it rewrites it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, feed), strict=True))


def with_layers_as_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """What layers give is handed out, too."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    layers = {n.output[0] for n in model.graph.node if n.op_type in LAYERS}
    model.graph.output.extend(v for v in inferred.graph.value_info if v.name in layers)
    assert layers <= {o.name for o in model.graph.output}, "a layer without a known type"
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_is_valid_and_marked_as_the_zoos(name: str) -> None:
    model = FAMILIES[name]()
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.producer_name) == (IR_VERSION, "onnxcompress.models_zoo")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert all(v.type.tensor_type.shape.dim[0].dim_param == "batch" for v in (*model.graph.input, *model.graph.output))
    names = [n.name for n in model.graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_is_read_and_every_node_matters(name: str) -> None:
    graph = FAMILIES[name]().graph
    read = {v for n in graph.node for v in n.input} | {o.name for o in graph.output}
    assert {w.name for w in graph.initializer} <= read
    assert all(any(o in read for o in n.output) for n in graph.node)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_runs(name: str, batch: int) -> None:
    model = FAMILIES[name]()
    sizes = [None, *([OTHER_SIZES[name]] if name in OTHER_SIZES else [])]
    for size in sizes:
        (feed,) = family_feeds(name, 1, batch=batch, size=size)
        rewritten = run(model, feed, optimized=True)
        for value, output in run(model, feed).items():
            assert output.shape[0] == batch
            assert np.isfinite(output).all()
            assert output.std() > 0.02
            assert np.allclose(output, rewritten[value], atol=1e-4 * np.abs(output).max())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("width", [None, 64])
def test_activations_neither_vanish_nor_explode(name: str, width: int | None) -> None:
    model = FAMILIES[name]() if width is None else FAMILIES[name](width)
    (feed,) = family_feeds(name, 1, batch=2)
    for value, output in run(with_layers_as_outputs(model), feed).items():
        assert 0.03 < output.std() < 30, value


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_depend_on_the_input(name: str) -> None:
    model = FAMILIES[name]()
    first, second = (run(model, feed) for feed in family_feeds(name, 2))
    for value, output in first.items():
        assert (output - second[value]).std() > 0.02 * output.std(), value


@pytest.mark.parametrize("build", [cnn.mobilenet_v2, dense.c2f_detector])
def test_pictures_of_another_side(build: Callable[..., onnx.ModelProto]) -> None:
    model = build(side=96)
    onnx.checker.check_model(model, full_check=True)
    (feed,) = family_feeds(build.__name__, 1, size=96)
    assert all(np.isfinite(output).all() for output in run(model, feed).values())


def test_depth_adds_layers() -> None:
    for build in (cnn.resnet, cnn.densenet, cnn.shufflenet_v2, dense.wavenet1d, transformers.gpt_gqa):
        shallow, deep = build(depth=1), build(depth=5)
        onnx.checker.check_model(deep, full_check=True)
        assert len(deep.graph.node) > 1.5 * len(shallow.graph.node)
        (feed,) = family_feeds(build.__name__, 1)
        for model in (shallow, deep):
            assert all(0.02 < output.std() < 30 for output in run(model, feed).values())


@pytest.mark.parametrize("name", ["gpt_gqa", "wavenet1d"])
def test_the_past_does_not_see_the_future(name: str) -> None:
    model = FAMILIES[name]()
    (feed,) = family_feeds(name, 1)
    (key,) = feed
    axis = 1 if name == "gpt_gqa" else 2
    changed = feed[key].copy()
    changed.swapaxes(0, axis)[-1] += 1
    (before,), (after,) = (run(model, f).values() for f in (feed, {key: changed}))
    before, after = before.swapaxes(0, axis), after.swapaxes(0, axis)
    assert np.allclose(before[:-1], after[:-1], atol=1e-6)
    assert not np.allclose(before[-1], after[-1], atol=1e-3)


def test_a_row_of_bert_does_not_see_its_padding() -> None:
    model = FAMILIES["bert"]()
    ids = np.arange(1, 9, dtype=np.int64)[None]
    padded = {"input_ids": np.pad(ids, ((0, 0), (0, 3))), "attention_mask": np.pad(np.ones_like(ids), ((0, 0), (0, 3)))}
    short = run(model, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["pooled"]
    assert np.allclose(run(model, padded)["pooled"], short, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_size_follows_the_width_and_bytes_the_seed(name: str) -> None:
    family = FAMILIES[name]
    small = family(16).SerializeToString(deterministic=True)
    assert family(16).SerializeToString(deterministic=True) == small
    assert family(16, seed=1).SerializeToString(deterministic=True) != small
    assert family(32).ByteSize() > 1.2 * len(small)


def test_bytes_do_not_depend_on_the_process() -> None:
    script = (
        "import hashlib, json; from onnxcompress.models_zoo.families import FAMILIES;"
        "print(json.dumps({n: hashlib.sha256(f().SerializeToString(deterministic=True)).hexdigest()"
        " for n, f in FAMILIES.items()}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    there = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    here = {n: hashlib.sha256(f().SerializeToString(deterministic=True)).hexdigest() for n, f in FAMILIES.items()}
    assert json.loads(there.stdout) == here


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet", {"Conv": 15, "Add": 6}),
        ("resnet_bn", {"Conv": 15, "BatchNormalization": 15}),
        ("densenet", {"BatchNormalization": 8, "Concat": 8, "AveragePool": 1}),
        ("mobilenet_v2", {"Clip": 11, "Add": 2}),
        ("mobilenet_v3", {"HardSigmoid": 3, "HardSwish": 7, "Mul": 3}),
        ("shufflenet_v2", {"Split": 2, "Slice": 4, "Transpose": 6}),
        ("c2f_detector", {"Resize": 1, "MaxPool": 3, "Split": 6}),
        ("unet", {"ConvTranspose": 2, "Concat": 2, "MaxPool": 2}),
        ("vit", {"LayerNormalization": 5, "Erf": 2, "Split": 1, "Expand": 1}),
        ("gpt_gqa", {"Neg": 4, "Expand": 4, "Sqrt": 5, "MatMul": 19}),
        ("bilstm", {"LSTM": 2, "GRU": 1, "Conv": 1}),
        ("shared_biases", {"Conv": 4}),
        ("vgg", {"Conv": 3, "MaxPool": 3, "Flatten": 1, "Gemm": 2}),
        ("grouped", {"InstanceNormalization": 8}),
        ("wavenet1d", {"Pad": 4, "Tanh": 4, "Sigmoid": 4, "Split": 4}),
        ("bert", {"Sqrt": 5, "Erf": 2, "Tanh": 1, "MatMul": 16}),
    ],
)
def test_has_what_the_family_is_for(name: str, wanted: dict[str, int]) -> None:
    found = Counter(n.op_type for n in FAMILIES[name]().graph.node)
    assert {op: found[op] for op in wanted} == wanted


def test_four_convolutions_read_one_bias() -> None:
    convs = [n for n in FAMILIES["shared_biases"]().graph.node if n.op_type == "Conv"]
    assert {n.input[2] for n in convs} == {"bias"}


@pytest.mark.parametrize("width", [0, -8, 12])
def test_odd_widths_are_refused(width: int) -> None:
    with pytest.raises(ZooError, match=f"resnet cannot be {width} wide"):
        FAMILIES["resnet"](width)


def test_other_impossible_sizes_are_refused() -> None:
    with pytest.raises(ZooError, match="0 deep"):
        dense.wavenet1d(depth=0)
    with pytest.raises(ZooError, match="40 pixels"):
        dense.c2f_detector(side=40)


def test_feeds_depend_on_seed_and_place_only() -> None:
    two, three = list(family_feeds("resnet", 2)), list(family_feeds("resnet", 3))
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(two, three, strict=False))
    (other,) = family_feeds("resnet", 1, seed=1)
    assert not np.array_equal(two[0]["image"], other["image"])


@pytest.mark.parametrize("name", FIXED)
def test_a_size_the_graph_does_not_leave_open_is_refused(name: str) -> None:
    with pytest.raises(ZooError, match="takes size"):
        family_feeds(name, 1, size=7)


def test_bad_feeds_are_refused_at_once() -> None:
    with pytest.raises(ZooError, match="resnett") as caught:
        family_feeds("resnett", 1)
    assert "resnet" in caught.value.hint
    with pytest.raises(ZooError, match="multiple of 4"):
        family_feeds("unet", 1, size=30)
    with pytest.raises(ZooError, match="up to 128"):
        family_feeds("bert", 1, size=129)
    with pytest.raises(ZooError, match="-1 feeds"):
        family_feeds("bert", -1)
    with pytest.raises(ZooError, match="batch 0"):
        family_feeds("bert", 1, batch=0)


def test_centred_weights_have_no_mean_and_the_others_deviation() -> None:
    plain, centre = normal("any", (8, 64, 3), 0.5), centred("any", (8, 64, 3), 0.5, (1, 2))
    # Every value is rounded to float32 once: a mean of 192 of them is off by less than one rounding.
    assert np.abs(centre.mean((1, 2), dtype=np.float64)).max() < 2 * np.finfo(np.float32).eps
    assert np.allclose(plain - centre, (plain - centre)[:, :1, :1], atol=1e-6)


def test_rotations_are_rotations() -> None:
    cos, sin = (t.astype(np.float64) for t in transformers._rotations(8))
    assert np.allclose(cos**2 + sin**2, 1, atol=1e-6)
    angles = np.unwrap(np.arctan2(sin, cos), axis=0)
    assert np.allclose(np.diff(angles, axis=0), angles[1], atol=1e-5)
    assert np.array_equal(cos[:, :4], cos[:, 4:])
