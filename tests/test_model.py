"""Reading, checking, cloning and writing models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import model as models
from onnxcompress.errors import ModelReadError, ModelRunError, OutputError, RewriteError, UnsupportedModelError

ADD = """<ir_version: 8, opset_import: ["" : 17]>
         g (float[2, 2] x) => (float[2, 2] y) {{ {constant} y = Add(x, w) }}"""


def proto(*weights: onnx.TensorProto, constant: str = "") -> onnx.ModelProto:
    made = onnx.parser.parse_model(ADD.format(constant=constant))
    made.graph.initializer.extend(weights)
    return made


def text(body: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(body))


def write(folder: Path, made: onnx.ModelProto, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(made.SerializeToString())
    return path


def weight(array: npt.ArrayLike, name: str = "w") -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array, np.float32), name)


def external(location: str, *, offset: object = None, length: object = None, name: str = "w") -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def run(model: ir.Model, x: npt.ArrayLike) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(models.serialize(model), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.asarray(x, np.float32)})[0])


X = np.float32([[1, 2], [3, 4]])

# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no graph"),
        (b"certainly no model", "not an ONNX model"),
        (proto(weight(np.ones((64, 64)))).SerializeToString()[:-500], "cut off"),
    ],
)
def test_what_is_no_model(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelReadError, match=message) as caught:
        models.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ModelReadError, match="no such file"):
            models.load(path)


def test_a_graph_that_onnx_ir_refuses(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu(x)  z = Neg(x) }'
    )
    made.graph.node[1].output[0] = "y"  # two nodes make one value
    with pytest.raises(ModelReadError, match="cannot be understood"):
        models.load(write(tmp_path, made))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (external("none.data", length=16), "is not there"),
        (external(".", length=16), "is not there"),
        (external("short.data", length=16), "cut off"),
        (external("short.data"), "cut off"),
        (external("full.data", offset=4, length=16), "cut off"),
        (external("full.data", length=8), "need 16"),
        (external("full.data", length="many"), "not valid"),
        (external("../full.data", length=16), "outside the folder"),
    ],
)
def test_external_data_that_cannot_be_used(tmp_path: Path, tensor: onnx.TensorProto, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "full.data").write_bytes(bytes(16))
    (folder / "full.data").write_bytes(bytes(16))
    (folder / "short.data").write_bytes(bytes(12))
    with pytest.raises(ModelReadError, match=message) as caught:
        models.load(write(folder, proto(tensor)))
    assert caught.value.tensor == "w"


@pytest.mark.parametrize("length", [16, None])
def test_external_data_stays_on_disk_until_it_is_read(tmp_path: Path, length: int | None) -> None:
    (tmp_path / "w.data").write_bytes(bytes(4) + X.tobytes())
    model = models.load(write(tmp_path, proto(external("w.data", offset=4, length=length))))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None
    np.testing.assert_array_equal(run(model, X), 2 * X)  # the message holds the weights, whatever the folder
    (inside,) = models.save(model, tmp_path / "inside.onnx", external_data=False)
    assert not onnx.load(inside, load_external_data=False).graph.initializer[0].external_data


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_initializers_become_dense(tmp_path: Path, flat: bool) -> None:
    indices = np.array([1, 2]) if flat else np.array([[0, 1], [1, 0]])
    made = proto()
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(weight([5, 7]), numpy_helper.from_array(indices, "i"), [2, 2])
    )
    model = models.load(write(tmp_path, made))
    assert models.notes(model) == ("sparse initializer 'w' was made dense",)
    np.testing.assert_array_equal(run(model, X), X + np.float32([[0, 5], [7, 0]]))


def test_sparse_constants_become_dense(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(weight([5, 7]), numpy_helper.from_array(np.array([1, 2]), "i"), [2, 2])
    made = proto()
    made.graph.node.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    model = models.load(write(tmp_path, made))
    assert models.notes(model) == ("sparse constant 'w' was made dense",)
    np.testing.assert_array_equal(run(model, X), X + np.float32([[0, 5], [7, 0]]))


def test_sparse_tensors_that_cannot_be_made_dense(tmp_path: Path) -> None:
    made = proto()
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(weight([5]), numpy_helper.from_array(np.array([9]), "i"), [2, 2])
    )
    with pytest.raises(ModelReadError, match="sparse form is not valid"):
        models.load(write(tmp_path, made))
    made.graph.sparse_initializer[0].values.data_location = TensorProto.EXTERNAL
    with pytest.raises(UnsupportedModelError, match="sparse"):
        models.load(write(tmp_path, made))


# --- the form that load promises ---------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["value_float", "value_floats", "value"])
def test_constants_become_initializers(tmp_path: Path, attribute: str) -> None:
    values = {"value_float": 2.0, "value_floats": [2.0, 2.0], "value": weight([[2, 2], [2, 2]])}
    made = proto()
    made.graph.node.insert(0, helper.make_node("Constant", [], ["w"], **{attribute: values[attribute]}))
    model = models.load(write(tmp_path, made))
    assert [n.op_type for n in model.graph] == ["Add"]
    assert set(model.graph.initializers) == {"w"}
    np.testing.assert_array_equal(run(model, X), X + 2)


def test_initializers_that_are_inputs_stop_being_inputs_and_the_report_says_so(tmp_path: Path) -> None:
    made = proto(weight(X))
    made.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2]))
    made.ir_version = 3  # where every initializer had to be an input
    model = models.load(write(tmp_path, made))
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert "overridden" in models.notes(model)[0]
    onnx.checker.check_model(onnx.load_from_string(models.serialize(model)))
    np.testing.assert_array_equal(run(model, X), 2 * X)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
           g (float[2, 2] x) => (float[2, 2] y) { a = local.twice(x)  y = local.twice(a) }
           <domain: "local", opset_import: ["" : 17]> twice (x) => (y) { y = Add(x, x) }"""
    )
    model = models.load(write(tmp_path, made))
    assert [n.op_type for n in model.graph] == ["Add", "Add"]
    assert not model.functions
    np.testing.assert_array_equal(run(model, X), 4 * X)


