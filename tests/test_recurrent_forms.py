"""LSTM, GRU and RNN with factored weights: exact where they are of low rank, least loss where they are not."""

from __future__ import annotations

import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest
from factored import seen_by, written
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array, Feeds, fused, normal, proto_of, run, text

from onnxcompress import model as models
from onnxcompress.base import Skip
from onnxcompress.errors import PassError
from onnxcompress.passes._forms import Form, Settings
from onnxcompress.passes._recurrent_forms import recurrent_forms
from onnxcompress.statistics import Evidence
from onnxcompress.view import GraphView

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, FEATURES, HIDDEN, RANK = 7, 3, 24, 16, 5
EXACT = Settings(ridge=0.0)


def low(seed: int, rank: int, *shape: int) -> Array:
    """Random matrices in the last two axes, all with the same right factor."""
    left = normal(seed, *shape[:-1], rank) / np.sqrt(rank)
    return (left @ normal(seed + 1, rank, shape[-1]) / np.sqrt(shape[-1])).astype(np.float32)


def recurrent(
    op: str,
    directions: int = 1,
    *,
    rank: int | None = None,
    bias: bool = True,
    lengths: bool = False,
    states: bool = False,
    peepholes: bool = False,
    outputs: str = "y, yh",
    attributes: str = "",
    layout: int = 0,
) -> ir.Model:
    """One node that reads x [steps, batch, features]; W and R of a rank, or of full rank."""
    rows = GATES[op] * HIDDEN
    weights = {
        "w": low(1, rank or FEATURES, directions, rows, FEATURES),
        "r": low(3, rank or HIDDEN, directions, rows, HIDDEN),
    }
    inputs = ["x", "w", "r", "", "", "", "", ""]
    if bias:
        weights["b"], inputs[3] = normal(5, directions, 2 * rows), "b"
    if lengths:
        weights["n"], inputs[4] = np.array([7, 4, 1], np.int32), "n"
    if states:
        weights["h"], inputs[5] = normal(6, directions, BATCH, HIDDEN), "h"
        if op == "LSTM":
            weights["c"], inputs[6] = normal(7, directions, BATCH, HIDDEN), "c"
    if peepholes:
        weights["p"], inputs[7] = normal(8, directions, 3 * HIDDEN), "p"
    while not inputs[-1]:
        inputs.pop()
    way = 'direction = "bidirectional", ' if directions == 2 else ""
    read = f"{BATCH}, {STEPS}" if layout else f"{STEPS}, {BATCH}"
    shapes = {
        "y": f"float[{BATCH}, {STEPS}, {directions}, {HIDDEN}] y"
        if layout
        else f"float[{STEPS}, {directions}, {BATCH}, {HIDDEN}] y",
        "yh": f"float[{BATCH}, {directions}, {HIDDEN}] yh" if layout else f"float[{directions}, {BATCH}, {HIDDEN}] yh",
        "yc": f"float[{directions}, {BATCH}, {HIDDEN}] yc",
    }
    made = ", ".join(shapes[name.strip()] for name in outputs.split(",") if name.strip())
    options = f"{way}{f'layout = {layout}, ' if layout else ''}{attributes}hidden_size = {HIDDEN}"
    call = f"{outputs} = {op} <{options}> ({', '.join(inputs)})"
    return text(f"g (float[{read}, {FEATURES}] x) => ({made}) {{ {call} }}", weights)


def feeds(count: int = 5, mean: float = 0.0) -> Feeds:
    """Features of very unequal size that depend on one another."""
    mixing = normal(20, FEATURES, FEATURES) * np.geomspace(3, 0.05, FEATURES, dtype=np.float32)
    return [{"x": normal(30 + i, STEPS, BATCH, FEATURES) @ mixing + np.float32(mean)} for i in range(count)]


def forms(model: ir.Model) -> dict[str, Form]:
    view = GraphView(model)
    (node,) = view.nodes(*GATES)
    return {form.name: form for form in recurrent_forms(node, view)}


