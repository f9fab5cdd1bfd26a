"""Weights of 4 bits in blocks, rounded with feedback: what it is by, what it gains, and where it is not done."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from models import Array, made, normal, ops, run, text

import onnxcompress
from onnxcompress import model as models
from onnxcompress.base import Choice, Site, Term
from onnxcompress.calibrate import calibrate
from onnxcompress.data import open_data
from onnxcompress.passes._blocks import Feedback, Form, Rounded, rounded
from onnxcompress.passes.quantize import Quantize
from onnxcompress.registry import parse
from onnxcompress.rewrite import Rewriter
from onnxcompress.statistics import Evidence, Need, SecondMoments, Statistic
from onnxcompress.target import Target
from onnxcompress.view import GraphView

HOST = Target("host", weight_only_bits=(4, 8))
FED, PLAIN = (
    Quantize(modes=("blocked",), bits=(4,), block=(32,), min_weights=1, feedback=feedback) for feedback in (True, False)
)
FORM = Form(4, 32)
MIX = normal(99, 8, 64)
"""Data lie near a plane of 8 dimensions, as those of networks do: so one weight can make up for another."""

MATMUL = "g (float[4, 64] x) => (float[4, 24] y) { y = MatMul (x, w) }"
WEIGHTS = {"w": normal(0, 64, 24)}


def rows(seed: int, count: int = 4) -> Array:
    return np.asarray(normal(seed, count, 8) @ MIX + 0.3 * normal(seed + 1000, count, 64), np.float32)


FEEDS = [{"x": rows(seed)} for seed in range(64)]


def moments(x: Array) -> SecondMoments:
    """As calibration gathers them, every second row apart."""

    def of(some: Array, first: SecondMoments | None = None) -> SecondMoments:
        wide = some.astype(np.float64)
        return SecondMoments(wide.T @ wide / len(wide), wide.mean(0), len(wide), first)

    return of(x, of(x[::2]))


def values(matrix: Rounded, block: int) -> Array:
    return matrix.integers * np.repeat(matrix.scales, block, axis=1)[:, : matrix.integers.shape[1]].astype(np.float64)


def loss(matrix: Array, found: Rounded, x: Array, form: Form = FORM) -> float:
    """Energy of the error of the product."""
    return float(np.square(x @ (matrix - values(found, form.block)).T).sum())


def off(model: ir.Model, after: ir.Model, seeds: range = range(500, 540)) -> float:
    """Energy of the error on data that nothing was fitted to."""
    feeds = [{"x": rows(seed)} for seed in seeds]
    return sum(float(np.square(run(after, f)["y"] - run(model, f)["y"]).sum()) for f in feeds)


# --- rounding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [64, 50], ids=["full blocks", "a block that is not full"])
def test_scales_stay_and_integers_lose_less_on_other_data(inputs: int) -> None:
    matrix, x = normal(1, 40, inputs), rows(7, 512)[:, :inputs]
    fed, plain = Feedback(moments(x))(matrix, FORM), rounded(matrix, FORM)
    np.testing.assert_array_equal(fed.scales, plain.scales)
    assert fed.integers.dtype == np.int8 and fed.integers.min() >= -8 and fed.integers.max() <= 7
    other = rows(8, 512)[:, :inputs]
    assert loss(matrix, fed, other) < 0.5 * loss(matrix, plain, other)


def test_it_is_near_the_best_there_is() -> None:
    """Rows of four weights: against all 81 neighbours of what is nearest."""
    form, matrix = Form(4, 16), normal(3, 60, 4)
    x = normal(4, 64, 2) @ normal(5, 2, 4) + 0.1 * normal(6, 64, 4)
    plain, fed = rounded(matrix, form), Feedback(moments(x))(matrix, form)

    def error(row: int, integers: Array) -> float:
        whole = Rounded(integers[None].astype(np.int8), plain.scales[row : row + 1])
        return loss(matrix[row : row + 1], whole, x, form)

    steps = [np.array(step) for step in itertools.product((-1, 0, 1), repeat=4)]
    best = sum(min(error(r, np.clip(q + s, -8, 7)) for s in steps) for r, q in enumerate(plain.integers))
    assert loss(matrix, fed, x, form) < 0.6 * loss(matrix, plain, x, form)
    assert best <= loss(matrix, fed, x, form) < 2 * best


@pytest.mark.parametrize("count", [1, 3, 8])
def test_few_samples_are_no_ground(count: int) -> None:
    """Weights could be fitted to them to nothing, and would be worse on all others."""
    matrix, x = normal(1, 40, 64), normal(7, count, 64)
    seen = moments(x) if count > 1 else SecondMoments(x.T @ x.astype(np.float64), x[0].astype(np.float64), 1)
    np.testing.assert_array_equal(Feedback(seen)(matrix, FORM).integers, rounded(matrix, FORM).integers)


def test_many_outputs_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, feedback = normal(1, 40, 64), Feedback(moments(rows(7, 512)))
    whole = feedback(matrix, FORM)
    monkeypatch.setattr("onnxcompress.passes._blocks._ROWS", 7)
    np.testing.assert_array_equal(feedback(matrix, FORM).integers, whole.integers)


# --- in a model --------------------------------------------------------------------------------

BODIES = {
    "matmul": MATMUL,
    "gemm": "g (float[4, 64] x) => (float[4, 24] y) { y = Gemm (x, w, b) }",
    "gemm, transposed": "g (float[4, 64] x) => (float[4, 24] y) { y = Gemm <transB = 1> (x, v, b) }",
    "a table that is turned": """g (float[4, 64] x) => (float[4, 24] y) {
        t = Transpose <perm = [1, 0]> (v)  y = MatMul (x, t) }""",
    "behind another": """g (float[4, 64] x) => (float[4, 24] y) {
        h = MatMul (x, m)  r = Add (h, c)  y = MatMul (r, w) }""",
}


def network(body: str) -> ir.Model:
    weights = {
        "w": WEIGHTS["w"], "v": np.ascontiguousarray(WEIGHTS["w"].T), "b": normal(2, 24), "m": normal(3, 64, 64) / 8,
        "c": normal(4, 64),
    }  # fmt: skip
    return text(BODIES[body], {n: a for n, a in weights.items() if f"{n})" in BODIES[body] or f" {n}," in BODIES[body]})


@pytest.mark.parametrize("body", BODIES)
def test_a_product_loses_less(body: str) -> None:
    model = network(body)
    fed, plain = (made(pass_, model, "w4/32", FEEDS, HOST) for pass_ in (FED, PLAIN))
    assert ops(fed) == ops(plain)
    assert off(model, fed) < 0.6 * off(model, plain)


def choices(model: ir.Model, pass_: Quantize) -> list[Choice]:
    view = GraphView(model)
    sites = [s for s in pass_.sites(view) if isinstance(s, Site) and view.node(s.key).op_type in ("MatMul", "Gemm")]
    return [c for s in sites for c in pass_.choices(s, view, HOST)]


def evidence(model: ir.Model, pass_: Quantize = FED) -> Evidence:
    needs = {n for c in choices(model, pass_) for n in pass_.needs(c, GraphView(model))}
    return calibrate(model, sorted(needs), open_data(FEEDS, model))


@pytest.mark.parametrize("body", BODIES)
def test_the_switch_does_what_the_choice_does(body: str) -> None:
    model = network(body)
    panel, feed = models.clone(model), {"x": rows(900)}
    rewriter, known = Rewriter(panel), evidence(model)
    switch = rewriter.add_input("switch", ir.DataType.BOOL, ())
    for weight in sorted({t.subject for c in choices(model, FED) for t in c.terms if t.kind == "w4/32"}):
        assert FED.simulate(Term("w4/32", weight), rewriter, known, HOST, switch)
    closed, on = (run(panel, {**feed, "switch": np.array(value)})["y"] for value in (False, True))
    np.testing.assert_allclose(closed, run(model, feed)["y"], rtol=1e-6)
    fed, plain = (run(made(p, model, "w4/32", FEEDS, HOST), feed)["y"] for p in (FED, PLAIN))
    np.testing.assert_allclose(on, fed, rtol=1e-4, atol=1e-4)
    assert np.abs(on - plain).max() > 1e-2


def test_other_data_make_other_integers() -> None:
    """What is remembered of a weight is for one set of moments."""
    model = text(MATMUL, WEIGHTS)
    first = made(FED, model, "w4/32", FEEDS, HOST)
    other = made(FED, model, "w4/32", [{"x": normal(s, 4, 64) @ normal(98, 64, 64)} for s in range(64)], HOST)
    again = made(FED, model, "w4/32", FEEDS, HOST)
    packed = [m.graph.initializers["w_4bit"].const_value for m in (first, other, again)]
    a, b, c = (p.numpy() for p in packed if p is not None)
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize(
    ("pass_", "form", "asked"),
    [
        (FED, "w4/32", {Need("x", Statistic.GRAM, -1)}),
        (PLAIN, "w4/32", set()),
        (Quantize(min_weights=1), "w8/128", set()),
        (Quantize(min_weights=1), "weights", set()),
        (Quantize.by_default(), "w4/32", set()),
    ],
)
def test_moments_are_asked_for_by_four_bits_only(pass_: Quantize, form: str, asked: set[Need]) -> None:
    model = text(MATMUL, WEIGHTS)
    (choice,) = (c for c in choices(model, pass_) if c.name == form)
    assert set(pass_.needs(choice, GraphView(model))) == asked


def test_what_is_not_observed_is_rounded_to_the_nearest() -> None:
    """In branches, and without data."""
    body = """g (float[4, 64] x, bool flag) => (float[4, 24] y) {
      y = If (flag) <
        then_branch = t () => (float[4, 24] a) { n = Neg (x)  a = MatMul (n, w) },
        else_branch = e () => (float[4, 24] b) { o = Abs (x)  b = MatMul (o, w) }
      > }"""
    model = text(body, WEIGHTS)
    assert not any(set(FED.needs(c, GraphView(model))) for c in choices(model, FED))
    feed = {"x": rows(900), "flag": np.array(True)}
    fed, plain = (made(p, model, "w4/32", target=HOST) for p in (FED, PLAIN))
    np.testing.assert_array_equal(run(fed, feed)["y"], run(plain, feed)["y"])


@pytest.mark.parametrize("real", [True, False], ids=["data", "made-up data"])
def test_by_hand(real: bool) -> None:
    model, found = text(MATMUL, WEIGHTS), []
    for feedback in ("true", "false"):
        spec = parse(f"quantize{{modes=blocked, bits=4, block=32, feedback={feedback}}}")
        budget = onnxcompress.Budget(min_sqnr_db=5)
        calibration = FEEDS if real else None
        result = onnxcompress.optimize(model, passes=[spec], calibration=calibration, budget=budget, timing=False)
        assert ops(result.model) == ["MatMulNBits"]
        found.append(off(model, result.model))
    assert found[0] < 0.6 * found[1] if real else found[0] == found[1]