BRANCHES = """<ir_version: 8, opset_import: ["" : 17]> g (float[2, 2] x, bool c) => (float[2, 2] y) {
  a = Neg(x)
  b = If(c) <then_branch = t () => (float[2, 2] p) { q = Relu(a)  p = Abs(q) },
             else_branch = e () => (float[2, 2] p) { q = Neg(a)  p = Abs(q) }>
  y = Identity(b)
}"""


def test_names_are_unique_over_all_graphs(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(BRANCHES)
    for node in made.graph.node:
        node.name = "same"
    model = models.load(write(tmp_path, made))
    nodes = [n.name for n in model.graph.all_nodes()]
    values = [v.name for g in models.all_graphs(model) for n in g for v in n.outputs]
    assert len(set(nodes)) == len(nodes) == 7
    assert len(set(values)) == len(values) == 7
    assert [o.name for o in model.graph.outputs] == ["y"]


def test_optional_outputs_stay_left_out(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[3, 1, 2] x) => (float[1, 1, 4] y) {
             a, b, y = LSTM<hidden_size = 4>(x, w, r) }"""
    )
    del made.graph.node[0].output[:]
    made.graph.node[0].output.extend(["", "", "y"])
    made.graph.initializer.extend([weight(np.ones((1, 16, 2)), "w"), weight(np.ones((1, 16, 4)), "r")])
    model = models.load(write(tmp_path, made))
    again = onnx.load_from_string(models.serialize(model))
    assert list(again.graph.node[0].output) == ["", "", "y"]


def test_strings_custom_domains_and_metadata_survive(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "my.ops" : 3]>
           g (float[2, 2] x) => (float[2, 2] y, string[2] t) { y = my.ops.Special<k = 3>(x)  t = Identity(s) }"""
    )
    made.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [2], [b"ab", b"c"]))
    made.metadata_props.add(key="author", value="me")
    first = models.serialize(models.load(write(tmp_path, made)))
    again = onnx.load_from_string(first)
    assert {(o.domain, o.version) for o in again.opset_import} == {("", 17), ("my.ops", 3)}
    assert [(p.key, p.value) for p in again.metadata_props] == [("author", "me")]
    assert again.graph.node[0].domain == "my.ops"
    assert list(again.graph.initializer[0].string_data) == [b"ab", b"c"]


def test_metadata_of_a_weight_does_not_double_on_each_round_trip(tmp_path: Path) -> None:
    tensor = weight(X)
    tensor.metadata_props.add(key="unit", value="mm")
    made, sizes = proto(tensor), []
    for _ in range(3):
        made = onnx.load_from_string(models.serialize(models.load(write(tmp_path, made))))
        sizes.append(made.ByteSize())
    assert len(set(sizes)) == 1
    assert [(p.key, p.value) for p in made.graph.initializer[0].metadata_props] == [("unit", "mm")]


# --- cloning and types -------------------------------------------------------------------------


def test_a_clone_shares_weights_and_nothing_else() -> None:
    model = ir.from_proto(proto(weight(X)))
    copy = models.clone(model)
    assert copy.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    copy.graph.remove(list(copy.graph), safe=False)
    assert len(model.graph) == 1


def test_a_clone_remembers_its_file_and_notes(tmp_path: Path) -> None:
    made = proto(weight(X))
    made.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2]))
    path = write(tmp_path, made)
    copy = models.clone(models.load(path))
    assert models.source(copy) == path.resolve()
    assert len(models.notes(copy)) == 1


