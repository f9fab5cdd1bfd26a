"""Rewriter: fresh names, shared weights, the interface of the model, bodies, staleness and the log."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import model as models
from onnxcompress.errors import ModelRunError, RewriteError, StaleViewError
from onnxcompress.rewrite import Rewriter, can_be_output

X, W = np.float32([1, -2]), np.float32([3, 4])


def text(body: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{body}'))
    models.canonicalize(model)
    return model


def run(model: ir.Model, **feeds: npt.ArrayLike) -> list[npt.NDArray[np.float32]]:
    data = models.serialize(model)
    onnx.checker.check_model(onnx.load_from_string(data))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    given_ = {
        i.name: np.asarray(feeds.get(i.name, X), np.float32 if "float" in i.type else bool)
        for i in session.get_inputs()
    }
    return [np.asarray(a) for a in session.run(None, given_)]


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph.all_nodes()]


def node(model: ir.Model, op: str) -> ir.Node:
    return next(n for n in model.graph.all_nodes() if n.op_type == op)


CHAIN = "g (float[2] x) => (float[2] y) <float[2] w = {3, 4}> { a = Add(x, w)  b = Mul(a, w)  y = Relu(b) }"
BRANCH = """g (float[2] x, bool c) => (float[2] y) <float[2] w = {3, 4}> {
  a = Add(x, w)  d = Neg(a)
  y = If(c) <then_branch = t () => (float[2] p) <float[2] v = {1, 2}> { q = Mul(d, v)  p = Relu(q) },
             else_branch = e () => (float[2] p) { p = Abs(x) }>
}"""

# --- finding and names -------------------------------------------------------------------------


def test_finding_nodes_and_values_in_bodies_too() -> None:
    rewriter = Rewriter(text(BRANCH))
    assert rewriter.value("q").producer() is node(rewriter.model, "Mul")
    assert rewriter.value("v").is_initializer()
    assert rewriter.value("x").is_graph_input()
    assert rewriter.find("nothing") is None
    with pytest.raises(RewriteError, match="no value is called"):
        rewriter.value("nothing")
    with pytest.raises(RewriteError, match="no node is called"):
        rewriter.node("nothing")


def test_values_are_found_after_they_changed_their_names() -> None:
    rewriter = Rewriter(text(CHAIN))
    value = rewriter.value("a")
    rewriter.rename(value, "better")
    assert rewriter.find("a") is None
    assert rewriter.value("better") is value
    (new,) = rewriter.insert("Neg", [value], after=node(rewriter.model, "Add"), name="fresh")
    assert rewriter.value("fresh_out") is new


def test_fresh_names_avoid_nodes_values_inputs_and_weights() -> None:
    model = text(BRANCH)
    rewriter = Rewriter(model)
    taken = {"x", "w", "v", "a", "q", str(node(model, "Add").name)}
    names = [rewriter.fresh(n) for n in sorted(taken)] + [rewriter.fresh("new"), rewriter.fresh("new")]
    assert not set(names) & taken
    assert len(set(names)) == len(names)
    assert "new" in names


# --- weights -----------------------------------------------------------------------------------


def test_a_shared_weight_is_copied_for_the_one_who_writes() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    add, multiply = node(model, "Add"), node(model, "Mul")
    own = rewriter.own_weight(add, 1)
    assert own is not multiply.inputs[1]
    assert own.const_value is multiply.inputs[1].const_value  # no bytes are copied
    assert rewriter.own_weight(add, 1) is own
    assert rewriter.own_weight(multiply, 1).name == "w"
    np.testing.assert_array_equal(run(model)[0], np.maximum((X + W) * W, 0))


def test_a_new_weight_for_one_reader_leaves_the_others_theirs() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    rewriter.set_weight(node(model, "Add"), 1, np.float32([10, 10]))
    np.testing.assert_array_equal(run(model)[0], np.maximum((X + 10) * W, 0))
    rewriter.set_weight(node(model, "Mul"), 1, np.float32([1, 1]))
    assert len(model.graph.initializers) == 2
    assert "w" in model.graph.initializers  # a private weight is replaced under its name
    np.testing.assert_array_equal(run(model)[0], np.maximum(X + 10, 0))


def test_a_weight_can_be_added_as_a_further_input() -> None:
    model = text(
        "g (float[1, 1, 3, 3] x) => (float[1, 1, 3, 3] y) <float[1, 1, 1, 1] w = {2}> { y = Conv(x, w) }",
    )
    Rewriter(model).set_weight(node(model, "Conv"), 2, np.float32([5]))
    x = np.ones((1, 1, 3, 3), np.float32)
    np.testing.assert_array_equal(run(model, x=x)[0], 2 * x + 5)


def test_what_is_no_weight_cannot_be_owned() -> None:
    rewriter = Rewriter(text(CHAIN))
    for index in (0, 5):
        with pytest.raises(RewriteError, match="is not a weight"):
            rewriter.own_weight(node(rewriter.model, "Add"), index)


def test_weights_of_a_body_stay_in_it() -> None:
    model = text(BRANCH)
    rewriter = Rewriter(model)
    inner = node(model, "Mul")
    rewriter.set_weight(inner, 1, np.float32([7, 7]))
    assert [list(g.initializers) for g in models.all_graphs(model)] == [["w"], ["v"], []]
    np.testing.assert_array_equal(run(model, c=True)[0], np.maximum(-(X + W) * 7, 0))


def test_four_bit_weights_and_unused_ones() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    packed = ir.tensor(np.array([1, -2], np.int8), dtype=ir.DataType.INT4)
    assert rewriter.constant(packed, "small").dtype == ir.DataType.INT4
    assert rewriter.drop_unused_weights() == 1
    assert rewriter.drop_unused_weights() == 0
    assert "small" not in model.graph.initializers


# --- nodes -------------------------------------------------------------------------------------


def test_inserting_before_and_after() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    add = node(model, "Add")
    (negative,) = rewriter.insert("Neg", [add.outputs[0]], after=add, dtype=ir.DataType.FLOAT)
    rewriter.replace_uses(add.outputs[0], negative, keep=[rewriter.node(str(negative.producer().name))])
    (absolute,) = rewriter.insert("Abs", [model.graph.inputs[0]], before=add)
    rewriter.set_input(add, 0, absolute)
    assert ops(model) == ["Abs", "Add", "Neg", "Mul", "Relu"]
    np.testing.assert_array_equal(run(model)[0], np.maximum(-(np.abs(X) + W) * W, 0))


def test_inserting_needs_one_place() -> None:
    rewriter = Rewriter(text(CHAIN))
    add = node(rewriter.model, "Add")
    for place in ({}, {"before": add, "after": add}):
        with pytest.raises(RewriteError, match="exactly one"):
            rewriter.insert("Neg", [add.outputs[0]], **place)  # type: ignore[arg-type]


def test_several_outputs_attributes_and_other_domains() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    add = node(model, "Add")
    first, second = rewriter.insert("Split", [add.outputs[0]], {"axis": 0}, after=add, outputs=2)
    rewriter.insert("Gelu", [first], after=first.producer(), domain="com.microsoft")
    assert second.name != first.name
    assert model.graph.opset_imports["com.microsoft"] == 1
    assert add.outputs[0].uses()[0].node.op_type in ("Split", "Mul")


def test_an_output_keeps_its_name_and_place() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    relu = node(model, "Relu")
    (absolute,) = rewriter.insert("Abs", [relu.inputs[0]], before=relu)
    rewriter.replace_uses(relu.outputs[0], absolute)
    rewriter.remove(relu)
    assert [o.name for o in model.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(model)[0], np.abs((X + W) * W))


@pytest.mark.parametrize("new", ["x", "w", "z"])
def test_what_cannot_become_an_output_changes_nothing(new: str) -> None:
    model = text("g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {3, 4}> { y = Add(x, w)  z = Neg(y) }")
    rewriter = Rewriter(model)
    before = models.serialize(model)
    with pytest.raises(RewriteError, match="cannot take the place of the output"):
        rewriter.replace_uses(rewriter.value("y"), rewriter.value(new))
    assert models.serialize(model) == before
    assert rewriter.log == ()


def test_an_outer_value_cannot_become_an_output_of_a_body() -> None:
    model = text(BRANCH)
    rewriter = Rewriter(model)
    relu = node(model, "Relu")
    assert not can_be_output(rewriter.value("d"), relu.graph)
    with pytest.raises(RewriteError):
        rewriter.replace_uses(relu.outputs[0], rewriter.value("d"))


def test_only_some_readers_are_moved() -> None:
    model = text("g (float[2] x) => (float[2] y) { a = Neg(x)  b = Abs(a)  c = Relu(a)  y = Add(b, c) }")
    rewriter = Rewriter(model)
    rewriter.replace_uses(rewriter.value("a"), rewriter.value("x"), only=[node(model, "Relu")])
    np.testing.assert_array_equal(run(model)[0], np.abs(X) + np.maximum(X, 0))


def test_a_node_that_is_read_cannot_go() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    for op in ("Add", "Relu"):
        with pytest.raises(RewriteError, match="is still read"):
            rewriter.remove(node(model, op))
    assert ops(model) == ["Add", "Mul", "Relu"]


def test_removing_an_if_lets_go_of_what_its_branches_read() -> None:
    model = text(BRANCH.replace("y = If", "z = If").replace("d = Neg(a)", "d = Neg(a)  y = Relu(x)"))
    rewriter = Rewriter(model)
    assert rewriter.remove_unused(node(model, "If")) == 6
    assert ops(model) == ["Relu"]
    assert models.weight_bytes(model) == 0


def test_fewer_outputs() -> None:
    model = text("g (float[1, 1, 4] x) => (float[1, 1, 3] y) { y, i = MaxPool<kernel_shape = [2]>(x) }")
    rewriter = Rewriter(model)
    pool = node(model, "MaxPool")
    with pytest.raises(RewriteError, match="is still read"):
        rewriter.drop_outputs(pool, 0)
    rewriter.drop_outputs(pool, 1)
    assert len(pool.outputs) == 1
    assert run(model, x=np.ones((1, 1, 4), np.float32))[0].shape == (1, 1, 3)


@pytest.mark.parametrize("taken", ["then_branch", "else_branch"])
def test_a_branch_takes_the_place_of_its_if(taken: str) -> None:
    model = text(BRANCH)
    expected = run(models.clone(model), c=taken == "then_branch")
    rewriter = Rewriter(model)
    moved = rewriter.inline_branch(node(model, "If"), taken)
    assert [n.op_type for n in moved] == (["Mul", "Relu"] if taken == "then_branch" else ["Abs"])
    assert all(rewriter.node(str(n.name)) is n for n in moved)
    assert "If" not in ops(model)
    np.testing.assert_array_equal(run(model)[0], expected[0])


def test_replacing_a_node_keeps_the_names_of_its_values() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    multiply = node(model, "Mul")
    (total,) = rewriter.insert("Add", list(multiply.inputs), before=multiply)
    rewriter.replace_node(multiply, total)
    assert total.name == "b"
    np.testing.assert_array_equal(run(model)[0], np.maximum(X + W + W, 0))


def test_inputs_come_and_go() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)
    switch = rewriter.add_input("switch", ir.DataType.FLOAT, [2])
    rewriter.set_input(node(model, "Add"), 1, switch)
    with pytest.raises(RewriteError, match="cannot go"):
        rewriter.remove_input(switch)
    np.testing.assert_array_equal(run(model, switch=[1, 1])[0], np.maximum((X + 1) * W, 0))
    rewriter.set_input(node(model, "Add"), 1, rewriter.value("w"))
    rewriter.remove_input(switch)
    assert [v.name for v in model.graph.inputs] == ["x"]


def test_constants_are_computed_as_the_model_is_now() -> None:
    model = text("g (float[2] x) => (float[2] y) <float[2] w = {4, 9}> { a = Sqrt(w)  y = Add(x, a) }")
    rewriter = Rewriter(model)
    np.testing.assert_array_equal(rewriter.compute([rewriter.value("a")])[0], [2, 3])
    rewriter.set_weight(node(model, "Sqrt"), 0, np.float32([16, 25]))
    np.testing.assert_array_equal(rewriter.compute([rewriter.value("a")])[0], [4, 5])
    with pytest.raises(ModelRunError):
        rewriter.compute([rewriter.value("y")])


# --- staleness and the log ---------------------------------------------------------------------


def test_every_kind_of_edit_makes_views_stale_and_is_logged() -> None:
    model = text(BRANCH)
    rewriter = Rewriter(model)
    add = node(model, "Add")
    edits = [
        lambda: rewriter.constant(np.float32([1]), "one"),
        lambda: rewriter.set_weight(add, 1, np.float32([1, 1])),
        lambda: rewriter.insert("Neg", [add.outputs[0]], after=add, name="n"),
        lambda: rewriter.set_attribute(add, "note", 1),
        lambda: rewriter.set_input(add, 0, add.inputs[0]),
        lambda: rewriter.remove(rewriter.node("n")),
        lambda: rewriter.rename(add.outputs[0], "sum"),
        lambda: rewriter.drop_unused_weights(),
        lambda: rewriter.inline_branch(node(model, "If"), "else_branch"),
        lambda: rewriter.run_library_pass(lambda m: None, "nothing"),
    ]
    for edit in edits:
        view, count = rewriter.view(), len(rewriter.log)
        edit()
        assert len(rewriter.log) > count
        with pytest.raises(StaleViewError):
            view.nodes()
    assert rewriter.log[-1].action == "run"


def test_a_clone_does_not_notice() -> None:
    model = text(CHAIN)
    view = Rewriter(model).view()
    Rewriter(models.clone(model)).constant(np.float32([1]), "one")
    assert view.nodes()


def test_a_library_pass_may_add_nodes_that_are_found_afterwards() -> None:
    model = text(CHAIN)
    rewriter = Rewriter(model)

    def extend(edited: ir.Model) -> None:
        last = node(edited, "Add")
        edited.graph.insert_after(last, ir.node("Neg", [last.outputs[0]], name="added"))

    rewriter.run_library_pass(extend, "extend")
    assert rewriter.node("added").op_type == "Neg"
    assert rewriter.fresh("added") != "added"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["Neg", "Abs", "Relu", "bypass", "weight", "share"]), max_size=12), st.randoms())
def test_random_edits_keep_the_model_valid_and_its_interface(edits: list[str], choose: random.Random) -> None:
    """Whatever is done in whatever order, the result loads, runs, and has the outputs it had."""
    model = text(BRANCH)
    rewriter = Rewriter(model)
    for edit in edits:
        nodes = [n for n in model.graph.all_nodes() if n.op_type != "If"]
        chosen = nodes[choose.randrange(len(nodes))]
        if edit == "bypass":
            value, source = chosen.outputs[0], chosen.inputs[0]
            try:
                if source is not None:
                    rewriter.replace_uses(value, source)
                    rewriter.remove_unused(chosen)
            except RewriteError as error:
                assert "cannot take the place" in str(error)
        elif edit in ("weight", "share"):
            index = next((i for i, v in enumerate(chosen.inputs) if v is not None and v.is_initializer()), None)
            if index is not None and edit == "weight":
                rewriter.set_weight(chosen, index, np.float32([1, 2]))
            elif index is not None:
                rewriter.own_weight(chosen, index)
        else:
            (new,) = rewriter.insert(edit, [chosen.outputs[0]], after=chosen, dtype=ir.DataType.FLOAT)
            producer = new.producer()
            assert producer is not None
            rewriter.replace_uses(chosen.outputs[0], new, keep=[producer])
    rewriter.drop_unused_weights()
    assert [o.name for o in model.graph.outputs] == ["y"]
    assert run(model, c=choose.random() < 0.5)[0].shape == (2,)
    names = [n.name for n in model.graph.all_nodes()]
    assert len(set(names)) == len(names)
    assert rewriter.view().nodes()
