"""Embedding tables as a narrower table and a product, tied heads included."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest
from factored import seen_by, written
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Array, Feeds, fused, normal, ops, run, text
from scipy.optimize import minimize

from onnxcompress import model as models
from onnxcompress.base import Skip
from onnxcompress.errors import PassError
from onnxcompress.passes import _table_factors as algebra
from onnxcompress.passes._forms import Form, Settings
from onnxcompress.passes._table_forms import table_forms
from onnxcompress.statistics import Evidence
from onnxcompress.view import GraphView

ROWS, WIDTH, RANK = 200, 24, 5

ONE = "g (int64[2,6] i) => (float[2,6,24] y) { y = Gather (e, i) }"
TWO = """g (int64[2,6] i, int32[4] j) => (float[2,6,24] y, float[4,24] z) {
  y = Gather (e, i)  a = Gather <axis = -2> (e, j)  z = Neg (a) }"""
TIED = """g (int64[2,6] i) => (float[2,6,200] y) {
  a = Gather (e, i)  h = MatMul (a, m)  t = Transpose <perm = [1,0]> (e)  y = MatMul (h, t) }"""
FLAT = """g (int64[7] i) => (float[7,200] y) {
  a = Gather (e, i)  h = MatMul (a, m)  t = Transpose (e)  y = MatMul (h, t) }"""
GEMM = """g (int64[7] i) => (float[7,200] y) {
  a = Gather (e, i)  h = MatMul (a, m)  y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (h, e, c) }"""
FLIPPED = """g (int64[7] i) => (float[24,200] y) {
  a = Gather (e, i)  h = MatMul (n, a)  y = Gemm <transA = 1, transB = 1> (h, e) }"""
COPY = """g (int64[2,6] i) => (float[2,6,200] y) {
  a = Gather (e, i)  h = MatMul (a, m)  y = MatMul (h, f) }"""
FLAT_COPY = "g (int64[7] i) => (float[7,200] y) { a = Gather (e, i)  h = MatMul (a, m)  y = Gemm (h, f) }"
MANY = """g (int64[2,6] i) => (float[2,6,200] y, float[12,200] z, float[2,6,24] b) {
  a = Gather (e, i)  b = Gather (e, i)  h = MatMul (a, m)  t = Transpose <perm = [1,0]> (e)  y = MatMul (h, t)
  k = Reshape (h, s)  z = MatMul (k, t) }"""
BODIES = {
    "one": ONE, "two": TWO, "tied": TIED, "tied, flat": FLAT, "tied, Gemm": GEMM, "tied, transposed": FLIPPED,
    "copy": COPY, "copy, flat": FLAT_COPY, "many": MANY,
}  # fmt: skip


def table(rank: int = WIDTH, seed: int = 1) -> Array:
    """Rows of unequal size in directions of unequal size."""
    left = normal(seed, ROWS, rank) * np.geomspace(2, 0.3, ROWS, dtype=np.float32)[:, None]
    return (left * np.geomspace(2, 0.2, rank, dtype=np.float32)) @ normal(seed + 1, rank, WIDTH) / np.float32(3)


def model_of(body: str, rank: int = WIDTH, array: Array | None = None) -> ir.Model:
    rows = table(rank) if array is None else array
    every = {
        "e": rows, "f": np.ascontiguousarray(rows.T), "m": normal(3, WIDTH, WIDTH) / 5, "n": normal(4, WIDTH, 7),
        "c": normal(5, ROWS), "s": np.array([12, WIDTH]),
    }  # fmt: skip
    return text(body, {k: v for k, v in every.items() if any(f"{o}{k}{c}" in body for o in "( " for c in ",)")})


def feeds(model: ir.Model, count: int = 6, most: int = 40) -> Feeds:
    """Ids below ``most``: the rest of the table is not seen."""
    made = []
    for n in range(count):
        random = np.random.default_rng(90 + n)
        feed = {}
        for value in model.graph.inputs:
            ids = np.minimum(random.geometric(0.1, value.shape.numpy()) - 1, most - 1)  # type: ignore[union-attr]
            feed[str(value.name)] = ids.astype(np.int32 if value.name == "j" else np.int64)
        made.append(feed)
    return made


def form_of(model: ir.Model) -> Form:
    view = GraphView(model)
    (form,) = table_forms(view.nodes("Gather")[0], view)
    return form


def assert_equal(found: ir.Model, model: ir.Model, feed: dict[str, Array]) -> None:
    """Outputs differ by rounding only."""
    expected = run(model, feed)
    for name, array in run(found, feed).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-5 * np.abs(expected[name]).max())


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("observed", [True, False])
def test_a_table_of_low_rank_comes_back_whole(name: str, observed: bool) -> None:
    model = model_of(BODIES[name], RANK)
    form = form_of(model)
    evidence = seen_by(form, model, feeds(model)) if observed else None
    found = written(model, form, (RANK,), evidence)
    assert_equal(found, model, dict(feeds(model, most=ROWS)[-1]))
    # second moments that were observed are sums in single precision
    assert form.factors((RANK,), evidence or Evidence(), Settings()).lost < (1e-7 if observed else 1e-9)


@pytest.mark.parametrize("name", BODIES)
def test_each_factor_is_there_once(name: str) -> None:
    """Also where several read the table; what held it, or a copy of it, is gone."""
    model = model_of(BODIES[name])
    form = form_of(model)
    found = written(model, form, (8,))
    shapes = [tuple(v.const_value.shape.numpy()) for v in found.graph.initializers.values() if v.const_value]
    assert shapes.count((ROWS, 8)) == shapes.count((8, WIDTH)) == 1
    assert not {(ROWS, WIDTH), (WIDTH, ROWS)} & set(shapes)
    saved = len(models.serialize(model)) - len(models.serialize(found))
    assert saved > 0.85 * 4 * (form.old_weights - form.weights((8,))) > 0
    if "flat" in name or "Gemm" in name or "transposed" in name:
        assert "Transpose" not in ops(found)


@pytest.mark.parametrize("name", ["tied", "copy", "many"])
def test_transposes_of_factors_are_folded_at_load(name: str) -> None:
    model = model_of(BODIES[name])
    form = form_of(model)
    found = written(model, form, (8,))
    assert ops(found).count("Transpose") == 2
    assert "Transpose" not in [n.op_type for n in fused(found).graph.node]
    assert form.stored == (name == "copy")


@pytest.mark.parametrize("name", BODIES)
def test_a_drawing_replaces_every_output(name: str) -> None:
    model = model_of(BODIES[name])
    form = form_of(model)
    made = {name for drawn in form.drawing((8,)) for name in drawn.outputs}
    view = GraphView(model)
    assert {str(v.name) for n in form.nodes for v in view.node(n).outputs} <= made


# --- what is lost -------------------------------------------------------------------------------


def fetched(model: ir.Model, samples: Feeds, *names: str) -> Array:
    """Rows that were fetched, once for every time."""
    array = model.graph.initializers["e"].const_value.numpy()  # type: ignore[union-attr]
    return np.concatenate([array[f[n].reshape(-1)] for f in samples for n in names]).astype(np.float64)


def approximated(form: Form, rank: int, evidence: Evidence, chosen: Settings | None = None) -> Array:
    """A B."""
    weights = {s.name: a for s, a in form.factors((rank,), evidence, chosen or Settings()).weights.items()}
    return weights["A"].astype(np.float64) @ weights["B"].astype(np.float64)


def test_lost_is_what_is_lost_of_the_rows_that_were_fetched() -> None:
    model = model_of(TWO)
    form, samples = form_of(model), feeds(model)
    evidence = seen_by(form, model, samples)
    rows = fetched(model, samples, "i", "j")
    change = rows - np.concatenate(
        [approximated(form, 6, evidence)[f[n].reshape(-1)] for f in samples for n in ("i", "j")]
    )
    error = float((change**2).sum() / (rows**2).sum())
    assert form.factors((6,), evidence, Settings()).lost == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("body", [ONE, TWO])
@pytest.mark.parametrize("rank", [1, 4, 12, 20])
def test_a_table_is_the_analytic_optimum(body: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were fetched count by how often: the singular values of all that was fetched."""
    monkeypatch.setattr(algebra, "_EVEN", 0.0)
    model = model_of(body)
    form, samples = form_of(model), feeds(model)
    evidence = seen_by(form, model, samples)
    values = np.linalg.svd(fetched(model, samples, "i", "j")[:, :] if body == TWO else fetched(model, samples, "i"))[1]
    optimum = (values[rank:] ** 2).sum() / (values**2).sum()
    assert form.factors((rank,), evidence, Settings()).lost == pytest.approx(optimum, rel=1e-3)