def test_types_are_inferred_without_touching_the_model() -> None:
    model = text(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4] x) => (y) <float[9, 9] a> {
             a = Relu(x)  s = Shape(a)  y = Cast<to = 10>(a) }"""
    )
    types = {v.name: t for v, t in models.inferred_types(model).items()}
    assert types["a"] == (ir.DataType.FLOAT, ("N", 4))
    assert types["s"] == (ir.DataType.INT64, (2,))
    assert types["y"] == (ir.DataType.FLOAT16, ("N", 4))
    assert next(iter(model.graph)).outputs[0].shape != ir.Shape(["N", 4])


def test_constants_are_computed_by_the_runtime() -> None:
    model = text(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y)
           <float[2] w = {4, 9}> { a = Sqrt(w)  b = Neg(a)  y = Add(x, b) }"""
    )
    values = {v.name: v for n in model.graph for v in n.outputs}
    root, negative = models.compute(model, [values["a"], values["b"]], {})
    np.testing.assert_array_equal(root, np.float32([2, 3]))
    np.testing.assert_array_equal(negative, np.float32([-2, -3]))
    np.testing.assert_array_equal(
        models.compute(model, [values["b"]], {"a": np.float32([5, 6])})[0], np.float32([-5, -6])
    )
    with pytest.raises(ModelRunError, match="is not constant"):
        models.compute(model, [values["y"]], {})


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("as_external", [False, True])
def test_what_is_saved_runs_like_the_original(tmp_path: Path, as_external: bool) -> None:
    model = models.load(write(tmp_path, proto(weight(np.arange(4).reshape(2, 2)))))
    files = models.save(model, tmp_path / "out.onnx", external_data=as_external)
    assert [f.name for f in files] == (["out.onnx", "out.onnx.data"] if as_external else ["out.onnx"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["m.onnx", *(f.name for f in files)])
    session = onnxruntime.InferenceSession(str(files[0]), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": X})[0], run(model, X))
    assert models.load(files[0]).graph.initializers["w"].const_value is not None


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(X.tobytes())
    path = write(tmp_path, proto(external("w.data")))
    before = path.read_bytes()
    model = models.load(path)
    targets: list[tuple[Path, dict[str, object]]] = [
        (path, {}),
        (tmp_path / "w.data", {}),
        (tmp_path / "other.onnx", {"protect": [tmp_path / "other.onnx"]}),
    ]
    for target, options in targets:
        with pytest.raises(OutputError, match="never overwritten"):
            models.save(model, target, **options)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load(write(tmp_path, proto(weight(X))))
    with pytest.raises(OutputError, match="cannot write"):
        models.save(model, tmp_path / "no" / "such" / "folder.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        models.save(model, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "_write", full)
    with pytest.raises(OutputError, match="disk full"):
        models.save(model, tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_large_model_asks_for_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.load(write(tmp_path, proto(weight(X))))
    monkeypatch.setattr(models, "EXTERNAL_DATA_THRESHOLD", 8)
    with pytest.raises(RewriteError, match="external data"):
        models.serialize(model)
    assert len(models.save(model, tmp_path / "out.onnx")) == 2
    with models.temporary_file(model) as path:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"x": X})[0], 2 * X)
    assert not path.exists()


def test_serializing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = models.load(write(tmp_path, onnx.parser.parse_model(BRANCHES)))
    assert models.serialize(model) == models.serialize(models.clone(model))


# --- opset -------------------------------------------------------------------------------------


def test_the_opset_is_raised_and_large_weights_come_along(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(
        """<ir_version: 7, opset_import: ["" : 12]> g (float[2, 512] x) => (float[2, 1] y) {
             a = Add(x, w)  y = ReduceSum<axes = [1]>(a) }"""
    )
    made.graph.initializer.append(weight(np.arange(512)))
    model = models.load(write(tmp_path, made))
    raised = models.raise_opset(model, 13)
    assert raised.graph.opset_imports[""] == 13
    assert raised.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    assert [v.name for v in raised.graph.inputs] == ["x"]
    x = np.ones((2, 512), np.float32)
    np.testing.assert_array_equal(run(raised, x), run(model, x))
    assert models.raise_opset(raised, 11) is raised


def test_an_opset_that_cannot_be_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no adapter")

    model = models.load(write(tmp_path, proto(weight(X))))
    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    with pytest.raises(RewriteError, match="cannot be raised"):
        models.raise_opset(model, 20)


def test_weight_bytes_count_bodies_too() -> None:
    model = text(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
             y = If(c) <then_branch = t () => (float[2] p) <float[2] v = {1, 2}> { p = Add(x, v) },
                        else_branch = e () => (float[2] p) { p = Add(x, w) }> }"""
    )
    assert models.weight_bytes(model) == 16


def test_a_capture_made_later_is_sorted(tmp_path: Path) -> None:
    """The quantizer of onnxruntime appends nodes that bodies before them read."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[2] x, bool c) => (float[2] y) {
            y = If (c) <then_branch = t () => (float[2] a) { a = Neg(late) },
                        else_branch = e () => (float[2] b) { b = Identity(x) }>
            late = Abs(x)
        }""")
    path = tmp_path / "unsorted.onnx"
    path.write_bytes(model.SerializeToString())
    loaded = models.load(path)
    assert [n.op_type for n in loaded.graph] == ["Abs", "If"]
    assert any("sorted" in note for note in models.notes(loaded))
    models.clone(loaded)