def assert_equal(found: ir.Model, model: ir.Model, feed: dict[str, Array]) -> None:
    """Outputs differ by rounding only: every step multiplies numbers of size 1 by factors of rank 5."""
    expected = run(model, feed)
    for name, array in run(found, feed).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["input", "recurrent", "both"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"op": "LSTM"},
        {"op": "LSTM", "bias": False},
        {"op": "LSTM", "lengths": True, "states": True, "outputs": "y, yh, yc"},
        {"op": "LSTM", "peepholes": True, "bias": False},
        {"op": "LSTM", "outputs": ", yh"},
        {"op": "LSTM", "attributes": "clip = 2.5, "},
        {"op": "GRU", "states": True},
        {"op": "GRU", "attributes": "linear_before_reset = 1, "},
        {"op": "GRU", "bias": False, "lengths": True},
        {"op": "RNN"},
        {"op": "RNN", "bias": False, "states": True},
    ],
    ids=lambda o: "-".join(str(v).strip(", ") for v in o.values()),
)
@pytest.mark.parametrize("observed", [True, False])
def test_weights_of_low_rank_come_back_whole(
    name: str, directions: int, options: dict[str, object], observed: bool
) -> None:
    model = recurrent(directions=directions, rank=RANK, **options)  # type: ignore[arg-type]
    form = forms(model)[name]
    evidence = seen_by(form, model, feeds()) if observed else None
    found = written(model, form, (RANK,) * len(form.most), evidence)
    assert_equal(found, model, feeds()[0] if observed else {"x": normal(9, STEPS, BATCH, FEATURES)})


def test_attributes_and_other_inputs_stay() -> None:
    model = recurrent("LSTM", 2, lengths=True, states=True, peepholes=True, attributes="clip = 2.5, ")
    before = next(n for n in model.graph if n.op_type == "LSTM")
    found = written(model, forms(model)["input"], (8,))
    node = next(n for n in found.graph if n.op_type == "LSTM")
    assert {k: a.value for k, a in node.attributes.items()} == {k: a.value for k, a in before.attributes.items()}
    kept = [i for i in range(8) if i not in (0, 1, 3)]
    assert [node.inputs[i].name for i in kept] == [before.inputs[i].name for i in kept]  # type: ignore[union-attr]


def test_activations_stay() -> None:
    model = recurrent(
        "RNN", 2, rank=RANK,
        attributes='activations = ["Affine", "LeakyRelu"], activation_alpha = [0.5, 0.1], activation_beta = [0.25], ',
    )  # fmt: skip
    assert_equal(written(model, forms(model)["both"], (RANK, RANK)), model, feeds()[0])


def test_batch_first() -> None:
    """Onnxruntime does not run layout = 1, so the reference does."""
    model = recurrent("LSTM", rank=RANK, layout=1)
    form = forms(model)["input"]
    found = written(model, form, (RANK,))
    feed = {"x": normal(9, BATCH, STEPS, FEATURES)}
    expected = onnx.reference.ReferenceEvaluator(proto_of(model)).run(None, feed)
    for array, other in zip(onnx.reference.ReferenceEvaluator(proto_of(found)).run(None, feed), expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=0, atol=2e-5)
    assert [n.axis for n in form.needs()] == [-1]
    assert [n.joined_axes for n in forms(model)["recurrent"].needs()] == [(2, 3)]


# --- what is lost -------------------------------------------------------------------------------


