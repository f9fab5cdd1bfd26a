"""Sums of a cost: quantities times coefficients, changed shapes, bytes, lifetimes and energy, by other ways."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prices import CACHES, priced
from test_cost import f32, view_of

from onnxcompress import model as models
from onnxcompress.calibrate import value_shapes
from onnxcompress.cost import Costing, CostModel, ModelCost, NodeWork, Use, quantities
from onnxcompress.fitting.equations import seen
from onnxcompress.fitting.measuring import forms
from onnxcompress.fitting.nets import CHECKED, FITTED
from onnxcompress.models_zoo import generated, sample_feeds
from onnxcompress.profile import Profile, list_profiles, load_profile
from onnxcompress.profile_tables import Energy, Kernel, Memory
from onnxcompress.sizes import ZSTD_LEVEL
from onnxcompress.view import GraphView
from onnxcompress.work import Shapes

PRICED = priced()

Case = tuple[GraphView, Shapes]


def zoo(name: str, folder: Path) -> Case:
    path = folder / f"{name}.onnx"
    generated.build(name, path)
    model = models.load(path)
    return GraphView(models.infer_types(model)), value_shapes(model, next(iter(sample_feeds(name, 1))), bodies=True)


def network(name: str, form: str) -> Case:
    net = next(n for n in (*FITTED, *CHECKED) if n.name == name)
    return seen(forms(net)[form], net.feed())


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return zoo("gen-cnn", tmp_path_factory.mktemp("zoo"))


# ---- quantities times coefficients -------------------------------------------------------------------------


def summed(profile: Profile, uses: tuple[Use, ...]) -> float:
    """Seconds of uses, term by term."""
    kernels: dict[tuple[str, str, str], Kernel] = {(k.kind, k.precision, k.on): k for k in profile.kernels}
    fused = {(f.precision, op): f.ns_per_element for f in profile.fusions if not f.constant_operand for op in f.absorbs}
    levels = [(c.ns_per_byte, c.ns_per_weight_byte) for c in profile.caches]
    if profile.memory is not None:
        levels.append((0.0, profile.memory.ns_per_byte))
    total = profile.overhead.ns_per_run
    for use in uses:
        total += profile.overhead.ns_per_node * use.dispatched
        if use.key[0] == "fused":
            total += fused[use.key[1:]] * use.work.elements_out
            continue
        kernel = kernels[use.key]
        terms = quantities(kernel, use.work)._asdict()
        total += sum(getattr(kernel, "ns_fixed" if t == "fixed" else f"ns_per_{t}") * q for t, q in terms.items())
        missed = zip(use.missed, levels, strict=True)
        total += sum(m.activations * a + m.weights * w for m, (a, w) in missed)
    return 1e-9 * total


def check_usage(case: Case, profile: Profile) -> ModelCost:
    model = CostModel(profile)
    cost, uses = model.model(*case), model.usage(*case)
    assert cost.seconds == pytest.approx(summed(profile, uses), rel=1e-9)
    assert {u.name for u in uses} <= {n.name for n in cost.nodes}
    return cost


@pytest.mark.parametrize("name", ["gen-cnn", "gen-transformer", "gen-lstm"])
def test_seconds_of_generated_models_are_their_usage(name: str, tmp_path: Path) -> None:
    case = zoo(name, tmp_path)
    cost = check_usage(case, PRICED)
    assert not cost.unknown
    check_usage(case, priced(1, block=0))


@pytest.mark.parametrize("form", ["f32", "wholly", "partly"])
@pytest.mark.parametrize("name", ["mobile-small", "mobile-swish", "shuffled", "signal"])
def test_seconds_of_networks_are_their_usage(name: str, form: str) -> None:
    cost = check_usage(network(name, form), PRICED)
    precisions = {n.precision for n in cost.nodes}
    assert ("u8s8" in precisions) == (form != "f32")


def test_usage_with_weights_in_memory(cnn: Case) -> None:
    profile = PRICED.model_copy(update={"memory_": Memory(cache_bytes=100_000, ns_per_byte=0.3)})
    profile = Profile.model_validate(_tables(profile))
    check_usage(cnn, profile)
    assert all(len(u.missed) == len(CACHES) + 1 for u in CostModel(profile).usage(*cnn) if u.key[0] != "fused")


def test_usage_leaves_out_what_cannot_run(cnn: Case) -> None:
    whole = CostModel(PRICED).usage(*cnn)
    kernels = tuple(k for k in PRICED.kernels_ if k.kind != "conv_depthwise")
    fewer = CostModel(Profile.model_validate(_tables(PRICED.model_copy(update={"kernels_": kernels})))).usage(*cnn)
    assert {u.name for u in whole} - {u.name for u in fewer} == {
        u.name for u in whole if u.key[0] == "conv_depthwise"
    } - {u.name for u in whole if u.key[0] == "reorder"}


def _tables(profile: Profile) -> dict[str, Any]:
    return {f.alias or name: getattr(profile, name) for name, f in type(profile).model_fields.items()}


COUNTS = st.integers(0, 10**7)
WORKS = st.builds(
    NodeWork, name=st.just("n"), op_type=st.sampled_from(["Conv", "MatMul", "Add", "Sigmoid", "LSTM"]),
    kind=st.sampled_from(["conv", "conv_pointwise", "conv_depthwise", "matmul", "matmul_rows1", "elementwise", "lstm"]),
    maps=st.booleans(), macs=COUNTS, in_channels=st.integers(0, 600), out_channels=st.integers(0, 600),
    elements_in=COUNTS, elements_out=COUNTS, weights=COUNTS, params=COUNTS, patches=COUNTS, segments=COUNTS,
    segments_nhwc=COUNTS, blocked=st.booleans(),
)  # fmt: skip
AMOUNTS = ("macs", "elements_in", "elements_out", "weights", "patches", "segments", "segments_nhwc")


SHIPPED = tuple(load_profile(name) for name in list_profiles())


@settings(deadline=None, max_examples=60)
@given(WORKS, st.sampled_from(AMOUNTS), st.integers(1, 10**6), st.sampled_from(["f32", "u8s8"]))
def test_more_work_never_costs_less(work: NodeWork, what: str, more: int, precision: str) -> None:
    larger = replace(work, **{what: getattr(work, what) + more})
    for profile in (PRICED, *SHIPPED):
        model = CostModel(profile, traffic_bytes=10**6)
        small, large = model.node(work, precision), model.node(larger, precision)
        assert (small is None) == (large is None)
        assert small is None or large is None or small <= large * (1 + 1e-12)


# ---- changed shapes ----------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the nodes that are priced; "" is a change of layout."""
    names: list[str] = []
    node = CostModel.node

    def spied(self: CostModel, work: NodeWork, precision: str = "f32") -> float | None:
        names.append(work.name)
        return node(self, work, precision)

    monkeypatch.setattr(CostModel, "node", spied)
    return names


