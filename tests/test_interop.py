"""onnx-graphsurgeon in and out: what is kept is equal, what would be lost is refused."""

from __future__ import annotations

import logging

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

from onnxcompress.errors import ModelReadError, UnsupportedModelError
from onnxcompress.evaluate import compare
from onnxcompress.interop import from_graphsurgeon, to_graphsurgeon
from onnxcompress.model import canonicalize

FEEDS = [{"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}]


def from_text(text: str) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    canonicalize(model)
    return model


@pytest.fixture
def model() -> ir.Model:
    return from_text("""
        net (float[N, 4] x) => (float[N, 4] y) <float[4] b = {1.0, 2.0, 3.0, 4.0}> {
          a = Add (x, b)
          z = ReduceSum <keepdims = 0> (a)
          c = Greater (z, z)
          y = If (c) <then_branch = t () => (float[N, 4] p) { p = Relu (a) },
                      else_branch = e () => (float[N, 4] q) { q = Neg (a) }>
        }""")


def test_there_and_back_is_the_same_model(model: ir.Model) -> None:
    graph = to_graphsurgeon(model)
    assert [node.op for node in graph.nodes] == ["Add", "ReduceSum", "Greater", "If"]
    back = from_graphsurgeon(graph)
    assert compare(model, back, FEEDS).outputs[0].max_abs == 0
    assert back.graph.inputs[0].shape == model.graph.inputs[0].shape
    assert back.opset_imports == model.opset_imports


def test_an_edited_graph(model: ir.Model) -> None:
    graph = to_graphsurgeon(model)
    graph.tensors()["b"].values = np.zeros(4, np.float32)
    back = from_graphsurgeon(graph)
    assert compare(model, back, FEEDS).outputs[0].max_abs > 0
    assert back.graph.initializers["b"].const_value.numpy().sum() == 0
    assert model.graph.initializers["b"].const_value.numpy().sum() == 10, "the model is not changed"


def test_a_graph_built_by_hand_comes_in_canonical_form() -> None:
    x = gs.Variable("x", np.float32, (3, 4))
    y = gs.Variable("y", np.float32, (3, 4))
    weight = gs.Variable("w")
    constant = gs.Node("Constant", attrs={"value": gs.Constant("v", np.full(4, 2, np.float32))}, outputs=[weight])
    graph = gs.Graph([constant, gs.Node("Mul", inputs=[x, weight], outputs=[y])], [x], [y], opset=17)
    model = from_graphsurgeon(graph)
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert len(model.graph.initializers) == 1
    assert all(node.name for node in model.graph)


@pytest.mark.parametrize("kind", ["int4", "uint4", "float8e4m3fn", "float8e5m2"])
def test_types_graphsurgeon_corrupts_are_refused(kind: str) -> None:
    model = from_text(
        f"net (float[4] x) => (float[4] y) <{kind}[4] w = {{1, 2, 1, 0}}> {{ c = Cast <to = 1> (w)  y = Add (x, c) }}"
    )
    with pytest.raises(UnsupportedModelError, match=f"tensor 'w': graphsurgeon does not keep {kind.upper()}"):
        to_graphsurgeon(model)
    with pytest.raises(UnsupportedModelError, match=kind.upper()):
        from_graphsurgeon(gs.import_onnx(ir.to_proto(model)))


def test_optional_types_are_refused() -> None:
    model = from_text("net (optional(float[4]) x) => (float[4] y) { y = OptionalGetElement (x) }")
    with pytest.raises(UnsupportedModelError, match="does not keep the type"):
        to_graphsurgeon(model)


def test_more_weights_than_a_message_holds(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.interop.EXTERNAL_DATA_THRESHOLD", 15)
    with pytest.raises(UnsupportedModelError, match="do not fit"):
        to_graphsurgeon(model)


def test_lost_metadata_is_noted(model: ir.Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        to_graphsurgeon(model)
        assert not caplog.records
        next(iter(model.graph)).metadata_props["who"] = "me"
        to_graphsurgeon(model)
    assert "drops the metadata" in caplog.text


def test_a_graph_that_cannot_be_exported() -> None:
    x, y = gs.Variable("x", np.float32, (3,)), gs.Variable("y")
    graph = gs.Graph([gs.Node("Relu", inputs=[x], outputs=[y])], [x], [y])
    with pytest.raises(ModelReadError, match="graphsurgeon cannot export"):
        from_graphsurgeon(graph)