@pytest.mark.parametrize("body", [ONE, TIED, GEMM])
@pytest.mark.parametrize("rank", [1, 6, 12])
def test_by_the_weights_alone_it_is_the_plain_decomposition(body: str, rank: int) -> None:
    model = model_of(body)
    form = form_of(model)
    left, values, right = np.linalg.svd(table().astype(np.float64), full_matrices=False)
    expected = left[:, :rank] * values[:rank] @ right[:rank]
    np.testing.assert_allclose(approximated(form, rank, Evidence()), expected, atol=2e-6)
    optimum = (values[rank:] ** 2).sum() / (values**2).sum()
    assert form.factors((rank,), Evidence(), Settings()).lost == pytest.approx(optimum, rel=1e-4)


def parts(model: ir.Model, samples: Feeds) -> tuple[Array, Array, Array, float]:
    """E, second moments of what was fetched, and of the states; the weight of the logits."""
    array = model.graph.initializers["e"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    rows = fetched(model, samples, "i")
    states = rows @ model.graph.initializers["m"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    logits = states @ array.T
    both_ways = logits - logits.mean(0) - logits.mean(1, keepdims=True) + logits.mean()
    varies = rows.var(0).sum() / (rows**2).mean(0).sum(), (both_ways**2).sum() / (logits**2).sum()
    return array, rows.T @ rows / len(rows), states.T @ states / len(states), float(varies[0] / varies[1])


def both(array: Array, made: Array, seen: Array, states: Array, linear: Array) -> tuple[float, float]:
    """Shares lost of the rows (by the linear map that makes the new ones) and of the logits."""
    rest, change = np.eye(WIDTH) - linear, array - made
    rows = float(np.vdot(seen @ rest, rest) / np.trace(seen))
    return rows, float(np.vdot(change @ states, change) / np.vdot(array @ states, array))


@pytest.mark.parametrize("body", [TIED, FLAT])
@pytest.mark.parametrize("rank", [3, 10])
def test_a_tied_table_is_measured_by_both_of_its_readers(body: str, rank: int) -> None:
    model = model_of(body)
    form, samples = form_of(model), feeds(model, 20)
    evidence = seen_by(form, model, samples)
    array, seen, states, weight = parts(model, samples)
    sums = []
    for chosen in (Settings(ridge=0.0), Settings(aware=False)):
        made = approximated(form, rank, evidence, chosen)
        linear = np.linalg.lstsq(array, made, rcond=None)[0]
        of_rows, of_logits = both(array, made, seen, states, linear)
        sums.append((of_rows + weight * of_logits) / (1 + weight))
    lost = form.factors((rank,), evidence, Settings(ridge=0.0)).lost
    assert lost == pytest.approx(sums[0], rel=1e-2)
    assert sums[0] < sums[1]


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_turns_lead_to_the_optimum(rank: int) -> None:
    """What a general minimizer finds from the same start is no better."""
    model = model_of(TIED)
    samples = feeds(model, 20)
    array, seen, states, weight = parts(model, samples)
    even = array.T @ array / ROWS
    measured = algebra.Metrics(algebra.mixed(seen, even), even, states + 1e-4 * np.eye(WIDTH), weight)
    left, right = algebra.start(measured)
    left, right = left[:, :rank], right[:rank]

    def loss(flat: Array) -> float:
        q, b = flat[: WIDTH * rank].reshape(WIDTH, rank), flat[WIDTH * rank :].reshape(rank, WIDTH)
        return measured.lost(np.eye(WIDTH) - q @ b)

    before = loss(np.concatenate([left.ravel(), right.ravel()]))
    found = algebra.in_turns(left, right, measured)
    after = loss(np.concatenate([m.ravel() for m in found]))
    free = minimize(loss, np.concatenate([left.ravel(), right.ravel()]), method="L-BFGS-B", options={"maxiter": 60})
    assert after <= before
    assert after <= min(free.fun, before) * 1.05


def test_rows_that_nobody_fetched_are_not_lost() -> None:
    """Fetched rows lie in four directions, the others elsewhere; both count."""
    array = np.zeros((ROWS, WIDTH), np.float32)
    array[:40, :4] = normal(1, 40, 4)
    array[40:, 4:8] = normal(2, ROWS - 40, 4)
    model = model_of(ONE, array=array)
    form = form_of(model)
    evidence = seen_by(form, model, feeds(model, most=40))
    np.testing.assert_allclose(approximated(form, 8, evidence), array, atol=1e-5)
    change = approximated(form, 6, evidence) - array
    assert 0.2 < (change[40:] ** 2).sum() / (array[40:] ** 2).sum() < 0.9  # some of its directions stay


def test_factors_are_of_one_size() -> None:
    """For int8 later: each direction is as large in A as in B."""
    for body in (ONE, TIED):
        model = model_of(body)
        form = form_of(model)
        found = form.factors((8,), seen_by(form, model, feeds(model)), Settings())
        narrow, wide = found.weights.values()
        np.testing.assert_allclose((narrow**2).mean(0) ** 0.5, (wide**2).sum(1) ** 0.5, rtol=1e-4)
        turned = wide @ wide.T
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-5 * turned.max())


# --- limits -------------------------------------------------------------------------------------


def test_the_table_is_never_copied_whole() -> None:
    """Beyond the factors there are blocks of rows and matrices of the width."""
    rows, width, rank = 60_000, 64, 8
    array = normal(1, rows, width)
    model = text(
        f"g (int64[2,6] i) => (float[2,6,{width}] y, float[2,6,{rows}] z) {{ y = Gather (e, i)  t = Transpose (e)"
        "  z = MatMul (y, t) }",
        {"e": array},
    )
    form = form_of(model)
    tracemalloc.start()
    form.factors((rank,), Evidence(), Settings())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * array.nbytes  # one copy is onnx-ir's, of what protobuf holds; a double one would be 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_no_numbers(bad: float) -> None:
    array = table().copy()
    array[150, 3] = bad
    with pytest.raises(PassError, match="NaN or infinite"):
        form_of(model_of(ONE, array=array)).factors((4,), Evidence(), Settings())


@pytest.mark.parametrize("name", BODIES)
def test_the_same_every_time(name: str) -> None:
    model = model_of(BODIES[name])
    evidence = seen_by(form_of(model), model, feeds(model))
    found = [form_of(model).factors((6,), evidence, Settings()) for _ in range(2)]
    for slot, array in found[0].weights.items():
        np.testing.assert_array_equal(array, found[1].weights[slot])


def test_made_up_inputs_are_no_evidence() -> None:
    model = model_of(TIED)
    form = form_of(model)
    seen = seen_by(form, model, feeds(model))
    made_up = Evidence(grams={n: seen.second_moments(n) for n in form.needs()}, synthetic=True)
    plain = form.factors((6,), Evidence(), Settings())
    for evidence, chosen in ((made_up, Settings()), (seen, Settings(aware=False))):
        found = form.factors((6,), evidence, chosen)
        assert found.lost == plain.lost
        for slot, array in found.weights.items():
            np.testing.assert_array_equal(array, plain.weights[slot])


def test_a_table_of_zeros() -> None:
    model = model_of(TIED, array=np.zeros((ROWS, WIDTH), np.float32))
    form = form_of(model)
    found = written(model, form, (4,), seen_by(form, model, feeds(model)))
    assert not run(found, dict(feeds(model)[0]))["y"].any()


def refusal(body: str, **weights: Array) -> str:
    model = text(body, weights)
    view = GraphView(model)
    with pytest.raises(Skip) as skip:
        table_forms(view.nodes("Gather")[-1], view)
    return skip.value.reason


E = table()


def test_what_has_no_form() -> None:
    assert "first" not in refusal("g (int64 i) => (float[24] y) { y = Gather (e, i) }", e=E)
    assert "a single row" in refusal("g (int64 i) => (float[24] y) { y = Gather (e, i) }", e=E)
    assert "columns" in refusal("g (int64[3] i) => (float[200,3] y) { y = Gather <axis = 1> (e, i) }", e=E)
    assert "no constant" in refusal("g (float[200,24] e, int64[3] i) => (float[3,24] y) { y = Gather (e, i) }")
    assert "3 dimensions" in refusal(
        "g (int64[3] i) => (float[3,20,24] y) { y = Gather (e, i) }", e=E.reshape(10, 20, 24)
    )
    assert "INT8" in refusal("g (int64[3] i) => (int8[3,24] y) { y = Gather (e, i) }", e=E.astype(np.int8))
    assert "too small" in refusal("g (int64[3] i) => (float[3,24] y) { y = Gather (e, i) }", e=E[:2])
    assert "together with" in refusal(TWO, e=E)
    assert "read by Mul" in refusal(
        "g (int64[3] i) => (float[3,24] y, float[200,24] z) { y = Gather (e, i)  z = Mul (e, e) }", e=E
    )
    assert "read by Transpose" in refusal(
        "g (int64[3] i) => (float[3,24] y, float[24,200] z) { y = Gather (e, i)  z = Transpose (e) }", e=E
    )
    assert "read by Gemm" in refusal(
        """g (int64[3] i, float[3,200] h) => (float[3,24] y, float[3,24] z) {
          y = Gather (e, i)  z = Gemm (h, e) }""",
        e=E,
    )


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(BODIES)),
    rank=st.integers(1, WIDTH),
    true=st.integers(1, WIDTH),
    most=st.integers(1, ROWS),
)
def test_any_rank_is_written(name: str, rank: int, true: int, most: int) -> None:
    model = model_of(BODIES[name], true)
    form = form_of(model)
    samples = feeds(model, 2, most)
    evidence = seen_by(form, model, samples)
    found = written(model, form, (rank,), evidence)
    lost = form.factors((rank,), evidence, Settings()).lost
    assert 0 <= lost <= 1
    if rank >= true:
        assert lost < 1e-8
        assert_equal(found, model, dict(samples[0]))


def test_more_rank_loses_less() -> None:
    for body in (ONE, TIED):
        model = model_of(body)
        form = form_of(model)
        evidence = seen_by(form, model, feeds(model))
        losses = [form.factors((r,), evidence, Settings()).lost for r in range(1, WIDTH + 1)]
        if body == TIED:
            assert all(b < a for a, b in itertools.pairwise(losses))
        assert losses[-1] < 1e-9