def preactivations(found: ir.Model, rows: Array) -> Array:
    """W x and its bias of a rewritten or original node, over rows (many, features)."""
    node = next(n for n in found.graph if n.op_type in GATES)
    array = [None if v is None or v.const_value is None else v.const_value.numpy() for v in node.inputs]
    first = next((n for n in found.graph if n.op_type == "MatMul" and n.inputs[0].name == "x"), None)  # type: ignore[union-attr]
    weight, bias = array[1], array[3] if len(array) > 3 else None
    assert weight is not None
    wide = rows.astype(np.float64)
    if first is not None and first.inputs[1] is not None and first.inputs[1].const_value is not None:
        wide = wide @ first.inputs[1].const_value.numpy()
    made = wide @ weight.reshape(-1, weight.shape[2]).T
    return made + (0 if bias is None else bias[:, : bias.shape[1] // 2].reshape(-1))


def all_rows(samples: Feeds) -> Array:
    return np.concatenate([f["x"].reshape(-1, FEATURES) for f in samples]).astype(np.float64)


def best(weight: Array, rows: Array, rank: int) -> float:
    """Share that any weight of a rank has to lose, by a singular value decomposition of all outputs."""
    values = np.linalg.svd(rows @ weight.reshape(-1, FEATURES).T.astype(np.float64), compute_uv=False) ** 2
    return float(values[rank:].sum() / values.sum())


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [2, 8, 16])
def test_input_loses_what_cannot_be_kept(directions: int, bias: bool, rank: int) -> None:
    samples = feeds(mean=0.5)
    model = recurrent("LSTM", directions, bias=bias)
    form = forms(model)["input"]
    evidence = seen_by(form, model, samples)
    rows = all_rows(samples)
    weight = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    optimum = best(weight, rows - rows.mean(0), rank)
    assert form.factors((rank,), evidence, EXACT).lost == pytest.approx(optimum, rel=1e-3)

    expected = preactivations(model, rows)
    made = preactivations(written(model, form, (rank,), evidence, EXACT), rows)
    without_bias = expected - preactivations(recurrent("LSTM", directions), np.zeros((1, FEATURES))) * bias
    error = float(((made - expected) ** 2).sum() / ((without_bias - without_bias.mean(0)) ** 2).sum())
    assert error == pytest.approx(optimum, rel=1e-3)
    np.testing.assert_allclose(made.mean(0), expected.mean(0), atol=1e-4)  # the bias keeps the mean

    plain = preactivations(written(model, form, (rank,)), rows)
    assert ((made - expected) ** 2).sum() <= ((plain - expected) ** 2).sum()


def test_without_a_bias_to_write_second_moments_are_about_zero() -> None:
    samples = feeds(mean=0.5)
    model = text(
        f"""g (float[{STEPS}, {BATCH}, {FEATURES}] x, float[1, {8 * HIDDEN}] b)
             => (float[{STEPS}, 1, {BATCH}, {HIDDEN}] y) {{ y = LSTM <hidden_size = {HIDDEN}> (x, w, r, b) }}""",
        {"w": low(1, FEATURES, 1, 4 * HIDDEN, FEATURES), "r": low(3, HIDDEN, 1, 4 * HIDDEN, HIDDEN)},
    )
    form = forms(model)["input"]
    evidence = seen_by(form, model, [{**f, "b": normal(4, 1, 8 * HIDDEN)} for f in samples])
    weight = model.graph.initializers["w"].const_value.numpy()  # type: ignore[union-attr]
    lost = form.factors((6,), evidence, EXACT).lost
    assert lost == pytest.approx(best(weight, all_rows(samples), 6), rel=1e-3)
    found = written(model, form, (6,), evidence)
    assert next(n for n in found.graph if n.op_type == "LSTM").inputs[3].name == "b"  # type: ignore[union-attr]


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_states_are_weighed_by_direction(op: str) -> None:
    """R of a direction is measured by the states of this direction; the product keeps their mean."""
    samples = feeds(12)
    model = recurrent(op, 2, attributes="linear_before_reset = 1, " if op == "GRU" else "")
    form = forms(model)["recurrent"]
    evidence = seen_by(form, model, samples)
    states = np.concatenate([run(model, f)["y"].transpose(0, 2, 1, 3).reshape(-1, 2, HIDDEN) for f in samples])
    stored = model.graph.initializers["r"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    error = energy = 0.0
    for d in range(2):
        rows = states[:, d] - states[:, d].mean(0)
        values = np.linalg.svd(rows @ stored[d].T, compute_uv=False) ** 2
        error, energy = error + values[6:].sum(), energy + values.sum()
    assert form.factors((6,), evidence, EXACT).lost == pytest.approx(error / energy, rel=1e-3)


def test_a_reset_before_the_product_leaves_the_bias_of_states_alone() -> None:
    model = recurrent("GRU")
    form = forms(model)["recurrent"]
    found = written(model, form, (4,), seen_by(form, model, feeds()))
    node = next(n for n in found.graph if n.op_type == "GRU")
    before = model.graph.initializers["b"].const_value.numpy()  # type: ignore[union-attr]
    np.testing.assert_array_equal(node.inputs[3].const_value.numpy(), before)  # type: ignore[union-attr]


def test_aware_factors_give_better_outputs() -> None:
    samples = feeds(8)
    model = recurrent("LSTM", 2)
    form = forms(model)["input"]
    evidence = seen_by(form, model, samples)
    errors = []
    for chosen in (Settings(), Settings(aware=False)):
        found = written(model, form, (8,), evidence, chosen)
        errors.append(sum(float(((run(found, f)["y"] - run(model, f)["y"]) ** 2).sum()) for f in samples))
    assert errors[0] < errors[1]


# --- storage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("name", ["recurrent", "both"])
def test_the_product_of_weights_is_folded_at_load_and_the_file_is_smaller(op: str, name: str) -> None:
    model = recurrent(op, 2)
    form = forms(model)[name]
    ranks = (4,) * len(form.most)
    found = written(model, form, ranks)
    assert form.stored
    assert not forms(model)["input"].stored
    assert [n.op_type for n in fused(found).graph.node].count("MatMul") == len(ranks) - 1
    saved = len(models.serialize(model)) - len(models.serialize(found))
    names = 250  # of two tensors and a node more
    assert saved > 4 * (form.old_weights - form.weights(ranks)) - names > 0


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input", "recurrent", "both"])
def test_weights_that_are_no_numbers(name: str) -> None:
    model = recurrent("LSTM")
    for weight in ("w", "r"):
        array = model.graph.initializers[weight].const_value.numpy().copy()  # type: ignore[union-attr]
        array[0, 3, 3] = np.nan
        model.graph.initializers[weight].const_value = ir.tensor(array, name=weight)
    form = forms(model)[name]
    with pytest.raises(PassError, match="NaN"):
        form.factors((4,) * len(form.most), Evidence(), Settings())


@pytest.mark.parametrize("name", ["input", "recurrent", "both"])
def test_the_same_every_time(name: str) -> None:
    model = recurrent("LSTM", 2)
    form = forms(model)[name]
    evidence = seen_by(form, model, feeds())
    ranks = (6,) * len(form.most)
    again = forms(model)[name].factors(ranks, evidence, Settings())
    for slot, array in form.factors(ranks, evidence, Settings()).weights.items():
        np.testing.assert_array_equal(array, again.weights[slot])


def test_made_up_inputs_are_no_evidence() -> None:
    model = recurrent("LSTM")
    form = forms(model)["both"]
    seen = seen_by(form, model, feeds())
    made_up = Evidence(grams={n: seen.second_moments(n) for n in form.needs()}, synthetic=True)
    plain = form.factors((4, 4), Evidence(), Settings())
    for evidence, chosen in ((made_up, Settings()), (seen, Settings(aware=False))):
        found = form.factors((4, 4), evidence, chosen)
        assert found.lost == plain.lost
        for slot, array in found.weights.items():
            np.testing.assert_array_equal(array, plain.weights[slot])


def test_weights_that_others_read_stay() -> None:
    model = text(
        f"""g (float[{STEPS}, {BATCH}, {FEATURES}] x) => (float[{STEPS}, 1, {BATCH}, {HIDDEN}] y, float[1, 64, 16] s) {{
          y = LSTM <hidden_size = {HIDDEN}> (x, w, r)  s = Neg (r) }}""",
        {"w": low(1, FEATURES, 1, 4 * HIDDEN, FEATURES), "r": low(3, HIDDEN, 1, 4 * HIDDEN, HIDDEN)},
    )
    assert list(forms(model)) == ["input"]


def test_weights_that_are_computed() -> None:
    model = text(
        f"""g (float[{STEPS}, {BATCH}, {FEATURES}] x, float[1, 64, {FEATURES}] w)
             => (float[{STEPS}, 1, {BATCH}, {HIDDEN}] y) {{ y = LSTM <hidden_size = {HIDDEN}> (x, w, r) }}""",
        {"r": low(3, HIDDEN, 1, 4 * HIDDEN, HIDDEN)},
    )
    with pytest.raises(Skip, match="W is no float32 constant"):
        forms(model)


@settings(max_examples=15, deadline=None)
@given(
    op=st.sampled_from(sorted(GATES)),
    directions=st.integers(1, 2),
    bias=st.booleans(),
    name=st.sampled_from(["input", "recurrent", "both"]),
    rank=st.integers(1, 16),
)
def test_any_rank_is_written(op: str, directions: int, bias: bool, name: str, rank: int) -> None:
    model = recurrent(op, directions, bias=bias)
    form = forms(model)[name]
    ranks = tuple(min(rank, m) for m in form.most)
    evidence = seen_by(form, model, feeds(2))
    found = written(model, form, ranks, evidence)
    assert run(found, feeds(1)[0])["y"].shape == run(model, feeds(1)[0])["y"].shape
    assert 0 <= form.factors(ranks, evidence, Settings()).lost <= 1 + 1e-9
    assert form.factors(form.most, evidence, Settings()).lost < 1e-9