def maps_of(case: Case) -> list[str]:
    view, shapes = case
    made = [str(v.name) for n in view.nodes() for v in n.outputs]
    return [name for name in made if len(shapes.get(name, ())) == 4 and shapes[name][2] > 1]


def test_changed_maps_price_only_their_nodes_anew(cnn: Case, calls: list[str]) -> None:
    view, shapes = cnn
    model = CostModel(priced(caches=(), misses=False))
    costing = Costing(model, view, shapes)
    costing.cost()
    changes = {n: (*shapes[n][:2], 20, 24) for n in maps_of(cnn) if shapes[n][2] == 16}
    calls.clear()
    changed = costing.reshaped(changes).cost()
    priced_anew = {c for c in calls if c}
    touched = {n for n in view.nodes() if any(v is not None and v.name in changes for v in (*n.inputs, *n.outputs))}
    assert priced_anew <= {str(n.name) for n in touched} and 0 < len(touched) < len(view.nodes())
    assert {str(n.name) for n in touched if n.op_type == "Conv"} <= priced_anew
    assert changed == model.model(view, {**shapes, **changes})


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_changed_shapes_cost_what_they_cost_afresh(cnn: Case, data: st.DataObject) -> None:
    view, shapes = cnn
    model = CostModel(PRICED)
    costing = Costing(model, view, shapes)
    costing.cost()
    for _ in range(2):  # one after the other, too
        changes = {}
        for name in data.draw(st.lists(st.sampled_from(maps_of(cnn)), max_size=6, unique=True)):
            batch, channels, *_ = shapes[name]
            extent = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
            changes[name] = (batch, data.draw(st.sampled_from((channels, channels, 17))), *extent)
        costing, shapes = costing.reshaped(changes), {**shapes, **changes}
        assert costing.cost() == model.model(view, shapes)


