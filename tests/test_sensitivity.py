"""Prices: what a term really does to the worst output, measured on a switchboard and on a rewritten model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from models import TARGET, Array, learn, made, normal, text

from onnxcompress import sensitivity
from onnxcompress.base import Choice, Pass, Site, Skip, Skipped, Term
from onnxcompress.evaluate import compare
from onnxcompress.passes.quantize import Quantize
from onnxcompress.rewrite import Rewriter
from onnxcompress.sensitivity import Prices, measure_prices
from onnxcompress.statistics import Evidence, RangeMethod
from onnxcompress.target import Target
from onnxcompress.view import GraphView

PASS = Quantize(ranges=RangeMethod.MINMAX, min_weights=1)
NET = """g (float[8, 16] x) => (float[8, 8] y, float[8, 12] z) {
  a = MatMul (x, u)  r = Relu (a)  y = MatMul (r, v)  z = Gemm (r, w, b) }"""


def whole(seed: int, *shape: int) -> Array:
    """Integers up to 127 in every column: int8 holds them exactly, so only activations are rounded."""
    weight = np.random.default_rng(seed).integers(-100, 101, shape).astype(np.float32)
    weight[0] = 127
    return weight


def net(exact: bool) -> ir.Model:
    make = whole if exact else normal
    return text(NET, {"u": make(0, 16, 16), "v": make(1, 16, 8), "w": make(2, 16, 12), "b": normal(3, 12)})


def feeds(count: int = 2, shape: tuple[int, ...] = (8, 16)) -> list[dict[str, Array]]:
    return [{"x": normal(10 + i, *shape)} for i in range(count)]


def priced(
    model: ir.Model,
    terms: list[Term],
    data: list[dict[str, Array]],
    *,
    budget: float = 0.0,
    names: tuple[str, ...] | None = None,
    pass_: Pass = PASS,
) -> Prices:
    """By default every term by itself: nothing is negligible in a budget of nothing."""
    outputs = names or tuple(str(v.name) for v in model.graph.outputs)
    return measure_prices(pass_, model, terms, learn(pass_, model, data), TARGET, data, outputs, budget=budget)


def noise(model: ir.Model, after: ir.Model, data: list[dict[str, Array]]) -> float:
    """Noise power over signal power at the worst output, by the library's own comparison."""
    return float(10 ** (-compare(model, after, data).min_sqnr_db / 10))


@pytest.mark.parametrize("weight", ["u", "v", "w"])
def test_the_price_of_a_weight_is_its_noise_in_the_rewritten_model(weight: str) -> None:
    model, data = net(exact=False), feeds()
    site = {"u": "node", "v": "node_2", "w": "node_3"}[weight]
    after = made(PASS, model, {site: "weights"})
    term = Term("weight", weight)
    found = priced(model, sorted({term, Term("weight", "u")}), data)
    assert found.terms[term] == pytest.approx(noise(model, after, data), rel=1e-3)
    assert found.shared == () and not found.impossible


def test_the_price_of_run_time_rounding_is_its_noise_in_the_rewritten_model() -> None:
    model, data = net(exact=True), feeds()
    for value, site in (("x", ["node"]), ("r", ["node_2", "node_3"])):
        after = made(PASS, model, dict.fromkeys(site, "dynamic"))
        term = Term("dynamic", value)
        assert priced(model, [term], data).terms[term] == pytest.approx(noise(model, after, data), rel=1e-2)


def test_the_price_of_a_quantized_value_is_its_noise_in_the_rewritten_model() -> None:
    """The input holds the integers of its own grid, so the static node rounds its output only."""
    model = text("g (float[8, 16] x) => (float[8, 8] y) { m = MatMul (x, u)  y = MatMul (m, v) }",
                 {"u": whole(0, 16, 16), "v": whole(1, 16, 8)})  # fmt: skip
    x = np.random.default_rng(3).integers(0, 256, (8, 16)).astype(np.float32)
    x[0, :2] = 0, 255
    after = made(PASS, model, {"node": "static"}, [{"x": x}])
    terms = [Term("activation", "m"), Term("activation", "x")]
    found = priced(model, terms, [{"x": x}])
    assert found.terms[terms[0]] == pytest.approx(noise(model, after, [{"x": x}]), rel=1e-2)
    assert found.terms[terms[1]] < 1e-10


