"""GraphView: read-only, frozen, and stale after an edit."""

from __future__ import annotations

import networkx as nx
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import model as models
from onnxcompress.errors import ModelRunError, RewriteError, StaleViewError
from onnxcompress.rewrite import Rewriter
from onnxcompress.view import GraphView, body_nodes

BODY = """<ir_version: 8, opset_import: ["" : 17]>
  g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}, int64 one = {1}> {
    a = Add(x, w)
    b = If(c) <then_branch = t () => (float[N, 4] p) <float[4] v = {5, 6, 7, 8}> { q = Mul(a, v)  p = Relu(q) },
               else_branch = e () => (float[N, 4] p) { p = Neg(a) }>
    s = Shape(b)
    y = Relu(a)
  }"""


@pytest.fixture
def model() -> ir.Model:
    made = ir.from_proto(onnx.parser.parse_model(BODY))
    models.canonicalize(made)
    return made


@pytest.fixture
def view(model: ir.Model) -> GraphView:
    return GraphView(model)


def by_op(view: GraphView, op: str) -> ir.Node:
    return view.nodes(op)[0]


def test_nodes_in_execution_order_with_and_without_bodies(view: GraphView) -> None:
    assert [n.op_type for n in view.nodes()] == ["Add", "If", "Mul", "Relu", "Neg", "Shape", "Relu"]
    assert [n.op_type for n in view.nodes(subgraphs=False)] == ["Add", "If", "Shape", "Relu"]
    assert len(view.nodes("Relu")) == 2
    assert len(view.nodes("Relu", subgraphs=False)) == 1
    assert view.in_subgraph(by_op(view, "Mul"))
    assert not view.in_subgraph(by_op(view, "Add"))
    assert [n.op_type for n in body_nodes(by_op(view, "If"))] == ["Mul", "Relu", "Neg"]


def test_a_node_by_name(view: GraphView) -> None:
    node = by_op(view, "Neg")
    assert view.node(str(node.name)) is node
    with pytest.raises(RewriteError, match="no node is called 'nobody'"):
        view.node("nobody")


def test_node_names_must_be_unique(model: ir.Model) -> None:
    for node in model.graph:
        node.name = "same"
    with pytest.raises(RewriteError, match="not unique"):
        GraphView(model)


def test_values(view: GraphView) -> None:
    add = by_op(view, "Add")
    x, w = add.inputs
    a = add.outputs[0]
    assert x is not None and w is not None
    assert view.producer(a) is add
    assert view.producer(x) is None
    assert sorted(n.op_type for n, _ in view.consumers(a)) == ["Mul", "Neg", "Relu"]
    assert not view.is_output(a)
    assert view.is_output(view.nodes("Relu", subgraphs=False)[0].outputs[0])
    assert [v.name for v in view.values()] == ["a", "b", "s", "y"]
    assert sorted(str(v.name) for v in view.weights()) == ["one", "v", "w"]


def test_weights(view: GraphView) -> None:
    x, w = by_op(view, "Add").inputs
    array = view.array(w)
    assert array is not None
    np.testing.assert_array_equal(array, np.float32([1, 2, 3, 4]))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    assert view.is_float_weight(w)
    assert not view.is_float_weight(x)
    assert view.array(x) is None
    assert view.weight(None) is None
    one = next(v for v in view.weights() if v.name == "one")
    assert not view.is_float_weight(one)


def test_shapes_and_types_are_inferred(view: GraphView) -> None:
    add = by_op(view, "Add")
    assert view.shape(add.outputs[0]) == ("N", 4)
    assert view.dtype(add.outputs[0]) == ir.DataType.FLOAT
    assert view.shape(add.inputs[1]) == (4,)
    assert view.shape(by_op(view, "Mul").outputs[0]) == ("N", 4)
    assert view.shape(by_op(view, "Shape").outputs[0]) == (2,)
    assert view.shape(None) is None
    assert view.dtype(None) is None


def test_the_networkx_graph_is_frozen_and_sees_captured_values(view: GraphView) -> None:
    graph = view.graph
    add, branch, relu = by_op(view, "Add"), by_op(view, "If"), view.nodes("Relu", subgraphs=False)[0]
    assert graph.nodes[add.name]["op"] == "Add"
    assert {d["index"] for d in graph.get_edge_data(add.name, branch.name).values()} == {-1}
    assert {d["value"] for d in graph.get_edge_data(add.name, relu.name).values()} == {"a"}
    assert nx.is_directed_acyclic_graph(graph)
    with pytest.raises(nx.NetworkXError):
        graph.add_node("more")


def test_constants_can_be_computed(view: GraphView, model: ir.Model) -> None:
    assert view.compute([next(v for v in view.weights() if v.name == "w")])[0].tolist() == [1, 2, 3, 4]
    with pytest.raises(ModelRunError):
        view.compute([by_op(view, "Add").outputs[0]])


def test_what_is_derived_is_made_once_a_key(view: GraphView) -> None:
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        return len(calls)

    assert [view.derive("a", make), view.derive("a", make), view.derive("b", make)] == [1, 1, 2]


def test_every_question_to_a_stale_view_raises(view: GraphView, model: ir.Model) -> None:
    add = by_op(view, "Add")
    value = add.outputs[0]
    Rewriter(model).set_attribute(add, "note", 1)
    questions = [
        lambda: view.model,
        lambda: view.nodes(),
        lambda: view.node("x"),
        lambda: view.in_subgraph(add),
        lambda: view.opset,
        lambda: view.graph,
        lambda: view.producer(value),
        lambda: view.consumers(value),
        lambda: view.is_output(value),
        lambda: view.weight(value),
        lambda: view.array(value),
        lambda: view.is_float_weight(value),
        lambda: list(view.weights()),
        lambda: list(view.values()),
        lambda: view.shape(value),
        lambda: view.dtype(value),
        lambda: view.compute([value]),
        lambda: view.derive("key", int),
        lambda: view.quantized_nodes,
        lambda: view.domains(),
    ]
    for question in questions:
        with pytest.raises(StaleViewError, match="make a new GraphView"):
            question()
    assert GraphView(model).nodes()


def test_quantized_models_and_domains_are_recognised() -> None:
    made = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[4] x) => (float[4] y)
               <float s = {1}> { q = QuantizeLinear(x, s)  d = DequantizeLinear(q, s)  y = com.microsoft.Gelu(d) }"""
        )
    )
    models.canonicalize(made)
    view = GraphView(made)
    assert len(view.quantized_nodes) == 2
    assert view.domains() == ["", "com.microsoft"]
    assert view.opset == 17