def test_a_map_that_becomes_a_pixel_changes_what_is_fused() -> None:
    view = view_of(
        "a = Conv(x, w) b = Conv(x, v) y = Mul(a, b)", "float[1,16,8,8] x", "float[n,c,h,q] y",
        w=f32(16, 16, 1, 1), v=2 * f32(16, 16, 1, 1),
    )  # fmt: skip
    shapes = dict.fromkeys("xaby", (1, 16, 8, 8))
    model = CostModel(PRICED)
    costing = Costing(model, view, shapes)
    assert len([u for u in model.usage(view, shapes) if u.key[0] == "reorder"]) == 2
    changed = {**shapes, "b": (1, 16, 1, 1)}
    assert len([u for u in model.usage(view, changed) if u.key[0] == "reorder"]) == 3
    assert costing.reshaped({"b": (1, 16, 1, 1)}).cost() == model.model(view, changed)


def long_network(blocks: int) -> Case:
    """Five nodes a block: a convolution with its activation, a gate, and a sum with what was before; pooled at last."""
    body = []
    for i in range(blocks):
        body.append(f"c{i} = Conv(x{i}, w) r{i} = Relu(c{i}) s{i} = Sigmoid(r{i}) m{i} = Mul(r{i}, s{i})")
        body.append(f"x{i + 1} = Add(m{i}, x{i})")
    body[-1] = f"x{blocks} = MaxPool<kernel_shape=[2,2]>(m{blocks - 1})"
    view = view_of(" ".join(body), "float[1,16,4,4] x0", f"float[n,c,h,q] x{blocks}", w=f32(16, 16, 1, 1))
    shapes = {str(v.name): (1, 16, 4, 4) for n in view.nodes() for v in n.outputs}
    return view, {**shapes, "x0": (1, 16, 4, 4), f"x{blocks}": (1, 16, 2, 2)}