def test_the_price_of_smoothing_is_its_noise_in_the_rewritten_model() -> None:
    model, data = net(exact=False), feeds()
    after = made(PASS, model, {"node": "smooth"}, data)
    term = Term("smooth", "node")
    assert priced(model, [term], data).terms[term] == pytest.approx(noise(model, after, data), rel=1e-2)


def test_the_worst_output_counts_and_only_those_observed() -> None:
    """V is read on the way to y only: z does not hear of it."""
    model, data = net(exact=False), feeds()
    term = Term("weight", "v")
    assert priced(model, [term], data, names=("z",)).terms[term] == 0
    alone = priced(model, [term], data, names=("y",)).terms[term]
    assert alone > 0
    assert priced(model, [term], data).terms[term] == alone


def test_inner_values_can_be_observed_and_missing_ones_are_passed_over() -> None:
    model, data = net(exact=False), feeds()
    term = Term("weight", "u")
    assert priced(model, [term], data, names=("r", "nowhere")).terms[term] > 0


# --- grouping ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shift(Pass):
    """Adds a constant to a value, by default the output: noise of exactly known power."""

    name: ClassVar[str] = "shift"
    at: str = "y"
    impossible: tuple[str, ...] = ()

    def sites(self, view: GraphView) -> Iterable[Site | Skipped]:
        return []

    def choices(self, site: Site, view: GraphView, target: Target) -> Iterable[Choice]:
        return []

    def apply(self, choice: Choice, rewriter: Rewriter, evidence: Evidence) -> None: ...

    def simulate(self, term: Term, rewriter: Rewriter, evidence: Evidence, target: Target, switch: ir.Value) -> bool:
        if term.subject in self.impossible:
            raise Skip("not this one")
        if term.kind == "unknown":
            return False
        value = rewriter.value(self.at)
        amount = rewriter.constant(np.array(float(term.subject), np.float32), "amount")
        (on,) = rewriter.insert("Cast", [switch], {"to": int(ir.DataType.FLOAT)}, after=value)
        (scaled,) = rewriter.insert("Mul", [on, amount], after=on)
        (mixed,) = rewriter.insert("Add", [value, scaled], after=scaled.producer())
        rewriter.replace_uses(value, mixed, keep=[n for n in [mixed.producer()] if n is not None])
        return True


def plain(constant: float = 1.0) -> tuple[ir.Model, list[dict[str, Array]]]:
    """Y = x, all of one value."""
    model = text("g (float[4] x) => (float[4] y) { y = Identity (x) }")
    return model, [{"x": np.full(4, constant, np.float32)}]


def shifts(*amounts: float) -> list[Term]:
    return [Term("shift", str(a)) for a in amounts]


def test_the_price_is_noise_power_over_signal_power() -> None:
    model, data = plain(2.0)
    found = priced(model, shifts(0.5, 0.25), data, pass_=Shift())
    assert [found.terms[t] for t in shifts(0.5, 0.25)] == pytest.approx([0.0625, 0.015625])


def test_signal_and_noise_are_summed_over_samples() -> None:
    model, _ = plain()
    data = [{"x": np.full(4, v, np.float32)} for v in (1.0, 3.0)]
    assert priced(model, shifts(0.5), data, pass_=Shift()).terms[shifts(0.5)[0]] == pytest.approx(0.5 / 10)