def counted(action: Callable[[], object]) -> int:
    """Calls of Python and C functions."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls


def test_work_grows_with_the_number_of_nodes(calls: list[str]) -> None:
    made = {blocks: long_network(blocks) for blocks in (100, 1000)}
    model = CostModel(PRICED)
    few, many = (counted(lambda case=case: model.model(*case)) for case in made.values())
    assert few < many < 11 * few
    view, shapes = made[1000]
    assert len(view.nodes()) == 5000
    costing = Costing(CostModel(priced(caches=(), misses=False)), view, shapes)
    costing.cost()
    calls.clear()
    costing.reshaped({"x1000": (1, 16, 3, 3)}).cost()
    assert len(calls) == 2  # the pooling, and its way out of the blocked layout


def test_constants_made_of_constants_are_followed_once() -> None:
    deep = " ".join(f"c{i + 1} = Relu(c{i})" for i in range(1100)) + " y = Add(x, c1100)"
    wide = " ".join(f"c{i + 1} = Add(c{i}, c{i})" for i in range(60)) + " y = Add(x, c60)"
    for body in (deep, wide):
        cost = CostModel(PRICED).model(view_of(body, "float[4] x", "float[4] y", c0=f32(4)), {})
        assert cost.nodes[-1].weight_bytes == cost.weight_bytes == 16
        assert cost.seconds == pytest.approx(CostModel(PRICED).model(
            view_of("y = Add(x, c0)", "float[4] x", "float[4] y", c0=f32(4)), {}
        ).seconds)  # fmt: skip


# ---- bytes -------------------------------------------------------------------------------------------------


def packed(array: np.ndarray) -> int:
    return len(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(array.tobytes()))


def test_bytes_are_those_of_each_initializer_once() -> None:
    rng = np.random.default_rng(0)
    w, v = rng.integers(0, 5, (32, 32)).astype(np.float32), rng.standard_normal((32, 32)).astype(np.float32)
    view = view_of("a = MatMul(x, w) b = MatMul(a, w) c = MatMul(b, v) y = Relu(c)", "float[8,32] x", "float[8,32] y",
                   w=w, v=v)  # fmt: skip
    cost = CostModel(PRICED).model(view, {}, compressed=True)
    assert cost.weight_bytes == w.nbytes + v.nbytes and cost.params == w.size + v.size
    assert cost.zstd_bytes == packed(w) + packed(v) < cost.weight_bytes
    assert [n.zstd_bytes for n in cost.nodes] == [packed(w), packed(w), packed(v), 0]
    assert [n.weight_bytes for n in cost.nodes] == [w.nbytes, w.nbytes, v.nbytes, 0]
    assert CostModel(PRICED).model(view, {}).zstd_bytes is None


def test_compressed_bytes_of_a_model(cnn: Case) -> None:
    arrays = [v.const_value.numpy() for v in cnn[0].model.graph.initializers.values() if v.const_value is not None]
    cost = CostModel(PRICED).model(*cnn, compressed=True)
    assert cost.zstd_bytes == sum(map(packed, arrays))
    assert cost.weight_bytes == sum(a.nbytes for a in arrays)


def test_weights_of_folded_nodes_are_read_once() -> None:
    """Cast and Mul of a stored weight happen when the model is loaded; only the product reads it in a run."""
    stored = view_of(
        "f = Cast<to=1>(q) v = Mul(f, s) y = MatMul(x, v)", "float[8,32] x", "float[8,64] y",
        q=np.ones((32, 64), np.int8), s=f32(64),
    )  # fmt: skip
    plain = view_of("y = MatMul(x, v)", "float[8,32] x", "float[8,64] y", v=f32(32, 64))
    assert CostModel(PRICED).for_model(stored, {}).traffic_bytes == 4 * (32 * 64 + 8 * 64)
    assert CostModel(PRICED).for_model(plain, {}).traffic_bytes == 4 * (32 * 64 + 8 * 64)


def test_integer_only_devices_keep_integers_in_their_memory() -> None:
    """A float model is priced there as the integers it will be: four times as many weights fit."""
    view = view_of("y = MatMul(x, v)", "float[8,32] x", "float[8,64] y", v=f32(32, 64))
    required = PRICED.quantization.model_copy(update={"required": True})
    device = CostModel(PRICED.model_copy(update={"quantization": required}))
    assert device.for_model(view, {}).traffic_bytes == 32 * 64 + 8 * 64
    assert CostModel(PRICED).for_model(view, {}).traffic_bytes == 4 * (32 * 64 + 8 * 64)


# ---- activations -------------------------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> tuple[str, str, str, dict[str, tuple[int, ...]]]:
    """Elementwise nodes and reshapes over random earlier values; shapes need not agree, nobody runs it."""
    inputs = draw(st.integers(1, 2))
    names = [f"x{i}" for i in range(inputs)]
    shapes = {n: (draw(st.integers(1, 30)),) for n in names}
    body = []
    for i in range(draw(st.integers(1, 9))):
        op = draw(st.sampled_from(["Sqrt", "Add", "Reshape", "Sqrt"]))
        first, second = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        name = f"v{i}"
        body.append(f"{name} = {op}({first}{f', {second}' if op == 'Add' else ', n' if op == 'Reshape' else ''})")
        shapes[name] = shapes[first] if op == "Reshape" else (draw(st.integers(1, 30)),)
        names.append(name)
    made = names[inputs:]
    outputs = sorted({made[-1], *draw(st.lists(st.sampled_from(made), max_size=2))})
    return " ".join(body), ", ".join(f"float[a] {n}" for n in names[:inputs]), ", ".join(
        f"float[a] {n}" for n in outputs
    ), shapes  # fmt: skip


def lived(view: GraphView, shapes: Shapes) -> int:
    """Peak by walking through the steps and asking of each memory whether anybody still needs it."""
    nodes, graph = view.nodes(), view.model.graph
    home: dict[str, str] = {str(v.name): str(v.name) for v in graph.inputs}
    born = dict.fromkeys(home, 0)
    last = dict.fromkeys(home, 0)
    for step, node in enumerate(nodes):
        out = str(node.outputs[0].name)
        source = str(node.inputs[0].name) if node.inputs[0] is not None else ""
        home[out] = home[source] if node.op_type == "Reshape" else out
        born.setdefault(home[out], step)
        last.setdefault(home[out], step)
        for value in node.inputs:
            if value is not None and str(value.name) in home:
                last[home[str(value.name)]] = step
        if node.outputs[0].is_graph_output():
            last[home[out]] = len(nodes)
    for output in graph.outputs:
        last[home[str(output.name)]] = len(nodes)
    return max(
        sum(4 * math.prod(shapes[m]) for m in born if born[m] <= step <= last[m]) for step in range(len(nodes) + 1)
    )


@settings(deadline=None, max_examples=80)
@given(graphs())
def test_peak_is_that_of_a_walk(case: tuple[str, str, str, dict[str, tuple[int, ...]]]) -> None:
    body, inputs, outputs, shapes = case
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}, int64[1] n) => ({outputs}) {{ {body} }}'
    )
    size = next(v for v in model.graph.inputs if v.name == "n")
    model.graph.inputs.remove(size)
    size.const_value = ir.tensor(np.array([1]), name="n")
    model.graph.register_initializer(size)
    models.canonicalize(model)
    view = GraphView(model)
    assert CostModel(PRICED).model(view, shapes).peak_activation_bytes == lived(view, shapes)


# ---- energy ------------------------------------------------------------------------------------------------


def test_energy_is_power_times_time(cnn: Case) -> None:
    cost = CostModel(PRICED.model_copy(update={"energy": Energy(active_w=3.0, source="test")})).model(*cnn)
    assert cost.energy_joule == pytest.approx(3 * cost.seconds)
    assert sum(n.energy_joule or 0 for n in cost.nodes) == pytest.approx(3 * (cost.seconds - 3e-6))


def test_energy_is_what_is_computed_and_moved() -> None:
    energy = Energy(pj_per_mac_f32=5.0, pj_per_mac_int8=1.0, pj_per_byte=100.0, idle_w=0.5, source="test")
    profile = PRICED.model_copy(
        update={"energy": energy, "caches_": (), "memory_": Memory(cache_bytes=1, ns_per_byte=0)}
    )
    profile = Profile.model_validate(_tables(profile))
    view = view_of("y = MatMul(x, v)", "float[8,32] x", "float[8,64] y", v=f32(32, 64))
    cost = CostModel(profile).model(view, {})
    moved = 4 * (32 * 64 + 8 * 32 + 8 * 64)  # nothing stays in a cache of one byte
    assert cost.energy_joule == pytest.approx(1e-12 * (5 * 8 * 32 * 64 + 100 * moved) + 0.5 * (cost.seconds - 3e-6))


def test_energy_of_integers_and_of_a_device_that_says_nothing() -> None:
    energy = Energy(pj_per_mac_f32=5.0, pj_per_mac_int8=1.0, source="test")
    case = network("mobile-small", "wholly")
    profile = PRICED.model_copy(update={"energy": energy})
    cost = CostModel(profile).model(*case)
    integer = sum(n.macs for n in cost.nodes if n.precision == "u8s8")
    rest = sum(n.macs for n in cost.nodes) - integer
    assert integer > 0 and cost.energy_joule == pytest.approx(1e-12 * (integer + 5 * rest))
    assert CostModel(PRICED).model(*case).energy_joule is None


def test_folded_nodes_take_no_energy() -> None:
    energy = Energy(pj_per_mac_f32=5.0, pj_per_byte=100.0, source="test")
    profile = PRICED.model_copy(update={"energy": energy, "caches_": ()})
    profile = Profile.model_validate(_tables(profile))
    view = view_of(
        "f = Cast<to=1>(q) v = Mul(f, s) y = MatMul(x, v)", "float[8,32] x", "float[8,64] y",
        q=np.ones((32, 64), np.int8), s=f32(64),
    )  # fmt: skip
    cost = CostModel(profile).model(view, {})
    assert [n.energy_joule for n in cost.nodes[:2]] == [0, 0]
    assert cost.energy_joule == pytest.approx(1e-12 * (5 * 8 * 32 * 64 + 100 * 4 * 32 * 64))


def test_energy_of_a_precision_nobody_measured_falls_back_on_power() -> None:
    energy = Energy(active_w=2.0, pj_per_mac_int8=1.0, source="test")
    view = view_of("y = MatMul(x, v)", "float[8,32] x", "float[8,64] y", v=f32(32, 64))
    cost = CostModel(PRICED.model_copy(update={"energy": energy})).model(view, {})
    assert cost.energy_joule == pytest.approx(2 * (cost.seconds - 3e-6))


# ---- reading -----------------------------------------------------------------------------------------------


def test_a_model_out_of_order_is_sorted(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[4] x) => (float[4] y)'
        "{ a = Relu(x) b = Sigmoid(a) y = Add(a, b) }"
    )
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    path = tmp_path / "backwards.onnx"
    path.write_bytes(proto.SerializeToString())
    model = models.load(path)
    assert [n.op_type for n in model.graph] == ["Relu", "Sigmoid", "Add"]
    assert any("sorted" in note for note in models.notes(model))
    assert value_shapes(model, {"x": np.ones(4, np.float32)})["y"] == (4,)


def test_a_model_in_order_is_left_alone(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[4] x) => (float[4] y)'
        "{ b = Sigmoid(x) a = Relu(x) y = Add(a, b) }"
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    model = models.load(path)
    assert [n.op_type for n in model.graph] == ["Sigmoid", "Relu", "Add"] and not models.notes(model)


def test_shapes_inside_the_branches_of_an_if() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 20]> g (bool c, float[n,8] x) => (float[m] y) {
        t = Relu(x)
        y = If(c) <then_branch = a () => (float[p] u) { q = Transpose<perm=[1,0]>(t) u = ReduceSum<keepdims=0>(q, k) },
                  else_branch = b () => (float[r] v) { s = Sigmoid(t) v = ReduceMax<keepdims=0>(s, k) }>
    }""".replace("(bool c,", "(int64[1] k, bool c,")
    )
    models.canonicalize(model)
    feed = {"c": np.array(True), "x": np.ones((3, 8), np.float32), "k": np.array([0])}
    outside = value_shapes(model, feed)
    assert "q" not in outside and outside["t"] == (3, 8) and outside["y"] == (3,)
    inside = value_shapes(model, feed, bodies=True)
    assert inside["q"] == (8, 3) and inside["s"] == (3, 8)
    assert {name: shape for name, shape in inside.items() if name in outside} == outside


def test_a_generated_model_with_an_if_is_wholly_known(tmp_path: Path) -> None:
    view, shapes = zoo("gen-if", tmp_path)
    assert view.nodes("If")
    cost = CostModel(PRICED).model(view, shapes)
    assert not cost.unknown
    both = summed(PRICED, CostModel(PRICED).usage(view, shapes))
    assert cost.seconds < both  # of the branches one counts; usage does not tell them apart