def test_what_is_negligible_together_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight terms, one harmful: the seven others share the figures of their groups, in fewer runs."""
    model, data = plain()
    terms = shifts(*(0.001 * (1 + i / 8) for i in range(5)), 0.5, 0.0011, 0.0012)
    runs: list[int] = []
    measure = sensitivity._Board.noise
    monkeypatch.setattr(sensitivity._Board, "noise", lambda board, on: (runs.append(len(on)), measure(board, on))[1])
    found = priced(model, terms, data, budget=0.1, pass_=Shift())
    assert found.terms[terms[5]] == pytest.approx(0.25)
    assert {t for group in found.shared for t in group} <= set(terms) - {terms[5]}
    assert found.shared
    for group in found.shared:
        together = sum(float(t.subject) for t in group) ** 2
        assert together <= 0.02 * 0.1
        assert [found.terms[t] for t in group] == pytest.approx([together / len(group)] * len(group), rel=1e-3)
    assert runs[0] == 8 and len(runs) < 8
    assert set(found.terms) == set(terms)


def test_progress_counts_terms() -> None:
    model, data = plain()
    seen: list[tuple[int, int]] = []
    terms = shifts(0.5, 0.25, 0.125)
    measure_prices(
        Shift(), model, terms, Evidence(), TARGET, data, ("y",), budget=0.0, progress=lambda *a: seen.append(a)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_terms_that_cannot_be_simulated_say_why_and_do_not_disturb() -> None:
    model, data = plain()
    terms = [*shifts(0.5, 0.25), Term("unknown", "0")]
    found = priced(model, terms, data, pass_=Shift(impossible=("0.25",)))
    assert found.terms == {terms[0]: pytest.approx(0.25)}
    assert found.impossible == {terms[1]: "not this one", terms[2]: "shift cannot simulate it"}


def test_the_model_is_not_changed() -> None:
    model, data = plain()
    priced(model, shifts(0.5), data, pass_=Shift())
    assert [v.name for v in model.graph.inputs] == ["x"] and len(list(model.graph)) == 1


# --- corners -----------------------------------------------------------------------------------


def test_noise_on_silence_has_no_price() -> None:
    model, data = plain(0.0)
    found = priced(model, shifts(0.5, 0.0), data, pass_=Shift())
    assert [found.terms[t] for t in shifts(0.5, 0.0)] == [math.inf, 0.0]


def test_infinities_that_stay_are_no_noise() -> None:
    """Masked scores are minus infinity, before and after."""
    model, _ = plain()
    data = [{"x": np.array([1, -np.inf, 2, 2], np.float32)}]
    found = priced(model, shifts(0.5), data, pass_=Shift())
    assert found.terms[shifts(0.5)[0]] == pytest.approx(0.75 / 9)


def test_numbers_that_become_infinite_have_no_price() -> None:
    model, _ = plain()
    data = [{"x": np.array([1, 3e38, 2, 2], np.float32)}]
    assert priced(model, shifts(3e38), data, pass_=Shift()).terms[shifts(3e38)[0]] == math.inf


def test_an_output_of_another_shape_has_no_price() -> None:
    """How many elements are above zero is data: noise changes it, and there is nothing to compare."""
    model = text(
        """g (float[4] x) => (float[n] y) { s = Identity (x)  z = Relu (s)  i = NonZero (z)
             t = Transpose (i)  y = GatherND (s, t) }"""
    )
    data = [{"x": np.array([1, -0.1, 1, 1], np.float32)}]
    found = priced(model, shifts(0.05, 0.5), data, pass_=Shift(at="s"))
    assert found.terms[shifts(0.05)[0]] == pytest.approx(0.0025, rel=1e-4)
    assert found.terms[shifts(0.5)[0]] == math.inf


def test_numbers_that_become_nan_have_no_price() -> None:
    """Whichever output comes first: a maximum over NaN and numbers would depend on it."""
    model = text("g (float[4] x) => (float[4] y, float[4] z) { s = Identity (x)  y = Sqrt (s)  z = Neg (s) }")
    for names in (("y", "z"), ("z", "y")):
        found = priced(model, shifts(-5.0), [{"x": np.ones(4, np.float32)}], names=names, pass_=Shift(at="s"))
        assert found.terms[shifts(-5.0)[0]] == math.inf
